"""One server from its model to its last connection: bound, loaded, listening, stopped."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import cast

import uvicorn

from mlx_hybridcache.errors import SettingError
from mlx_hybridcache.group.group import is_launched

from .app import build_app
from .banner import banner
from .generation.models import load
from .generation.serving import Serving
from .generation.trace import Recorder
from .http.connections import Connection, Crowd, room
from .loading.ranks import LOST, follow, group_of, leave
from .settings import Settings

log = logging.getLogger("mlx_hybridcache.server")

SHUTDOWN_SECONDS = 10
"""How long replies may take to say that they ended, once the server stops."""

KEEP_ALIVE_SECONDS = 75
"""An agent thinks, or its user does, between two requests on one connection."""

ACCEPTED_AT_ONCE = 128
"""Connections that asyncio opens before it looks at the first of them; uvicorn's 2,048 are more files
than a process may have."""

WAITING_TO_BE_ACCEPTED = 2048
"""Connections that the system keeps for the next turn."""


def serve(settings: Settings, argv: list[str]) -> None:
    """Load the model, listen, and answer until a signal comes.

    Raises `HybridCacheError` or `OSError` for what keeps it from starting.
    """
    _say_what_differs(settings, argv)
    group = group_of(settings)
    if group is not None and group.rank:
        follow(load(settings, settings.model, group=group).cache)
        return
    # Both before minutes of loading, not after.
    with _bound(settings) as listening, _recording(settings) as recorder:
        # No name of its own: a model that is let go of must have no other holder.
        serving = Serving(settings, load(settings, settings.model, group=group), recorder)
        where = f"http://{_for_url(settings.host)}:{listening.getsockname()[1]}"
        try:
            for line in banner(settings, serving.loaded, where):
                log.info("%s", line)
            _Server(serving, settings).run(sockets=[listening])
        finally:
            serving.close()
            if group is not None and group.failure is not None:
                leave(serving.loaded.cache, LOST)


class _Server(uvicorn.Server):
    """uvicorn, which on a signal also ends the replies that it would wait for."""

    def __init__(self, serving: Serving, settings: Settings):
        crowd = Crowd(room(settings.decode_concurrency + settings.max_queue))
        config = uvicorn.Config(
            build_app(serving),
            http=cast("type[asyncio.Protocol]", partial(Connection, crowd=crowd)),
            ws="none",
            loop="asyncio",
            backlog=ACCEPTED_AT_ONCE,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            server_header=False,
        )
        super().__init__(config)
        self._serving = serving
        self._where = f"http://{_for_url(settings.host)}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        log.info("Stopping on %s.", signal.Signals(sig).name)
        self._serving.stop()
        # Not uvicorn's own handler: it would raise the signal again at the end, which is a failure.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._serving.slot.watch_idleness()
        for each in sockets or ():
            each.listen(WAITING_TO_BE_ACCEPTED)
            log.info("Listening on %s:%d", self._where, each.getsockname()[1])


def _bound(settings: Settings) -> socket.socket:
    """A socket at the address, which holds the port while the model is loaded."""
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise SettingError(f"--host {settings.host} is no address: {error.strerror}.") from error
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise SettingError(_why_not_bound(settings, error)) from error
    return bound


def _why_not_bound(settings: Settings, error: OSError) -> str:
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"--host {settings.host} is no address of this machine. 127.0.0.1 is this machine for "
            "itself alone, 0.0.0.0 all its addresses."
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"--port {settings.port}: this user may not listen there (ports below 1024 are the "
            "system's). Choose another."
        )
    return (
        f"Cannot listen on --host {settings.host} --port {settings.port}: {error.strerror}. Stop "
        "what uses the port, or choose another."
    )


@contextmanager
def _recording(settings: Settings) -> Iterator[Recorder | None]:
    """The recorder of `--record-trace`. It ends last, when the worker has handed everything over."""
    if settings.record_trace is None:
        yield None
        return
    recorder = Recorder(settings.record_trace)
    log.info("Requests are recorded in %s, their tokens as keyed hashes.", recorder.path)
    try:
        yield recorder
    finally:
        recorder.close()


def _for_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _check_drafts(settings: Settings) -> None:
    """Raises `SettingError` for drafts that cannot be had."""
    flags = {
        "--draft-from-cache": settings.draft_from_cache,
        "--draft-model": settings.draft_model is not None,
        "--draft-mtp": settings.draft_mtp,
    }
    drafts = [flag for flag, is_set in flags.items() if is_set]
    if settings.exact and drafts:
        raise SettingError(
            f"{drafts[0]} cannot be used with --exact: tokens that are verified together may have "
            "other last bits than single ones. Leave one of them out."
        )
    if drafts[-2:] == ["--draft-model", "--draft-mtp"]:
        raise SettingError(
            "--draft-model and --draft-mtp both draft what is stored nowhere. Leave one of them out."
        )


def _say_what_differs(settings: Settings, argv: list[str]) -> None:
    """Nothing that a start script asks for is passed over in silence."""
    named = {word.split("=")[0] for word in argv}
    _check_drafts(settings)
    if "--pipeline" in named and not is_launched():
        log.warning("--pipeline has no effect on one machine.")
    if "--slot-prompt-similarity" in named:
        log.info("--slot-prompt-similarity is not needed: a prefix tree has no slots to choose.")
    if settings.exact:
        log.info(
            "--exact: prompts are read in whole slices of %d tokens and replies written one by one, "
            "so that a short request may wait longer beside a long one.",
            settings.prefill_step_size,
        )
    if settings.exact and settings.stable_prefix == "mark":
        log.warning(
            "--stable-prefix mark has no effect with --exact: checkpoints keep to its grid."
        )
    if not settings.uses_cache:
        log.warning("The cache is off: every prompt is read as a whole.")
    if settings.draft_mtp and not settings.uses_cache:
        log.warning("--draft-mtp has no effect without the cache.")
