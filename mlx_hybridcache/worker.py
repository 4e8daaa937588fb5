"""The one thread that calls MLX: a queue of calls, and turns for the requests under way.

A lazy MLX array can only be evaluated on the thread that made it, so every MLX call of the library
runs here, whichever thread asked. Requests are generators of steps. In each round every request that
writes gets one token and one of those that read gets one slice (`turns`), so that between two tokens
of a reply at most one slice is read. A client that stops taking parks its request and blocks nobody.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .errors import ClosedError
from .turns import next_reader

log = logging.getLogger("mlx_hybridcache")

T = TypeVar("T")

IDLE_SECONDS = 5.0
"""A worker without work looks after itself so often."""

AHEAD = 16
"""Items a request may have waiting for its reader before it is parked."""


class Pause:
    """A step that gives its reader nothing."""


PAUSE = Pause()
"""What a request yields to give up its turn without delivering anything."""


@dataclass(eq=False, slots=True)
class Job:
    """What the worker must know of a request to give it its turn. Written on the worker thread.

    `left` are the tokens to read until somebody gets a first token of it, 0 once it writes;
    `waits` while another one reads what this one needs, `asleep` until something outside the worker
    wakes it: it gets no turns.
    """

    left: int = 0
    waits: bool = False
    asleep: bool = False
    passed_over: int = 0


@dataclass(slots=True)
class Load:
    """How busy the worker is, in requests. Written on the worker thread, read on any."""

    reading: int = 0
    waiting: int = 0
    writing: int = 0

    @property
    def is_shared(self) -> bool:
        """Whether a request that has its turn keeps another one waiting."""
        return self.reading + self.waiting + self.writing > 1


class _Task:
    """One request under way. The worker writes `sent` and `parked`, its reader `taken`."""

    def __init__(self, steps: Iterator[Any], job: Job):
        self.steps = steps
        self.job = job
        self.outbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.sent = 0
        self.taken = 0
        self.parked = False
        self.finished = False
        self.wake: Callable[[], None] = lambda: None

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
                self.sent += 1
                self.outbox.put(("item", item))
                self.wake()

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
        self.outbox.put((kind, value))
        self.wake()


_Inbox = queue.SimpleQueue[Callable[["_Turns"], None]]


class _Turns:
    """The worker thread's own state."""

    def __init__(self, load: Load, between: Callable[[], None]) -> None:
        self.between = between
        self.tasks: list[_Task] = []
        self.load = load
        self.stopped = False

    def ready(self) -> list[_Task]:
        """Requests that can go on, oldest first. A prompt is read whether its client listens or not."""
        for task in self.tasks:
            task.parked = not task.job.left and task.sent - task.taken >= AHEAD
            if task.parked and task.sent - task.taken < AHEAD:
                task.parked = False  # its reader took one while the flag was being set
        return [task for task in self.tasks if not task.parked and not task.job.asleep]

    def run(self, inbox: _Inbox, held: AbstractContextManager[Any]) -> None:
        with held:
            while not self.stopped:
                try:
                    self._drain(inbox)
                    self._round(self.ready())
                    self.between()
                except BaseException as error:  # requests end with their own errors; this is ours
                    log.exception("The worker failed; the requests under way end.")
                    for task in self.tasks:
                        task.fail(error)
                self._settle()
            for task in self.tasks:
                task.cancel()

    def _round(self, ready: list[_Task]) -> None:
        """A token for each that writes, a slice for one that reads."""
        self._count(ready)
        for task in ready:
            if not self.stopped and (task.job.waits or not task.job.left):
                task.advance()
        readers = [task for task in ready if task.job.left and not task.job.waits]
        if readers and not self.stopped:
            chosen = readers[
                next_reader(
                    [task.job.left for task in readers], [task.job.passed_over for task in readers]
                )
            ]
            chosen.advance()
            for task in readers:
                task.job.passed_over += task is not chosen

    def _settle(self) -> None:
        self.tasks = [task for task in self.tasks if not task.finished]
        self._count(self.tasks)

    def _count(self, tasks: list[_Task]) -> None:
        load = self.load
        load.waiting = sum(task.job.waits for task in tasks)
        load.writing = sum(not task.job.left for task in tasks)
        load.reading = len(tasks) - load.waiting - load.writing

    def _drain(self, inbox: _Inbox) -> None:
        """Do what was asked since the last turn; wait for it when no request can go on."""
        while not self.stopped:
            try:
                asked = inbox.get(block=not self.ready(), timeout=IDLE_SECONDS)
            except queue.Empty:
                return
            asked(self)
            self._settle()  # before waiting again: it may have ended the last request


