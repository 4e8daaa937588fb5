"""What a page is shown: everything at first, then once a second what changed.

All of it comes from what the worker has published; nothing here asks the worker for anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi.sse import format_sse_event

from mlx_hybridcache.disk.segment import PrefixDigest
from mlx_hybridcache.tokens import Namespace

from .errors import ApiError
from .figures import figures, running
from .forest import Forest, Place, Run, Shelf, Start
from .schema import WatchBody
from .serving import Serving
from .wire import event

INTERVAL_SECONDS = 1.0
"""Between two events at least."""

KEEP_ALIVE_SECONDS = 15.0
"""A stream with nothing to tell says so, which also notices a client that went away."""

MOST_WATCHING = 16
"""Pages at once."""

MOST_PLACES = 64
"""Checkpoints of one run that are drawn."""

SHOWN_TOKENS = 24
"""Of a run's beginning, with `--show-prompts`."""

FIRST_SHOWN = 30
"""Conversations of the model's own shelf that a page sees before it asks for more."""

OWN = "own"
"""What a shelf is that belongs to the served model and to no salt."""


async def watch(serving: Serving, body: WatchBody) -> AsyncGenerator[bytes]:
    """Server-sent events for one page, until it goes away or the server stops."""
    watcher = Watcher(serving, body)
    quiet_since = time.monotonic()
    while not serving.closing.is_set():
        update = watcher.update()
        if update:
            quiet_since = time.monotonic()
            yield event({"time": time.time(), **update})
        elif time.monotonic() - quiet_since >= KEEP_ALIVE_SECONDS:
            quiet_since = time.monotonic()
            yield format_sse_event(comment="keepalive")
        with suppress(TimeoutError):
            await asyncio.wait_for(serving.closing.wait(), INTERVAL_SECONDS)


def admit_watcher(serving: Serving) -> Callable[[], None]:
    """Count one more page; what is returned counts it off again.

    Raises `ApiError` 429 when as many watch as may.
    """
    if serving.watching >= MOST_WATCHING:
        raise ApiError(
            429,
            f"{serving.watching} pages are watching already. Close one of them.",
            code="too_many_watchers",
        )
    serving.watching += 1

    def leave() -> None:
        serving.watching -= 1

    return leave


