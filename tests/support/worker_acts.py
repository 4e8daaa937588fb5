"""What threads do to one worker with a reply under way, and whether they come back from it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mlx_hybridcache.errors import ClosedError
from mlx_hybridcache.worker.stream import AHEAD, Stream
from mlx_hybridcache.worker.worker import Worker

PATIENCE_SECONDS = 30
"""Nothing here takes a second; who waits so long waits for ever."""

ITEMS = 3 * AHEAD

Outcome = tuple[str, Any]


class Setting:
    """A worker with a reply under way, of which one item was read."""

    def __init__(self) -> None:
        self.worker = Worker()
        self.stream: Stream[int] = self.worker.stream(iter(range(ITEMS)))
        next(self.stream)


def call(on: Setting) -> Any:
    """Ask it for something."""
    return on.worker.call(lambda: "done")


def start(on: Setting) -> Any:
    """Another reply, read to its end."""
    return list(on.worker.stream(iter([1, 2])))


def read(on: Setting) -> Any:
    """The reply, to its end."""
    return list(on.stream)


def read_on_a_loop(on: Setting) -> Any:
    """The same on an event loop."""

    async def reading() -> list[int]:
        return [item async for item in on.stream]

    return asyncio.run(reading())


def close_the_stream(on: Setting) -> Any:
    """And nothing comes any more."""
    on.stream.close()
    assert list(on.stream) == []


def cancel(on: Setting) -> Any:
    """Ask the reply to end."""
    on.stream.cancel()


def drop(on: Setting) -> Any:
    """Another reply, of which nobody hears any more."""
    stream = on.worker.stream(iter(range(ITEMS)))
    next(stream, None)
    del stream


def close(on: Setting) -> Any:
    """The worker itself."""
    on.worker.close()
    assert not on.worker.is_alive


ACTS = [call, start, read, read_on_a_loop, close_the_stream, cancel, drop, close]


def outcome(act: Callable[[Setting], Any], on: Setting) -> Outcome:
    """The result of `act`, its end or its error."""
    try:
        return "result", act(on)
    except ClosedError as error:
        return "closed", error
    except BaseException as error:
        return "failed", error


def begun(work: Callable[[], object]) -> threading.Thread:
    """A thread that does it, or hears that the worker was closed before."""

    def do() -> None:
        with suppress(ClosedError):
            work()

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    return thread


def ends(thread: threading.Thread, what: object) -> None:
    """Wait for it, but not for ever."""
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive(), f"{what} waits for ever"
