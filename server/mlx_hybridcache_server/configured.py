"""Flags that a command line does not name: from variables of the environment, and from a TOML file."""

from __future__ import annotations

import argparse
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_hybridcache.errors import SettingError

from .flags import FLAGS, Flag

PREFIX = "MLX_HYBRIDCACHE_"
CONFIG = "--config"

YES, NO = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})
"""What a variable says of a switch."""

EVERY: dict[str, Flag] = {flag[0]: flag for flags in FLAGS.values() for flag in flags}


def variable(name: str) -> str:
    """The variable of a flag: `--cache-dir` is `MLX_HYBRIDCACHE_CACHE_DIR`."""
    return PREFIX + _bare(name).replace("-", "_").upper()


def completed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """`argv` behind what the environment and the file of `--config` say, in their order, where it is silent.

    Raises `SettingError` for a file that cannot be read, or names what is no flag.
    """
    named = _named(parser, argv)
    from_variables = dict(_from_variables())
    given = named.get("config") or os.environ.get(variable(CONFIG))
    from_file = dict(_from_file(Path(given).expanduser())) if given else {}
    chosen = {**from_file, **from_variables}
    silent = [words for name, words in chosen.items() if _dest(name) not in named]
    return [*(word for words in silent for word in words), *argv]


def _named(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """What `argv` itself names, whatever the defaults are."""
    unsaid = object()
    lists = {
        _dest(name): None for name, (_, more) in EVERY.items() if more.get("action") == "append"
    }
    blank = {**dict.fromkeys(vars(parser.parse_args([])), unsaid), **lists}
    found = vars(parser.parse_args(argv, argparse.Namespace(**blank)))
    return {name: value for name, value in found.items() if value is not blank[name]}


def _from_variables() -> Iterator[tuple[str, list[str]]]:
    for name in EVERY:
        said = os.environ.get(variable(name))
        if not said or name == CONFIG:
            continue
        if not _is_switch(name):
            yield name, [f"{name}={said}"]
        elif said.lower() in YES | NO:
            yield name, [name] if said.lower() in YES else []
        else:
            raise SettingError(f"{variable(name)} is {said!r}; a switch is 1 or 0.")


def _from_file(path: Path) -> Iterator[tuple[str, list[str]]]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"{CONFIG} {path}: {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{CONFIG} {path} is not TOML: {error}.") from error
    for key, value in found.items():
        name = f"--{key.replace('_', '-')}"
        if name not in EVERY or name == CONFIG:
            raise SettingError(f"{CONFIG} {path}: {key} is no flag of this server; see --help.")
        yield name, [*_words(name, value, path)]


def _words(name: str, value: Any, path: Path) -> Iterator[str]:
    """A value of the file as words of a command line."""
    if _is_switch(name):
        if not isinstance(value, bool):
            raise SettingError(f"{CONFIG} {path}: {_bare(name)} is a switch: true or false.")
        yield from [name] if value else []
    elif isinstance(value, list) and EVERY[name][1].get("action") == "append":
        yield from (f"{name}={each}" for each in value)
    elif isinstance(value, list):
        yield f"{name}={','.join(map(str, value))}"
    elif isinstance(value, Mapping):
        yield f"{name}={json.dumps(value)}"
    elif isinstance(value, bool):
        raise SettingError(f"{CONFIG} {path}: {_bare(name)} is no switch; it needs a value.")
    else:
        yield f"{name}={value}"


def _is_switch(name: str) -> bool:
    return EVERY[name][1].get("action") == "store_true"


def _dest(name: str) -> str:
    return str(EVERY[name][1].get("dest", _bare(name).replace("-", "_")))


def _bare(name: str) -> str:
    return name.removeprefix("--")
