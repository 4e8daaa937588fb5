"""Memory for the rest of the system: the store shrinks for it, and what was freed goes back to it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from typing import TypeVar

import mlx.core as mx

from ..machine import Pressure, give_back
from ..worker.turns import Pause
from .memory import MemoryStore
from .retaining.pool import BufferPool

log = logging.getLogger("mlx_hybridcache")

T = TypeVar("T")

GIVEN_BACK = 32
"""What was freed goes back to the system when it is such a part of the budget: 8 ms of work then."""


class Relief:
    """Lets go of what the system lacks. `on_shrunk` is called when something went."""

    def __init__(
        self,
        store: MemoryStore,
        pool: BufferPool,
        pressure: Pressure,
        on_shrunk: Callable[[], None],
    ):
        self.pressure = pressure
        self._store = store
        self._pool = pool
        self._on_shrunk = on_shrunk

    def relieve(self, coming_bytes: int = 0) -> None:
        """Between turns: let go what the system lacks, and give back what was let go by then."""
        store = self._store
        may_go = store.budget.retained_bytes + store.budget.stored_bytes
        missing = self.pressure.excess(may_go, coming_bytes)
        if missing:
            left = missing - self._pool.free(missing)
            if left > 0:
                store.shrink(left)
            self._on_shrunk()
        if store.budget.freed_bytes > (0 if missing else store.budget.limit_bytes // GIVEN_BACK):
            self.give_back()

    def give_back(self) -> None:
        """What was freed goes back to the system now."""
        self._store.budget.given_back()
        mx.clear_cache()
        give_back()

    def twice(
        self, attempt: Callable[[], Generator[Pause, None, T]], release: Callable[[], None]
    ) -> Generator[Pause, None, T]:
        """What `attempt` does. Memory that MLX cannot get is made: half of the store goes for a second try.

        What `release` keeps of the first serves the second.
        """
        try:
            return (yield from attempt())
        except RuntimeError as error:
            if not is_allocation_failure(error):
                raise
            log.warning("Memory ran out while a prompt was read; making room for a second try.")
        release()
        self._store.shrink(self._store.budget.stored_bytes // 2)
        self.give_back()
        return (yield from attempt())


def is_allocation_failure(error: RuntimeError) -> bool:
    """MLX has no class for it: `[metal::malloc] Unable to allocate`, `[malloc_or_wait]`, and so on."""
    said = str(error).lower()
    return any(word in said for word in ("malloc", "unable to allocate", "out of memory"))
