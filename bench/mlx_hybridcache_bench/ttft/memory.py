"""How much memory a server takes, watched from outside while it works."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import psutil

from ..report.results import Memory
from ..serving.servers import ServerProcess

POLL_SECONDS = 0.25


class MemoryWatch:
    """Looks four times a second, from before the start of a server until the `with` block ends.

    The process's resident bytes do not count all that Metal has wired for it; so what the whole
    system lost since before the start stands beside them.
    """

    def __init__(self, process: ServerProcess) -> None:
        self._process = process
        self._before = psutil.virtual_memory().available
        self._least = self._before
        self._peak = self._warm = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def mark_warm(self) -> None:
        """The server is loaded and warm, and nothing was measured yet."""
        self._warm = self._resident()

    def found(self) -> Memory:
        """What was seen so far."""
        return Memory(self._warm, max(self._peak, self._warm), max(0, self._before - self._least))

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self._peak = max(self._peak, self._resident())
            self._least = min(self._least, psutil.virtual_memory().available)

    def _resident(self) -> int:
        pid = self._process.pid
        if pid is None:
            return 0
        try:
            return int(psutil.Process(pid).memory_info().rss)
        except psutil.Error:  # it died in between
            return 0
