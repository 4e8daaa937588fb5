"""What a page is shown: everything at first, then once a second what changed.

All of it comes from what the worker has published; nothing here asks the worker for anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mlx_hybridcache.store.conversations import Place
from mlx_hybridcache.tokens import Namespace

from ..errors import ApiError
from ..generation.serving import Serving
from ..http.keepalive import COMMENT
from ..http.wire import event
from ..schema.requests import WatchBody
from .figures import figures, running
from .namespaces import NamespaceTree, namespace_trees
from .rows import Fork, Row, Rows

INTERVAL_SECONDS = 1.0
"""Between two events at least."""

MOST_WATCHING = 16
"""Pages at once."""

MOST_PLACES = 64
"""Checkpoints of one run that are drawn."""

SHOWN_TOKENS = 24
"""Of a run's beginning, with `--show-prompts`."""

BETWEEN_TURNS = " · "

FIRST_SHOWN = 30
"""Conversations of the model's own namespace that a page sees before it asks for more."""

OWN = "own"
"""What a namespace is that belongs to the served model and to no salt."""


async def watch(serving: Serving, body: WatchBody) -> AsyncGenerator[bytes]:
    """Server-sent events for one page, until it goes away or the server stops; with nothing to tell, that."""
    watcher = Watcher(serving, body)
    quiet_since = time.monotonic()
    while not serving.closing.is_set():
        update = watcher.update()
        if update:
            quiet_since = time.monotonic()
            yield event({"time": time.time(), **update})
        elif time.monotonic() - quiet_since >= serving.settings.keepalive_seconds:
            quiet_since = time.monotonic()
            yield COMMENT
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
        self._rows = Rows(serving.loaded.cache.info.marks)
        self._shown: dict[str, Row] = {}
        self._lists: dict[str, dict[str, Any]] = {}
        self._opened: set[str] = set()

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
            "needs_checkpoints": serving.loaded.cache.info.needs_checkpoints,
            "unsupported": list(serving.loaded.cache.info.unsupported),
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
        outlines, own = cache.outlines, Namespace(cache.info.settings)
        looked = (*outlines.memory.values(), None, *outlines.disk.values())
        if looked == self._looked_at:  # outlines equal themselves only
            return {}
        self._looked_at = looked
        self._rows.look_again()
        looks = [self._look(tree, own) for tree in namespace_trees(outlines, own)]
        shown = {row.run.key: (look, row) for look in looks for row in look.rows}
        lists = {key: told for look in looks for key, told in look.lists.items()}
        was, had = self._shown, self._lists
        self._shown, self._lists = {key: row for key, (_, row) in shown.items()}, lists
        told = [
            self._told_row(row, is_private=look.told["kind"] != OWN)
            for key, (look, row) in shown.items()
            if key not in was or (was[key].run, was[key].begins) != (row.run, row.begins)
        ]
        self._rows.keep(row.run for row in self._shown.values())
        self._opened &= shown.keys()
        return {
            "tree": {
                "shelves": [look.told for look in looks],
                "runs": told,
                "lists": {key: told for key, told in lists.items() if had.get(key) != told},
                "gone": [key for key in was if key not in shown],
            }
        }

    def _look(self, tree: NamespaceTree, own: Namespace) -> _Look:
        """The rows of what is open, as many of each as the page asks for.

        A namespace's only row is open, unless the page has closed it: what matters begins behind it. It
        stays so when others come.
        """
        kind = OWN if tree.salt == own.salt else "other" if tree.salt is None else "salted"
        top, asked = self._rows.top(tree), self._body.open
        look = _Look(
            {
                "key": tree.key,
                "kind": kind,
                "bytes": tree.nbytes,
                "all": len(top),
                "conversations": self._rows.conversations(tree.start),
            }
        )
        waiting: list[tuple[str, int, Fork]]
        waiting = [(tree.key, asked.get(tree.key, FIRST_SHOWN if kind == OWN else 0), top)]
        while waiting:
            key, most, fork = waiting.pop()
            rows = self._rows.first(fork, most, self._body.order)
            look.rows += rows
            look.lists[key] = {"keys": [row.run.key for row in rows], "all": len(fork)}
            if len(fork) == 1:
                self._opened.update(row.run.key for row in rows)
            for row in rows:
                opened = row.run.key in self._opened
                most = asked.get(row.run.key, FIRST_SHOWN if opened else 0)
                if most and len(row.run.branches):
                    waiting.append((row.run.key, most, self._rows.below(row)))
        return look

    def _told_row(self, row: Row, *, is_private: bool) -> dict[str, Any]:
        run, start, below = row.run, row.start, self._rows.below(row)
        total = {
            "memory": start.weight(start.in_memory),
            "disk": start.weight(start.on_disk),
        }
        resting = [place for place in run.places if place.position > run.start]
        return {
            "key": run.key,
            "start": row.begins,
            "end": run.end,
            "parts": run.parts,
            "memory_bytes": run.memory_bytes + below.memory_bytes,
            "disk_bytes": run.disk_bytes + below.disk_bytes,
            "total": total,
            "all_places": len(run.places),
            "places": [_told_place(place) for place in _drawn(run.places)],
            "resume": resting[-1].key if resting else None,
            "pins": [place.key for place in run.places if place.is_pinned],
            "branches": len(below),
            "conversations": self._rows.conversations(start),
            "turns": row.turns,
            "used_at": run.used_at,
            "below_used_at": start.used[0] or None,
            "text": None if is_private else self._text(row),
        }

    def _text(self, row: Row) -> str | None:
        """The first words, turn by turn, without what the template puts around them."""
        if not self._serving.settings.show_prompts:
            return None
        tokens: list[int] = []
        for part in (*row.folded, *row.run.tokens):
            tokens += part[: SHOWN_TOKENS - len(tokens)].tolist()
            if len(tokens) >= SHOWN_TOKENS:
                break
        cache, tokenizer = self._serving.loaded.cache, self._serving.loaded.tokenizer
        opens = [at for at, token in enumerate(tokens) if token in cache.info.marks.openers]
        cuts = [0, *(at for at in opens if at), len(tokens)]
        turns = (
            str(tokenizer.decode(tokens[start:end], skip_special_tokens=True)).strip()
            for start, end in pairwise(cuts)
        )
        return BETWEEN_TURNS.join(filter(None, turns))


@dataclass(slots=True)
class _Look:
    """What is shown of one namespace: rows, and the keys below each that is open."""

    told: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
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
        place.soft_until,
    ]
