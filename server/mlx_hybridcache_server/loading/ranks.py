"""A server that `mlx.launch` started on several machines: rank 0 listens, and the others follow it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

from mlx_hybridcache import Group, GroupError, HybridPromptCache
from mlx_hybridcache.errors import SettingError
from mlx_hybridcache.group.group import is_launched

from ..settings import Settings

log = logging.getLogger("mlx_hybridcache.server")

LOST = 3
"""The status of a rank that ends because another one is lost, so that the launcher ends the rest."""

GRACE_SECONDS = 30.0
"""How long a rank that is told to end goes on for rank 0: longer than that takes to write what is stored."""

ALONE = {
    "--adapter-path": "adapter_path",
    "--allow-model-switching": "allow_model_switching",
    "--canonicalize-router": "canonicalize_router",
    "--draft-from-cache": "draft_from_cache",
    "--draft-model": "draft_model",
    "--draft-mtp": "draft_mtp",
    "--idle-unload": "idle_unload",
    "--kv-bits": "kv_bits",
    "--store-kv": "store_kv",
    "--store-state": "store_state",
    "--swa-full": "swa_full",
}
"""Flags that several ranks cannot follow yet, and their settings."""


def group_of(settings: Settings) -> Group | None:
    """The ranks that were started together; None where this is the only one.

    Raises `GroupError` where one does not come, and `SettingError` for what they cannot do.
    """
    if not is_launched():
        return None
    found = [flag for flag, name in ALONE.items() if getattr(settings, name)]
    if not settings.uses_cache:
        found.append("A cache that is off")
    if found:
        raise SettingError(
            f"{', '.join(found)} cannot be used on several ranks yet. Leave it out, or start the server on "
            "one machine."
        )
    return Group.form()


def follow(cache: HybridPromptCache) -> None:
    """Do what rank 0 does until it stops. A rank is lost: this process ends."""
    group = cache.group
    assert group is not None
    log.info("Rank %d of %d follows rank 0, which listens.", group.rank, group.size)
    # A terminal interrupts all ranks that it started. Rank 0 ends its requests, and then says so.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # So does whoever stops a service. Rank 0 needs the others until what is stored is written.
    signal.signal(signal.SIGTERM, lambda number, frame: _end_in_time())
    try:
        cache.follow()
    except GroupError:  # it was said
        leave(cache, LOST)
    cache.close()


def _end_in_time() -> None:
    """Rank 0 has so long to end this rank; after that it ends by itself."""
    timer = threading.Timer(GRACE_SECONDS, os._exit, (0,))
    timer.daemon = True
    timer.start()


def leave(cache: HybridPromptCache, status: int) -> None:
    """End this process without waiting for its worker, which may be in a call that never returns."""
    cache.close()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
