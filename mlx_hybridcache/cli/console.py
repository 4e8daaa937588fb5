"""What the commands show: the terminal, a bar of bytes, counts and ages in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def wide_console(width: int = 110) -> Console:
    """The terminal, or `width` columns for whoever reads it where there is none."""
    from rich.console import Console  # a fifth of a short command's time, and programs read JSON

    console = Console()
    return console if console.is_terminal else Console(width=width)


def count(number: int, what: str) -> str:
    """`1 file`, `1,200 files`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def age(seconds: int) -> str:
    """`45 s`, `3 min`, `7 h`, `12 d`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


class Bar:
    """Bytes done of bytes expected."""

    def __init__(self, progress: Progress, what: str):
        self._progress = progress
        self._task = progress.add_task(what, total=None)

    def expect(self, nbytes: int) -> None:
        """Say how many there will be."""
        self._progress.update(self._task, total=nbytes)

    def advance(self, nbytes: int) -> None:
        """So many more are done."""
        self._progress.advance(self._task, nbytes)


@contextmanager
def bytes_bar(what: str) -> Iterator[Bar]:
    """A bar on the terminal; nothing where there is none."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield Bar(progress, what)
