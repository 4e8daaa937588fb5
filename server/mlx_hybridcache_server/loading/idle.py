"""How long something stays that nobody uses."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable
from typing import Any

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_TIMES = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h))+")
_TIME = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")

MOST_LETTERS = 64
"""Of a time that is written. This is read on the event loop."""

LONGEST_SECONDS = 10 * 365 * 24 * 3600.0
"""Beyond it a model stays, as for ever."""


def seconds_of(keep_alive: Any) -> float | None:
    """How long a model stays behind a request, as ollama writes it: seconds, or `5m`, `1h30m`.

    None is for ever, which anything negative says. Raises `ValueError` for what is no time.
    """
    if isinstance(keep_alive, str) and len(keep_alive) > MOST_LETTERS:
        raise ValueError(f"{len(keep_alive):,} letters are no time")
    text = keep_alive.strip() if isinstance(keep_alive, str) else ""
    is_negative, text = text.startswith("-"), text.removeprefix("-")
    if text and _TIMES.fullmatch(text):
        seconds = sum(float(count) * _UNITS[unit] for count, unit in _TIME.findall(text))
    elif isinstance(keep_alive, bool) or not isinstance(keep_alive, int | float | str):
        raise ValueError(f"{keep_alive!r} is no time")
    else:
        seconds = _number(text or keep_alive)
    is_endless = is_negative or seconds < 0 or not seconds <= LONGEST_SECONDS
    return None if is_endless else seconds


def _number(said: float | str) -> float:
    try:
        return float(said)
    except OverflowError:  # an integer beyond all of them
        return math.inf


class Idle:
    """Calls `ended` when nobody has used something for as long as its last user said. On one event loop."""

    def __init__(self, seconds: float | None, ended: Callable[[], None]):
        self.seconds = seconds
        """None is for ever."""
        self.is_over = False
        """Whether it has been called, and nobody has come since."""
        self._ended = ended
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Nobody uses it from now on."""
        self.end()
        if self.seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(self.seconds, self._over)

    def end(self) -> None:
        """Somebody uses it, or waits for it."""
        self.is_over = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _over(self) -> None:
        self.is_over = True
        self._ended()
