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

from ..errors import ClosedError
from .inbox import Asked, Inbox
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
        """Something to read: for one of its readers, but all look."""
        self.outbox.put((kind, value))
        while self.wakers:
            with suppress(KeyError):  # the last one has just gone
                self.wakers.pop()()


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
            task.parked = not task.job.left and task.is_ahead
            if task.parked and not task.is_ahead:
                task.parked = False  # its reader took one while the flag was being set
        return [task for task in self.tasks if not task.parked and not task.job.asleep]

    def run(self, inbox: _Inbox, held: Callable[[], AbstractContextManager[Any]]) -> None:
        """The thread's life. However it ends, whoever waits for it hears of that."""
        inbox.open()
        try:
            with held():
                self._work(inbox)
        finally:
            inbox.close()

    def _work(self, inbox: _Inbox) -> None:
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
            asked.do(self)
            del asked  # a worker that waits holds nothing of what it did
            self._settle()  # before waiting again: it may have ended the last request


_Inbox = Inbox[_Turns]


class Stream(Generic[T]):
    """A request's items, in order, for any threads and event loops.

    Each item goes to one reader, and the end to all; an error to one. Closing or dropping it cancels
    the request.
    """

    def __init__(self, task: _Task, inbox: _Inbox):
        self._task = task
        self._inbox = inbox
        cancel: Asked[_Turns] = Asked(lambda turns: task.cancel())
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
        for _ in self:
            pass


class Worker:
    """Runs calls and requests on its own thread until it is closed or dropped."""

    def __init__(
        self,
        held: Callable[[], AbstractContextManager[Any]] = nullcontext,
        name: str = "mlx",
        load: Load | None = None,
        between: Callable[[], None] = lambda: None,
    ):
        self._inbox = _Inbox()
        turns = _Turns(load or Load(), between)
        # The thread must not keep this object alive, so it gets the inbox only.
        self._thread = threading.Thread(
            target=turns.run, args=(self._inbox, held), name=name, daemon=True
        )
        self._thread.start()
        self._stop = weakref.finalize(self, _stop, self._inbox, self._thread)

    @property
    def is_alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run `function` between two turns and wait for what it returns or raises.

        Raises `ClosedError` when it came too late to be run.
        """
        if self._inbox.is_read_here:
            return function(*args, **kwargs)
        future: Future[T] = Future()

        def run(turns: _Turns) -> None:
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        came = self._inbox.put(Asked(run, lambda: future.set_exception(closed())))
        if not came and not future.done():
            raise closed()
        return future.result()

    def post(self, function: Callable[[], None]) -> None:
        """Run `function` between two turns, without waiting. After the end it is never run."""
        self._inbox.put(Asked(lambda turns: function()))

    def stream(self, steps: Iterator[T | Pause], job: Job | None = None) -> Stream[T]:
        """Give a request its turns; its items come out of the returned stream.

        `ClosedError` is raised here, or by the stream, when it came too late to have a turn.
        """
        task = _Task(steps, job or Job())
        stream: Stream[T] = Stream(task, self._inbox)  # first, as it cancels what nobody reads
        start: Asked[_Turns] = Asked(
            lambda turns: turns.tasks.append(task), lambda: task.fail(closed())
        )
        if not self._inbox.put(start) and not task.finished:
            raise closed()
        return stream

    def check_may_wait(self) -> None:
        """Raises `HybridCacheError` on the worker thread itself, where nothing would come of it."""
        self._inbox.check_may_wait()

    def close(self) -> None:
        """End the requests under way, then the thread. Returns when it has ended, whoever closes."""
        self._stop()
        if not self._inbox.is_read_here:
            self._thread.join()


def closed() -> ClosedError:
    """What everyone hears who asks for something too late."""
    return ClosedError("This cache was closed; make a new HybridPromptCache.")


def _stop(inbox: _Inbox, thread: threading.Thread) -> None:
    def stop(turns: _Turns) -> None:
        turns.stopped = True

    inbox.put(Asked(stop))
    if threading.current_thread() is not thread:
        thread.join()
