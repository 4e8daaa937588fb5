"""Servers asked the same conversation in turns, and the processor time that each request took them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..serving.client import Reply
from ..serving.scenarios import Material, Step
from ..serving.servers import ServerError
from ..serving.side import Side, fresh_nonce
from ..serving.target import Server
from .chats import STEPS, hot_chat

QUIET_SECONDS, QUIET_CPU_SECONDS = 0.02, 0.001
"""A server is done with a request when it has used less than so much in such a time."""

QUIET_TRIES = 100

Lead = Iterator[tuple[Step, Reply | str]]


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `cpu_seconds` is what the server's process used until it was quiet again, None where
    it cannot be seen; `ttft_seconds` is by the client's clock.
    """

    server: str
    size: int
    run: int
    name: str
    ttft_seconds: float
    cpu_seconds: float | None
    prompt_tokens: int | None
    cached_tokens: int | None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class Asked:
    """A server with the side that leads it through conversations."""

    server: Server
    side: Side

    def next(self, lead: Lead, size: int, run: int) -> Request:
        """Its next request. Raises `ServerError` when it failed."""
        before = self.server.cpu_seconds()
        step, reply = next(lead)
        if isinstance(reply, str):
            raise ServerError(f"{self.side.name} failed ({step.name}, {size:,} tokens): {reply}")
        after = _when_quiet(self.server.cpu_seconds)
        spent = None if before is None or after is None else after - before
        return Request(
            *(self.side.name, size, run, step.name, reply.first_seconds, spent),
            *(reply.prompt_tokens, reply.cached_tokens),
        )


def ask_in_turns(
    servers: Sequence[Asked],
    material: Material,
    sizes: Sequence[int],
    runs: int,
    told: Callable[[str], object],
) -> Iterator[Request]:
    """Each conversation request by request: a b c, then c b a. All of them are asked the same."""
    for run in range(runs):
        for size in sizes:
            nonce = fresh_nonce()
            leads = [
                (each, each.side.lead("hot path", hot_chat(material, nonce, size)))
                for each in servers
            ]
            for turn, name in enumerate(STEPS):
                told(f"{size:,} tokens, {name} ({run + 1} of {runs})")
                for server, lead in leads if turn % 2 == 0 else reversed(leads):
                    yield server.next(lead, size, run)


def _when_quiet(clock: Callable[[], float | None]) -> float | None:
    """What the clock shows once the server has nothing to do any more."""
    last = clock()
    for _ in range(QUIET_TRIES if last is not None else 0):
        time.sleep(QUIET_SECONDS)
        now = clock()
        if now is None or last is None or now - last < QUIET_CPU_SECONDS:
            return now
        last = now
    return last
