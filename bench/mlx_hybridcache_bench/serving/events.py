"""The lines of a server-sent stream: its events' data, and the comments between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

DONE = "[DONE]"
NO_JSON = "sends events that are not JSON"


def quiet() -> None:
    """What to do about a comment when nobody wants to know."""


def events(
    chunks: Iterable[bytes], on_comment: Callable[[], object] = quiet
) -> Iterator[str | None]:
    """The data of each event as soon as it is whole, and None for each comment.

    httpx2's own reader passes comments over in silence, but they are how servers tell of
    progress, and a reader with a deadline has to be heard in between. Fields other than `data`
    do not matter here.
    """
    data: list[str] = []
    for line in _lines(chunks):
        if line.startswith(":"):
            on_comment()
            yield None
        elif line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []
    if data:
        yield "\n".join(data)


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Lines that end in LF or CR LF. Other separators of Unicode may be part of a token."""
    pending = b""
    for chunk in chunks:
        *whole, pending = (pending + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode("utf-8", "replace")
    if pending:
        yield pending.removesuffix(b"\r").decode("utf-8", "replace")
