"""One request under way, and the stream by which any thread or event loop reads its items."""

from __future__ import annotations

import asyncio
import queue
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any, Generic, TypeVar

from ..errors import ClosedError
from .inbox import Asked, Inbox
from .turns import PAUSE, Job

T = TypeVar("T")

AHEAD = 16
"""Items a request may have waiting for its reader before it is parked."""


class Task:
    """One request under way. Its end stays in the outbox, for every reader there is and will be.

    `wakers` wake readers on event loops; each is called once, and comes back to wait again.
    """

    def __init__(self, steps: Iterator[Any], job: Job):
        self.steps = steps
        self.job = job
        self.outbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.wakers: set[Callable[[], None]] = set()
        self.parked = False
        self.finished = False

    @property
    def is_ahead(self) -> bool:
        """Whether enough waits for its readers."""
        return self.outbox.qsize() >= AHEAD

    def advance(self) -> None:
        """One turn. What goes wrong in a request ends that request only."""
        try:
            item = next(self.steps)
        except StopIteration:
            self._finish("end", None)
        except BaseException as error:  # handed to the reader, who raises it
            self._finish("error", error)
        else:
            if item is not PAUSE:
                self.put("item", item)

    def cancel(self) -> None:
        """Stop where it stands; its own clean-up runs here, on the worker."""
        if not self.finished:
            close = getattr(self.steps, "close", None)
            try:
                if close is not None:
                    close()
            except BaseException as error:  # a clean-up that fails is the reader's to hear of
                self._finish("error", error)
            else:
                self._finish("end", None)

    def fail(self, error: BaseException) -> None:
        """End it with an error that is not its own."""
        if not self.finished:
            with suppress(BaseException):  # its clean-up; the error that ends it is told
                self.steps.close()  # type: ignore[attr-defined]
            self._finish("error", error)

    def _finish(self, kind: str, value: Any) -> None:
        self.finished = True
        self.steps = iter(())
        self.put(kind, value)

    def put(self, kind: str, value: Any = None) -> None:
        """Something to read: for one of its readers, but all look.

        Who comes to wait from now on looks before it waits. Were it called too, it would look in vain and come
        back, again and again, for as long as this thread takes to notice that nobody is left.
        """
        self.outbox.put((kind, value))
        for waker in [*self.wakers]:
            self.wakers.discard(waker)
            waker()


class Stream(Generic[T]):
    """A request's items, in order, for any threads and event loops.

    Each item goes to one reader, and the end to all; an error to one. Closing or dropping it cancels
    the request.
    """

    def __init__(self, task: Task, inbox: Inbox[Any]):
        self._task = task
        self._inbox = inbox
        cancel: Asked[Any] = Asked(lambda turns: task.cancel())
        self._cancel = weakref.finalize(self, inbox.put, cancel)
        self._cancel.atexit = False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._task.outbox.empty():
            self._inbox.check_may_wait()
        return self._take(*self._task.outbox.get(), StopIteration)

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        while True:
            try:
                found = self._task.outbox.get_nowait()
            except queue.Empty:
                await self._woken()
            else:
                return self._take(*found, StopAsyncIteration)

    async def _woken(self) -> None:
        """Wait for something to be put into the outbox, without holding a thread."""
        loop = asyncio.get_running_loop()
        came = asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(came.set)

        self._task.wakers.add(wake)
        try:
            if self._task.outbox.empty():  # else it came before anyone could know whom to wake
                self._inbox.check_may_wait()
                await came.wait()
        finally:
            self._task.wakers.discard(wake)

    def _take(self, kind: str, value: Any, end: type[Exception]) -> T:
        if kind == "item":
            if self._task.parked:
                self._inbox.put(Asked(lambda turns: None))
            return value  # type: ignore[no-any-return]
        self._task.put("end")  # for whoever else waits for it
        self._cancel.detach()
        if kind == "error":
            raise value
        raise end

    def cancel(self) -> None:
        """Ask the worker to stop here, without waiting. What is under way may still come out."""
        self._cancel()

    def close(self) -> None:
        """Cancel, and wait until the request has left behind what it is going to leave."""
        self._cancel()
        with suppress(ClosedError):  # the worker ended first, and with it the request
            for _ in self:
                pass
