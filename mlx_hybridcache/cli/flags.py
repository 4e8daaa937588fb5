"""Flags of every command: lengths and sizes as people write them, and what is said of what is neither.

`argparse` puts a flag's name before what these raise.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from ..errors import SettingError, refusal
from ..sizes import parse_bytes, parse_tokens

UNKNOWN = "unrecognized arguments: "
"""What `argparse` says of flags that a command does not have."""


class Parser(ArgumentParser):
    """`argparse`'s, which says too what a flag that it does not know was probably meant to be."""

    def error(self, message: str) -> NoReturn:
        """End the process with status 2 and `message`."""
        given = message.removeprefix(UNKNOWN).split() if message.startswith(UNKNOWN) else []
        words = (word.partition("=")[0] for word in given if word.startswith("-"))
        meant = [get_close_matches(word, self.options(), n=1) for word in words]
        if likely := [found for each in meant for found in each]:
            message += f" (did you mean {', '.join(likely)}?)"
        super().error(message)

    def options(self) -> list[str]:
        """Its own, and those of its commands, whose unknown flags it is asked about."""
        chosen = [each.choices for each in self._actions if isinstance(each.choices, dict)]
        commands = [each for choices in chosen for each in choices.values()]
        own = [name for each in self._actions for name in each.option_strings]
        return own + [name for each in commands for name in each.options()]


def tokens(least: int = 1) -> Callable[[str], int]:
    """A length in tokens, `least` or more: 4096, 120k, 1.5M."""

    def length(text: str) -> int:
        try:
            found = parse_tokens(text)
        except SettingError as error:
            raise ArgumentTypeError(str(error)) from error
        if found < least:
            raise ArgumentTypeError(f"{text} is out of range: it must be at least {least}.")
        return found

    return length


def size(text: str) -> int:
    """Bytes: 4096, 16GB, 512MiB."""
    try:
        return parse_bytes(text)
    except SettingError as error:
        raise ArgumentTypeError(str(error)) from error


def add_store_flags(parser: ArgumentParser) -> None:
    """The flags of a smaller store."""
    parser.add_argument("--store-kv", type=int, choices=(8, 4), help="bits of stored rows")
    parser.add_argument("--store-state", choices=("int8",), help="stored recurrent states")


def add_quantizing_flags(parser: ArgumentParser, start: int | None, start_help: str) -> None:
    """The flags of quantized keys and values. Those who need no other start than the server's say its 5000."""
    add = parser.add_argument
    add("--kv-bits", type=int, help="quantize keys and values to so many bits, as the server's")
    add("--kv-group-size", type=int, default=64, help="as the server's (64)")
    add("--quantized-kv-start", type=tokens(0), default=start, help=start_help)


def read_text(flag: str, file: Path) -> str:
    """What stands in a text file that a flag names. Raises `SettingError` where there is none."""
    try:
        return file.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingError(f"{flag} {file} is no text in UTF-8: {error.reason}.") from error
    except OSError as error:
        raise SettingError(f"{flag} {refusal(error)}") from error


def check_can_be_written(flag: str, file: Path | None) -> None:
    """Raises `SettingError` where `file` cannot be one: to be known before an hour's work, not after it."""
    if file is None:
        return
    file = file.expanduser()
    if file.is_dir():
        raise SettingError(f"{flag} {file} is a directory; name a file.")
    if not file.parent.is_dir():
        raise SettingError(f"{flag} {file}: there is no directory {file.parent} to put it in.")