class Watcher:
    """One page: what it looks at, and what it was told of that."""

    def __init__(self, serving: Serving, body: WatchBody):
        self._serving = serving
        self._body = body
        self._seen = body.since if body.started == serving.started else 0
        self._told: dict[str, Any] = {}
        self._looked_at: tuple[object, ...] | None = None
        self._forest = Forest()
        self._runs: dict[str, Run] = {}
        self._lists: dict[str, dict[str, Any]] = {}

    def update(self) -> dict[str, Any]:
        """What changed since the last one; empty when nothing did."""
        serving = self._serving
        said = {
            "server": self._server(),
            "cache": figures(serving),
            "running": running(serving),
        }
        changed = {name: what for name, what in said.items() if self._told.get(name) != what}
        self._told = said
        return {**changed, **self._recent(), **self._tree()}

    def _server(self) -> dict[str, Any]:
        serving = self._serving
        return {
            "started": serving.started,
            "shows_prompts": serving.settings.show_prompts,
            "exact": serving.settings.exact,
            "memory_only": serving.loaded.cache.disk_summary is None,
            "needs_checkpoints": serving.loaded.cache.engine.layout.needs_snapshots,
            "unsupported": list(serving.loaded.cache.engine.layout.unsupported),
        }

    def _recent(self) -> dict[str, Any]:
        serving = self._serving
        new = serving.remembered - self._seen
        if new <= 0:
            return {}
        self._seen = serving.remembered
        first = [one for one, _ in zip(serving.recent, range(new), strict=False)]
        return {"recent": [one.body() for one in first], "remembered": serving.remembered}

    # The tree

    def _tree(self) -> dict[str, Any]:
        cache = self._serving.loaded.cache
        outlines, own = cache.outlines, Namespace(cache.engine.settings)
        looked = (*outlines.memory.values(), None, *outlines.disk.values())
        if looked == self._looked_at:  # outlines equal themselves only
            return {}
        self._looked_at = looked
        looks = [self._look(shelf, own) for shelf in self._forest.shelves(outlines, own)]
        shown = {run.key: (look, run, start) for look in looks for run, start in look.runs}
        lists = {key: told for look in looks for key, told in look.lists.items()}
        runs, was, had = {key: run for key, (_, run, _) in shown.items()}, self._runs, self._lists
        self._runs, self._lists = runs, lists
        return {
            "tree": {
                "shelves": [look.told for look in looks],
                "runs": [
                    self._told_run(run, start, is_private=look.told["kind"] != OWN)
                    for look, run, start in shown.values()
                    if was.get(run.key) is not run
                ],
                "lists": {key: told for key, told in lists.items() if had.get(key) != told},
                "gone": [key for key in was if key not in runs],
            }
        }

    def _look(self, shelf: Shelf, own: Namespace) -> _Look:
        """The branches of what is open, as many of each as the page asks for."""
        kind = OWN if shelf.salt == own.salt else "other" if shelf.salt is None else "salted"
        told = {"key": shelf.key, "kind": kind, "bytes": shelf.nbytes, "all": len(shelf.branches)}
        look, asked = _Look(told), self._body.open
        default = FIRST_SHOWN if kind == OWN else 0
        waiting = [
            (shelf.key, asked.get(shelf.key, default), shelf.branches, PrefixDigest(shelf.key))
        ]
        while waiting:
            key, most, branches, above = waiting.pop()
            starts = branches.first(most, self._body.order)
            runs = [self._forest.run(start, above) for start in starts]
            look.runs += zip(runs, starts, strict=True)
            look.lists[key] = {"keys": [run.key for run in runs], "all": len(branches)}
            waiting += [
                (run.key, asked[run.key], run.branches, run.digest)
                for run in runs
                if run.key in asked and len(run.branches)
            ]
        return look

    def _told_run(self, run: Run, start: Start, *, is_private: bool) -> dict[str, Any]:
        total = {
            "memory": start.weight(start.memory),
            "disk": start.weight(start.disk),
        }
        resting = [place for place in run.places if place.position > run.start]
        return {
            "key": run.key,
            "start": run.start,
            "end": run.end,
            "parts": run.parts,
            "memory_bytes": run.memory_bytes,
            "disk_bytes": run.disk_bytes,
            "total": total,
            "all_places": len(run.places),
            "places": [_told_place(place) for place in _drawn(run.places)],
            "resume": resting[-1].key if resting else None,
            "pins": [place.key for place in run.places if place.is_pinned],
            "branches": len(run.branches),
            "used_at": run.used_at,
            "below_used_at": start.used[0] or None,
            "text": None if is_private else self._text(run),
        }

    def _text(self, run: Run) -> str | None:
        if not self._serving.settings.show_prompts:
            return None
        tokens: list[int] = []
        for part in run.tokens:
            tokens += part[: SHOWN_TOKENS - len(tokens)].tolist()
            if len(tokens) >= SHOWN_TOKENS:
                break
        return str(self._serving.loaded.tokenizer.decode(tokens))


@dataclass(slots=True)
class _Look:
    """What is shown of one shelf: runs with where they begin, and the keys below each that is open."""

    told: dict[str, Any]
    runs: list[tuple[Run, Start]] = field(default_factory=list)
    lists: dict[str, dict[str, Any]] = field(default_factory=dict)


def _drawn(places: list[Place]) -> list[Place]:
    """At most `MOST_PLACES`, spread evenly, with every pin and the last one."""
    stride = -(-len(places) // MOST_PLACES)
    last = len(places) - 1
    return [
        place for at, place in enumerate(places) if place.is_pinned or (last - at) % stride == 0
    ]


def _told_place(place: Place) -> list[Any]:
    return [
        place.position,
        place.memory_bytes,
        place.disk_bytes,
        place.is_pinned,
        place.used_at,
    ]
