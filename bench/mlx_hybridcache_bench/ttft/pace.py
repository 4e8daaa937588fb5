"""How long a run will take, said before it is measured, and kept: repeats are left out rather than patience."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

OVERTIME = 1.1
"""Of the time that was promised."""

REQUEST_SECONDS = 0.2
"""Between two requests, and what a longer reply takes."""


@dataclass(slots=True)
class Pace:
    """Whether there is time for another run of everything. One answer for all servers, so that they compare.

    Until `promise` was called there is. `left_out` counts the runs for which there was none.
    """

    clock: Callable[[], float] = time.monotonic
    seconds: float | None = None
    left_out: int = 0
    _began: float = 0.0
    _asked: dict[int, bool] = field(default_factory=dict)

    def promise(self, seconds: float) -> None:
        """From now on it will take so long."""
        self.seconds, self._began = seconds, self.clock()

    def goes_on(self, run: int) -> bool:
        """Whether run number `run` begins: the first always, another if it ends in time as those before."""
        if run not in self._asked:
            self._asked[run] = self._has_time(run)
            self.left_out += not self._asked[run]
        return self._asked[run]

    def _has_time(self, run: int) -> bool:
        if run == 0 or self.seconds is None:
            return True
        if not self._asked.get(run - 1, True):
            return False
        spent = self.clock() - self._began
        return spent * (run + 1) / run <= OVERTIME * self.seconds


def duration_text(seconds: float) -> str:
    """`40 s`, `7 min`, `2 h 10 min`: rounded up."""
    if seconds < 90:
        return f"{10 * max(1, -(-int(seconds) // 10))} s"
    minutes = -(-int(seconds) // 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
