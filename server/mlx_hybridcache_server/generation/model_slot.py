"""The one model that is served: who uses it, another in its place, and its rest."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

import mlx.core as mx

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.cache import Outlines
from mlx_hybridcache.request.info import CacheInfo
from mlx_hybridcache.store.budget import StoreStats
from mlx_hybridcache.store.outline import Outline
from mlx_hybridcache.tokenizing.encoder import Encoder
from mlx_hybridcache.tokens import Namespace
from mlx_hybridcache.worker.mlx_thread import on_mlx_thread
from mlx_hybridcache.worker.turns import Load

from ..errors import ApiError, shutting_down
from ..loading.idle import Idle, seconds_of
from ..loading.leases import Leases
from ..settings import Settings
from .models import DEFAULT_NAME, Loaded, Named, load

if TYPE_CHECKING:
    from mlx_hybridcache.disk.tier.tier import DiskStats

log = logging.getLogger("mlx_hybridcache.server")

FLUSH_SECONDS = 600.0
"""How long writing to the cache directory may take before a model is let go."""

ModelState = Literal["loaded", "changing", "unloaded", "failed"]


class ModelSlot:
    """Holds one model. Used on one event loop, and `close` behind its end."""

    def __init__(self, settings: Settings, loaded: Loaded, closing: asyncio.Event):
        self.settings = settings
        self.loaded = loaded
        """The model, or what is known of it while it rests."""
        self._closing = closing
        self._leases: Leases[Named | None] = Leases(self._is_loaded, self._switch, self._note_idle)
        self._idle = Idle(settings.idle_unload, self._rest_soon)
        self._resting: asyncio.Task[None] | None = None
        self._loading: Future[Loaded] | None = None

    async def model(
        self,
        held: ExitStack,
        name: str | None,
        adapter: str | None = None,
        draft: str | None = None,
    ) -> Loaded:
        """The model that a request names, which stays until `held` is closed; loaded first if need be.

        Raises `ApiError` 404 for any other name where switching is not allowed. Loading another
        waits for all who hold the one that is served, and lets go of that with its cache, as there is
        room for one. What fails to load leaves it as it is.
        """
        asked = Named(name or DEFAULT_NAME, adapter, draft)
        wanted = asked.resolved(self.settings)
        if not self.settings.allow_model_switching and not self.loaded.serves(wanted):
            raise self._not_served(asked)
        return await self._lease(held, wanted)

    async def any_model(self, held: ExitStack) -> Loaded:
        """The model that is served, which stays until `held` is closed."""
        return await self._lease(held, None)

    async def _lease(self, held: ExitStack, wanted: Named | None) -> Loaded:
        self.check_open()
        await self._leases.take(wanted, held)
        self.check_open()
        return self.loaded

    @property
    def is_alive(self) -> bool:
        """Whether requests can be served, by and by if a model is being loaded, or will be."""
        return self.state != "failed"

    @property
    def state(self) -> ModelState:
        """Of the model: `unloaded` is one that the next request loads again."""
        if self._leases.is_switching:
            return "changing"
        if _rests(self.loaded):
            return "unloaded"
        return "loaded" if self.loaded.cache.is_alive else "failed"

    # Resting

    def keep_for(self, keep_alive: Any = None) -> bool:
        """How long the model stays behind the request that has come last; whether that is a time at all."""
        default = self.settings.idle_unload
        self._idle.seconds = default
        if default is None or keep_alive is None:
            return True
        try:
            self._idle.seconds = seconds_of(keep_alive)
        except ValueError:
            return False
        return True

    def watch_idleness(self) -> None:
        """Count the time without a request from now on. On the event loop."""
        self._note_idle(self._leases.is_idle)

    def _note_idle(self, is_idle: bool) -> None:
        if is_idle and self.loaded.cache.is_alive and not self._closing.is_set():
            self._idle.begin()
        else:
            self._idle.end()

    def _rest_soon(self) -> None:
        if self._resting is None or self._resting.done():
            self._resting = asyncio.create_task(self._rest())

    async def _rest(self) -> None:
        """Write what is cached while requests may still come; if none did, let go of the model."""
        cache = self.loaded.cache
        is_written = await asyncio.to_thread(cache.flush, FLUSH_SECONDS)
        is_same = self.loaded.cache is cache and not self._closing.is_set()
        if is_same and self._idle.is_over:
            self._leases.empty(partial(self._unload, is_written=is_written))

    async def _unload(self, *, is_written: bool) -> None:
        if not is_written:
            log.warning("Not all that is cached fits the cache directory, and the rest is let go.")
        self.loaded = await asyncio.to_thread(_resting, self.loaded)
        self._loading = None  # which holds the model that it loaded
        await asyncio.wrap_future(on_mlx_thread(_give_back))
        log.info("%s is let go until somebody asks for it: nobody has in a while.", self.loaded.id)

    def _is_loaded(self, wanted: Named | None) -> bool:
        return self.loaded.cache.is_alive and (wanted is None or self.loaded.serves(wanted))

    def _not_served(self, wanted: Named) -> ApiError:
        name, adapter, _ = wanted
        what = f"adapter {adapter!r}" if adapter is not None else f"model {name!r}"
        return ApiError(
            404,
            f"The {what} is not served here; {self.loaded.id!r} is. Start the server with "
            "--allow-model-switching to let requests load others.",
            param="model" if adapter is None else "adapters",
            code="model_not_found",
        )

    async def _switch(self, wanted: Named | None) -> None:
        """Nobody holds the old model. Whoever waits for the new one hears why it cannot be loaded."""
        self.check_open()
        old = self.loaded
        if wanted is not None and old.cache.is_alive and old.may_adapt(wanted):
            self.loaded = await asyncio.to_thread(old.adapted, wanted.adapter)
            return
        own = Named(old.source, old.adapter, old.drafted_by)
        try:
            self.loaded = await self._load(wanted or own, partial(self._let_go, old))
        except Exception:
            if not (old.cache.is_alive or _rests(old)):
                await self._load_again(own)  # it had to go before that was known
            raise

    async def _load_again(self, own: Named) -> None:
        try:
            self.loaded = await self._load(own, self.check_open)
        except Exception:  # whoever comes next has it tried again, and is told
            log.exception("%s, which was served, cannot be loaded again.", own.name)

    def _let_go(self, old: Loaded) -> None:
        self.check_open()
        if old.cache.is_alive:
            log.warning("Another model is loaded; what is cached for %s is let go.", old.id)
        old.cache.close()

    async def _load(self, wanted: Named, make_room: Callable[[], None]) -> Loaded:
        self._loading = on_mlx_thread(lambda: load(self.settings, *wanted, make_room=make_room))
        # A load cannot be stopped: it ends, and `close` lets go of what came of it.
        return await asyncio.shield(asyncio.wrap_future(self._loading))

    # The end

    def check_open(self) -> None:
        """Raises `ApiError` 503 when the server is stopping, and `GroupError` when another rank is lost."""
        if self._closing.is_set():
            raise shutting_down()
        if (lost := self.loaded.cache.failure) is not None:
            raise lost

    def stop(self) -> None:
        """Let nobody wait for it any more."""
        self._idle.end()
        self._leases.refuse(shutting_down())

    def close(self) -> None:
        """Let go of the model. Waits for the worker."""
        self.loaded.cache.close()
        if self._loading is not None and self._loading.exception() is None:
            self._loading.result().cache.close()


@dataclass(frozen=True, eq=False)
class Rest:
    """What a cache last told of itself, in the cache's own words, when all of it but its files was let go."""

    info: CacheInfo
    encoder: Encoder
    summary: StoreStats
    disk_summary: DiskStats | None
    disk: Mapping[Namespace, Outline]
    is_alive = False
    failure = None
    ranks = ()

    @property
    def load(self) -> Load:
        """Nothing is under way."""
        return Load()

    @property
    def outlines(self) -> Outlines:
        """Nothing is in memory."""
        return Outlines(MappingProxyType(dict[Namespace, Outline]()), self.disk)

    def close(self) -> None:
        """There is nothing left to end."""


def _rests(loaded: Loaded) -> bool:
    cache: object = loaded.cache
    return isinstance(cache, Rest)


def _resting(loaded: Loaded) -> Loaded:
    """Let go of a model and of what is cached in memory; what is left to show of it. Not for the event loop.

    Whoever holds `loaded` holds the model: `_give_back` is for when nobody does any more.
    """
    cache = loaded.cache
    cache.close()
    held = {"rows_bytes", "snapshot_bytes", "running_bytes", "lingering_bytes", "checkpoints"}
    held |= {"retained_bytes", "conversations", "nodes", "pinned", "tokens"}
    rest = Rest(
        info=replace(cache.info, model=None),
        encoder=cache.encoder,
        summary=replace(cache.summary, **dict.fromkeys(held, 0)),
        disk_summary=cache.disk_summary,
        disk=dict(cache.outlines.disk),
    )
    # What is asked of a cache without a lease, of which nobody has one of this.
    return replace(loaded, cache=cast("HybridPromptCache", rest), draft=None)


def _give_back() -> None:
    """Free what nobody holds, and hand MLX's memory back to the system. On a thread of its own."""
    gc.collect()  # models and their layers hold each other
    mx.clear_cache()
