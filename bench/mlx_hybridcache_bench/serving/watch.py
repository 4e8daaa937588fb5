"""What is watched while servers are measured: how busy other programs are, and how much memory a server takes."""

from __future__ import annotations

import statistics
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import psutil

from .servers import ServerProcess

LOAD_SECONDS, MEMORY_SECONDS = 1.0, 0.25

BUSY = 0.15
"""Of all cores: when others take more, times are too long and differ from run to run."""


class Watch(ABC):
    """Looks at something every `seconds` in a thread of its own until the `with` block ends."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
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

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            self._look()

    @abstractmethod
    def _look(self) -> None: ...


class LoadWatch(Watch):
    """Looks every second at what processors do that neither this process nor one it started does."""

    def __init__(self) -> None:
        super().__init__(LOAD_SECONDS)
        self._cores: list[float] = []
        self._before = _busy(), _own(), psutil.cpu_times().idle

    def found(self) -> dict[str, Any]:
        """Cores that others kept busy, median and most; empty where nothing was seen."""
        if not self._cores:
            return {}
        return {
            "cores": psutil.cpu_count() or 1,
            "others_median": round(statistics.median(self._cores), 2),
            "others_most": round(max(self._cores), 2),
        }

    def _look(self) -> None:
        busy, own, idle = self._before
        now_busy, now_own, now_idle = self._before = _busy(), _own(), psutil.cpu_times().idle
        mine = sum(now_own[pid] - own.get(pid, 0.0) for pid in now_own)
        whole = (now_busy - busy) + (now_idle - idle)
        if whole > 0 and own.keys() <= now_own.keys():  # of one that ended nothing is known
            share = max(0.0, now_busy - busy - mine) / whole
            self._cores.append(share * (psutil.cpu_count() or 1))


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: of the process when warm and at its peak, and what the system lost at most."""

    warm_bytes: int
    peak_bytes: int
    system_bytes: int


class MemoryWatch(Watch):
    """Looks four times a second, from before the start of a server on.

    The process's resident bytes do not count all that Metal has wired for it; so what the whole
    system lost since before the start stands beside them.
    """

    def __init__(self, process: ServerProcess) -> None:
        super().__init__(MEMORY_SECONDS)
        self._process = process
        self._before = psutil.virtual_memory().available
        self._least = self._before
        self._peak = self._warm = 0

    def mark_warm(self) -> None:
        """The server is loaded and warm, and nothing was measured yet."""
        self._warm = self._resident()

    def found(self) -> Memory:
        """What was seen so far."""
        return Memory(self._warm, max(self._peak, self._warm), max(0, self._before - self._least))

    def _look(self) -> None:
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


def sentence(load: dict[str, Any]) -> str:
    """What a reader of the figures should know of it."""
    cores, median, most = (load[name] for name in ("cores", "others_median", "others_most"))
    said = (
        f"While it was measured, other programs kept {median:.1f} of {cores} cores busy "
        f"(median; at most {most:.1f})"
    )
    if median > BUSY * cores:
        return (
            f"{said}: times are too long and differ from run to run. Counts do not depend on that."
        )
    return f"{said}."


def _busy() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


def _own() -> dict[int, float]:
    """Seconds of each process that belongs to the measurement."""
    found = {}
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:  # it ended in between
            continue
        found[process.pid] = float(times.user + times.system)
    return found
