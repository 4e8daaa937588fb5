"""How busy other programs keep the machine while servers are measured: no time means anything without it."""

from __future__ import annotations

import statistics
import threading
from types import TracebackType
from typing import Any, Self

import psutil

POLL_SECONDS = 1.0

BUSY = 0.15
"""Of all cores: when others take more, times are too long and differ from run to run."""


class LoadWatch:
    """Looks every second at what processors do that neither this process nor one it started does."""

    def __init__(self) -> None:
        self._cores: list[float] = []
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

    def found(self) -> dict[str, Any]:
        """Cores that others kept busy, median and most; empty where nothing was seen."""
        if not self._cores:
            return {}
        return {
            "cores": psutil.cpu_count() or 1,
            "others_median": round(statistics.median(self._cores), 2),
            "others_most": round(max(self._cores), 2),
        }

    def _watch(self) -> None:
        busy, own = _busy(), _own()
        idle = psutil.cpu_times().idle
        while not self._ended.wait(POLL_SECONDS):
            now_busy, now_own, now_idle = _busy(), _own(), psutil.cpu_times().idle
            mine = sum(now_own[pid] - own.get(pid, 0.0) for pid in now_own)
            whole = (now_busy - busy) + (now_idle - idle)
            if whole > 0 and own.keys() <= now_own.keys():  # of one that ended nothing is known
                share = max(0.0, now_busy - busy - mine) / whole
                self._cores.append(share * (psutil.cpu_count() or 1))
            busy, own, idle = now_busy, now_own, now_idle


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
