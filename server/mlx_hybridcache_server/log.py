"""A log that says a thing once, however often a client makes it happen."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

AGAIN_SECONDS = 60

MOST_REMEMBERED = 256

CLIENTS = "mlx_hybridcache.server.clients"
"""The logger of what clients cause."""

LIMITED = ("uvicorn.error", "asyncio", CLIENTS)
"""The loggers that say a thing once: what clients cause here, in uvicorn, and where asyncio accepts connections."""


@dataclass(slots=True)
class _Said:
    at: float
    more: int = 0


class Once(logging.Filter):
    """Passes a warning or error once a minute, with how many were like it in between.

    Those are alike whose first line is, and whose exception comes from the same place.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[object, ...], _Said] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        now, key = time.monotonic(), _key(record)
        said = self._said.get(key)
        if said is not None and now - said.at < AGAIN_SECONDS:
            said.more += 1
            return False
        if len(self._said) >= MOST_REMEMBERED:
            self._said.clear()
        if said is not None and said.more:
            record.msg = f"{record.getMessage()} (and {said.more:,} more before)"
            record.args = ()
        self._said[key] = _Said(now)
        return True


def _key(record: logging.LogRecord) -> tuple[object, ...]:
    kind, where = None, None
    if record.exc_info:
        kind, _, traceback = record.exc_info
        while traceback is not None:
            where = (traceback.tb_frame.f_code, traceback.tb_lineno)
            traceback = traceback.tb_next
    return record.name, record.getMessage().partition("\n")[0], kind, where


def say_once() -> None:
    """From now on, in each of `LIMITED`."""
    once = Once()
    for name in LIMITED:
        logging.getLogger(name).addFilter(once)
