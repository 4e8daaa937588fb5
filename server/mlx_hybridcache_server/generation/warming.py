"""A prefix that is read ahead: it waits, is timed and ends with its client as a reply does."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, aclosing
from typing import Any

from mlx_hybridcache import CacheReport, Generation
from mlx_hybridcache.tokens import Tokens

from .admission import Admitted
from .models import Loaded
from .serving import Serving

ENDPOINT = "/v1/cache/warm"


class Warming:
    """One prefix under way."""

    def __init__(
        self,
        serving: Serving,
        loaded: Loaded,
        tokens: Tokens,
        salt: str | None,
        admitted: Admitted,
    ):
        self._serving, self._loaded, self._admitted = serving, loaded, admitted
        self._tokens, self._salt = tokens, salt
        self._arrived_at = time.time()
        self._state = "queued"
        self._read = 0

    def progress(self) -> dict[str, Any]:
        """How far it is, as JSON."""
        return {
            "id": f"warm-{id(self):x}",
            "endpoint": ENDPOINT,
            "arrived": self._arrived_at,
            "state": self._state,
            "prompt_tokens": len(self._tokens),
            "restored_tokens": None,
            "read_tokens": self._read,
            "completion_tokens": 0,
        }

    async def done(self) -> tuple[CacheReport, int]:
        """What reading it took, and the position that is stored then. Cancelled, the reading ends."""
        serving = self._serving
        async with AsyncExitStack() as held:
            serving.runs[self] = None
            held.callback(serving.runs.pop, self)
            await self._admitted.turn(held)
            memory = serving.admission.memory
            async with aclosing(memory.items(self._begun, self._queued)) as items:
                async for done in items:
                    return done
        serving.check_open()
        raise AssertionError("a reading that nobody cancelled has an end")

    async def _begun(self) -> AsyncGenerator[tuple[CacheReport, int]]:
        async with AsyncExitStack() as begun:
            generation = self._start(begun)
            async for found in generation:
                assert generation.report is not None
                yield generation.report, found.restored_tokens

    async def _queued(self, work: Coroutine[Any, Any, bool]) -> bool:
        self._state = "queued"
        return await self._admitted.queued(work)

    def _start(self, held: AsyncExitStack) -> Generation[CacheReport]:
        serving = self._serving
        serving.check_open()
        self._state = "reading"
        generation = self._loaded.cache.warm(
            self._tokens, prompt_progress_callback=self._on_progress, cache_salt=self._salt
        )
        serving.generations.add(generation)
        held.callback(serving.generations.discard, generation)
        held.callback(generation.cancel)
        return generation

    def _on_progress(self, read: int, total: int) -> None:
        self._read = read
