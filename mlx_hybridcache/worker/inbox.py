"""What a thread is asked to do, in order, until it ends. Whatever was asked is done or refused."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..errors import ClosedError, HybridCacheError

T = TypeVar("T")


def _nothing() -> None:
    """Nobody waits to hear that it was refused."""


@dataclass(frozen=True, eq=False, slots=True)
class Asked(Generic[T]):
    """What is to be done, or else said by the thread that closes the inbox."""

    do: Callable[[T], None]
    refuse: Callable[[], None] = _nothing


class Inbox(Generic[T]):
    """Any thread puts in; one takes out, and closes it at its end.

    Whoever puts something in looks afterwards whether it is closed, and whoever closes it looks
    afterwards what is in it, so one of the two sees what came at that very moment. There is no lock:
    finalizers put in, and the garbage collector may run them anywhere, also in the middle of `put`.
    """

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[Asked[T]] = queue.SimpleQueue()
        self._is_closed = False
        self._reader: threading.Thread | None = None
        self._process = os.getpid()

    def put(self, asked: Asked[T]) -> bool:
        """Whether it will be done or refused. If not, it may have been, or nobody looks at it."""
        self._asked.put(asked)
        return not self._is_closed

    def open(self) -> None:
        """From here on the calling thread is the one that takes out."""
        self._reader = threading.current_thread()  # not its number: the system gives that out again

    def get(self, *, block: bool, timeout: float) -> Asked[T]:
        """The next; raises `queue.Empty`."""
        return self._asked.get(block, timeout)

    def close(self) -> None:
        """Refuse what is in it, and what comes."""
        self._is_closed = True
        with suppress(queue.Empty):
            while True:
                self._asked.get_nowait().refuse()

    @property
    def is_read_here(self) -> bool:
        """Whether the calling thread is the one that takes out."""
        return threading.current_thread() is self._reader

    def check_has_reader(self) -> None:
        """Raises `ClosedError` in a fork of the process, to which no other thread came along."""
        if os.getpid() != self._process:
            raise ClosedError(
                f"This cache is of process {self._process}, and process {os.getpid()} is a fork of that, in which its "
                "thread does not run, and MLX does not compute. Start processes with multiprocessing's method spawn, "
                "and make a HybridPromptCache in each that needs one."
            )

    def check_may_wait(self) -> None:
        """Raises where it would be in vain: `ClosedError` in a fork, and `HybridCacheError` on the thread that
        takes out, which would wait for itself.
        """
        self.check_has_reader()
        if self.is_read_here:
            raise HybridCacheError(
                "A callback that runs on the worker thread waits for what only that thread can do. "
                "Do it on another thread, or after the callback."
            )
