"""The one thread that calls MLX: a queue of calls, and turns for the requests under way.

A lazy MLX array can only be evaluated on the thread that made it, so every MLX call of the library
runs here, whichever thread asked. Requests are generators of steps. In each round every request that
writes gets one token and one of those that read gets one slice (`turns`), so that between two tokens
of a reply at most one slice is read. A client that stops taking parks its request and blocks nobody.
"""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, TypeVar

from ..errors import ClosedError
from .inbox import Asked, Inbox
from .stream import Stream, Task
from .turns import Job, Load, Pause, next_reader

log = logging.getLogger("mlx_hybridcache")

T = TypeVar("T")

ABANDONED_SECONDS = 1.0
"""Whoever waits for the thread's end looks so often whether anybody still should."""

IDLE_SECONDS = 5.0
"""A worker without work looks after itself so often."""


class _Turns:
    """The worker thread's own state."""

    def __init__(self, load: Load, between: Callable[[], None]) -> None:
        self.between = between
        self.tasks: list[Task] = []
        self.load = load
        self.stopped = False
        self.abandoned = False

    def ready(self) -> list[Task]:
        """Requests that can go on, oldest first. A prompt is read whether its client listens or not."""
        for task in self.tasks:
            task.parked = not task.job.left and task.is_ahead
            if task.parked and not task.is_ahead:
                task.parked = False  # its reader took one while the flag was being set
        found = [task for task in self.tasks if not task.parked and not task.job.asleep]
        sleep = any(task.job.asleep for task in self.tasks)
        # Who only waits need not ask again and again: whom they wait for is among those who sleep.
        return [] if sleep and all(task.job.waits for task in found) else found

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
        for task in self.tasks:  # what is cut short must not look complete
            task.fail(closed())

    def _round(self, ready: list[Task]) -> None:
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

    def _count(self, tasks: list[Task]) -> None:
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
        self._refusal: Exception | None = None
        self._asked: set[Future[Any]] = set()
        self._turns = turns = _Turns(load or Load(), between)
        # The thread must not keep this object alive, so it gets the inbox only.
        self._thread = threading.Thread(
            target=turns.run, args=(self._inbox, held), name=name, daemon=True
        )
        self._thread.start()
        self._stop = weakref.finalize(self, _stop, self._inbox, self._thread, turns)

    @property
    def is_alive(self) -> bool:
        """Whether the thread still runs, and does what it is asked."""
        return self._refusal is None and self._thread.is_alive()

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run `function` between two turns and wait for what it returns or raises.

        Raises `ClosedError` when it came too late to be run, and in a fork of the process.
        """
        self._inbox.check_has_reader()
        if self._inbox.is_read_here:
            return function(*args, **kwargs)
        self._check_serves()
        future: Future[T] = Future()

        def run(turns: _Turns) -> None:
            with suppress(InvalidStateError):  # it was abandoned meanwhile
                try:
                    future.set_result(function(*args, **kwargs))
                except BaseException as error:
                    future.set_exception(error)

        self._asked.add(future)
        try:
            came = self._inbox.put(Asked(run, lambda: _refused(future, self._closed())))
            if not came and not future.done():
                raise self._closed()
            return future.result()
        finally:
            self._asked.discard(future)

    def post(self, function: Callable[[], None]) -> None:
        """Run `function` between two turns, without waiting. After the end it is never run."""
        self._inbox.put(Asked(lambda turns: function()))

    def stream(self, steps: Iterator[T | Pause], job: Job | None = None) -> Stream[T]:
        """Give a request its turns; its items come out of the returned stream.

        `ClosedError` is raised here, or by the stream, when it came too late to have a turn; here in a fork.
        """
        self._inbox.check_has_reader()
        self._check_serves()
        task = Task(steps, job or Job())
        stream: Stream[T] = Stream(task, self._inbox)  # first, as it cancels what nobody reads
        start: Asked[_Turns] = Asked(
            lambda turns: turns.tasks.append(task), lambda: task.fail(self._closed())
        )
        if not self._inbox.put(start) and not task.finished:
            raise self._closed()
        return stream

    def refuse(self, error: Exception) -> None:
        """From now on whoever asks for something hears `error`; what is posted is done."""
        self._refusal = self._refusal or error

    def abandon(self, error: Exception) -> None:
        """The thread may wait in a call that never returns: all who wait for it hear `error`, on whatever thread
        this is called, and nobody waits for its end.
        """
        self._refusal = error
        self._turns.abandoned = self._turns.stopped = True
        self._stop.detach()
        self._inbox.close()
        for future in [*self._asked]:
            _refused(future, error)
        for task in [*self._turns.tasks]:
            if not task.finished:
                task.put("error", error)

    def _check_serves(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    def _closed(self) -> Exception:
        return self._refusal or closed()

    def check_may_wait(self) -> None:
        """Raises `HybridCacheError` on the worker thread itself or in a fork, where nothing would come of it."""
        self._inbox.check_may_wait()

    def close(self) -> None:
        """End the requests under way, then the thread. Returns when it has ended, whoever closes."""
        self._stop()
        if not self._inbox.is_read_here:
            _join(self._thread, self._turns)


def closed() -> ClosedError:
    """What everyone hears who asks for something too late."""
    return ClosedError("This cache was closed; make a new HybridPromptCache.")


def _refused(future: Future[Any], error: Exception) -> None:
    with suppress(InvalidStateError):  # it was done in the same moment
        future.set_exception(error)


def _stop(inbox: _Inbox, thread: threading.Thread, turns: _Turns) -> None:
    def stop(turns: _Turns) -> None:
        turns.stopped = True

    inbox.put(Asked(stop))
    if threading.current_thread() is not thread:
        _join(thread, turns)


def _join(thread: threading.Thread, turns: _Turns) -> None:
    """Wait for the thread's end, unless it is abandoned, now or later."""
    while thread.is_alive() and not turns.abandoned:
        thread.join(ABANDONED_SECONDS)