class Stream(Generic[T]):
    """A request's items, in order, for any thread or event loop.

    Closing or dropping it cancels the request.
    """

    def __init__(self, task: _Task, inbox: _Inbox):
        self._task = task
        self._inbox = inbox
        self._over = False
        self._cancel = weakref.finalize(self, inbox.put, lambda turns: task.cancel())
        self._cancel.atexit = False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._over:
            raise StopIteration
        return self._take(*self._task.outbox.get(), StopIteration)

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        if self._over:
            raise StopAsyncIteration
        while self._task.outbox.empty():
            await self._woken()
        return self._take(*self._task.outbox.get(), StopAsyncIteration)

    async def _woken(self) -> None:
        """Wait for the worker to put something into the outbox, without holding a thread."""
        loop = asyncio.get_running_loop()
        came = asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(came.set)

        self._task.wake = wake
        if self._task.outbox.empty():  # else it came before the worker could know whom to wake
            await came.wait()

    def _take(self, kind: str, value: Any, end: type[Exception]) -> T:
        if kind == "item":
            self._task.taken += 1
            if self._task.parked:
                self._inbox.put(lambda turns: None)
            return value  # type: ignore[no-any-return]
        self._over = True
        self._cancel.detach()
        if kind == "error":
            raise value
        raise end

    def cancel(self) -> None:
        """Ask the worker to stop here, without waiting. What is under way may still come out."""
        self._cancel()

    def close(self) -> None:
        """Cancel, and wait until the request has left behind what it is going to leave."""
        if not self._over:
            self._cancel()
            while not self._over:
                try:
                    next(self)
                except StopIteration:
                    break


class Worker:
    """Runs calls and requests on its own thread until it is closed or dropped."""

    def __init__(
        self,
        held: Callable[[], AbstractContextManager[Any]] = nullcontext,
        name: str = "mlx",
        load: Load | None = None,
        between: Callable[[], None] = lambda: None,
    ):
        self._inbox: _Inbox = queue.SimpleQueue()
        turns = _Turns(load or Load(), between)
        # The thread must not keep this object alive, so it gets the inbox only.
        self._thread = threading.Thread(
            target=lambda inbox: turns.run(inbox, held()),
            args=(self._inbox,),
            name=name,
            daemon=True,
        )
        self._thread.start()
        self._stop = weakref.finalize(self, _stop, self._inbox, self._thread)

    @property
    def is_alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run `function` between two turns and wait for what it returns or raises."""
        if threading.current_thread() is self._thread:
            return function(*args, **kwargs)
        if not self._stop.alive:
            raise ClosedError("This cache was closed; make a new HybridPromptCache.")
        future: Future[T] = Future()

        def run(turns: _Turns) -> None:
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._inbox.put(run)
        return future.result()

    def post(self, function: Callable[[], None]) -> None:
        """Run `function` between two turns, without waiting. After the end it is never run."""
        self._inbox.put(lambda turns: function())

    def stream(self, steps: Iterator[T | Pause], job: Job | None = None) -> Stream[T]:
        """Give a request its turns; its items come out of the returned stream."""
        if not self._stop.alive:
            raise ClosedError("This cache was closed; make a new HybridPromptCache.")
        task = _Task(steps, job or Job())
        self._inbox.put(lambda turns: turns.tasks.append(task))
        return Stream(task, self._inbox)

    def close(self) -> None:
        """End the requests under way, then the thread."""
        self._stop()


def _stop(inbox: _Inbox, thread: threading.Thread) -> None:
    def stop(turns: _Turns) -> None:
        turns.stopped = True

    inbox.put(stop)
    if threading.current_thread() is not thread:
        thread.join()
