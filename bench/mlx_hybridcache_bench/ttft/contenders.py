"""Who is measured: servers to start by name on one model, and servers that run already, by URL."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..serving.servers import OURS, THEIRS, Launch, ServerError
from .model import describe, describe_gguf

LLAMA = "llama-server"
KNOWN = (THEIRS, LLAMA, OURS)
VERSION_SECONDS = 60.0

KEY_VARIABLES = {OURS: "MLX_HYBRIDCACHE_API_KEY", LLAMA: "LLAMA_API_KEY"}
"""Where a server that is started here finds a key, which its clients must then send."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One server to measure: `launch` starts it, or it runs at `url`, or `missing` says why not."""

    name: str
    launch: Launch | None = None
    url: str = ""
    missing: str = ""
    version: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    api_key: str | None = field(default=None, repr=False)

    @property
    def flags(self) -> list[str]:
        """How it is started, to be shown to others: paths are cut to their names."""
        if self.launch is None:
            return []
        return [_without_folder(each) for each in self.launch.arguments]

    def keeping(self, directory: str) -> Launch | None:
        """The launch that lets it keep its cache over a restart, where it can."""
        if self.launch is None or self.name != OURS:
            return self.launch
        given = self.launch.arguments
        if any(each.partition("=")[0] == "--cache-dir" for each in given):
            return self.launch
        return replace(self.launch, arguments=(*given, "--cache-dir", directory))


def compared(
    names: Sequence[str],
    *,
    model: str,
    gguf: Path | None,
    flags: Mapping[str, Sequence[str]],
    fields: Mapping[str, Any],
    context_tokens: int,
) -> list[Contender]:
    """Servers to start, each with its own defaults but for `flags`. Raises `ServerError`.

    llama-server reads its model from `gguf`, and is given room for `context_tokens`.
    """
    unknown = [name for name in names if name not in KNOWN]
    if unknown:
        raise ServerError(
            f"{unknown[0]} is not a server that can be started here; {', '.join(KNOWN)} are. "
            "Start it yourself and measure it with --url."
        )
    for name in flags:
        if name not in names:
            raise ServerError(f"--flags are given for {name}, which is not measured.")
    return [
        _llama(gguf, flags.get(name, ()), fields, context_tokens)
        if name == LLAMA
        else Contender(
            name,
            launch=Launch.of(name, model, flags.get(name, ())),
            version=version({OURS: "mlx-hybridcache", THEIRS: "mlx-lm"}[name]),
            model=describe(model),
            fields=dict(fields),
            api_key=os.environ.get(KEY_VARIABLES.get(name, "")),
        )
        for name in dict.fromkeys(names)
    ]


def _llama(
    gguf: Path | None, flags: Sequence[str], fields: Mapping[str, Any], context_tokens: int
) -> Contender:
    """llama.cpp's server by the flags that its own documentation names."""
    if gguf is None:
        raise ServerError(
            f"{LLAMA} reads its model from a GGUF file: give the same model in that form, --gguf FILE."
        )
    if not gguf.is_file():
        raise ServerError(f"There is no file {gguf} for --gguf.")
    program = shutil.which(LLAMA)
    if program is None:
        missing = f"there is no {LLAMA} on the PATH (brew install llama.cpp brings one)"
        return Contender(LLAMA, missing=missing, model=describe_gguf(gguf))
    # All its slots share one context by default; 0 would take the model's own, which may not fit.
    given = ("--model", str(gguf), "--host", "127.0.0.1", "--ctx-size", str(context_tokens))
    return Contender(
        LLAMA,
        launch=Launch(LLAMA, (*given, *flags), program),
        version=_version_of(program),
        model=describe_gguf(gguf),
        fields=dict(fields),
        api_key=os.environ.get(KEY_VARIABLES[LLAMA]),
    )


def flags_of(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`NAME=--flag value ...` by name. Raises `ServerError` for one without a name."""
    found: dict[str, tuple[str, ...]] = {}
    for each in given:
        name, equals, flags = each.partition("=")
        if not equals or name.startswith("-"):
            raise ServerError(f"{each!r} does not say whose flags they are: NAME=--flag value ...")
        found[name] = (*found.get(name, ()), *shlex.split(flags))
    return found


def _version_of(program: str) -> str:
    """What `--version` says; llama-server says it on stderr."""
    try:
        said = subprocess.run(
            [program, "--version"],
            capture_output=True,
            text=True,
            timeout=VERSION_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = [*said.stdout.splitlines(), *said.stderr.splitlines()]
    return next((line.removeprefix("version: ") for line in lines if "version" in line), "")


def _without_folder(argument: str) -> str:
    flag, equals, value = (
        argument.partition("=") if argument.startswith("-") else ("", "", argument)
    )
    return f"{flag}{equals}{Path(value).name}" if Path(value).is_absolute() else argument
