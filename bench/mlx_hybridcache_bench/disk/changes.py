"""What a change of a full cache directory takes a process that reads there: on its disk thread and on its worker."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from rich.console import Console

from mlx_hybridcache.disk.catalogue import Catalogue
from mlx_hybridcache.disk.chains import Chains
from mlx_hybridcache.disk.index import Entry
from mlx_hybridcache.disk.segment import Segment, Tensor, prefix_keys

from ..kit.tables import Figure, show

T = TypeVar("T")

NAMESPACE = "ab"
RUN = 2048
"""Tokens of a file of rows."""

MOST_MS = 20.0
"""On the worker, for one file more or less."""


@dataclass(frozen=True, slots=True)
class Change:
    """Milliseconds of CPU with so many files, half of them rows of `RUN` tokens, half checkpoints."""

    conversations: int
    files: int
    prepared_ms: float
    start_ms: float
    more_prepared_ms: float
    more_ms: float
    more_hashed_tokens: int
    less_ms: float


@dataclass(frozen=True, slots=True)
class Changes:
    """The same for directories of several sizes."""

    found: tuple[Change, ...]

    def figures(self) -> list[Figure]:
        """What one file more, and one less, may take."""
        hashed = max(change.more_hashed_tokens for change in self.found)
        worker = max(max(change.more_ms, change.less_ms) for change in self.found)
        return [
            Figure("changes: tokens hashed for one file more", hashed, "tokens", RUN, counted=True),
            Figure("changes: one file more or less, worker", worker, "ms", MOST_MS, counted=False),
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"changes": [asdict(change) for change in self.found]}

    def show(self, console: Console) -> None:
        """The table: `linked` is on the disk thread, the others on the worker."""
        columns = (
            "conversations",
            "files",
            "linked, all",
            "start",
            "linked, one more",
            "one more",
            "one less",
        )
        rows = [
            (
                f"{x.conversations}",
                f"{x.files:,}",
                *(
                    f"{ms:,.2f}"
                    for ms in (x.prepared_ms, x.start_ms, x.more_prepared_ms, x.more_ms, x.less_ms)
                ),
            )
            for x in self.found
        ]
        show(console, "A directory that changes: ms of CPU", columns, rows)


def measure_changes(sizes: Sequence[tuple[int, int]]) -> Changes:
    """For each (conversations, files of rows in each), of which the last file comes later and goes again."""
    return Changes(tuple(_measured(*size) for size in sizes))


def _measured(conversations: int, length: int) -> Change:
    entries = _entries(conversations, length)
    chains, catalogue = Chains(), Catalogue(sys.maxsize, needs_checkpoints=True)
    all_but_one, prepared_ms = _timed(lambda: chains.change(entries[:-2]))
    _, start_ms = _timed(lambda: catalogue.take(all_but_one))
    before = chains.hashed_tokens
    more, more_prepared_ms = _timed(lambda: chains.change(entries[-2:]))
    hashed = chains.hashed_tokens - before
    _, more_ms = _timed(lambda: catalogue.take(more))
    less = chains.change([], [entry.segment.name for entry in entries[-2:]])
    _, less_ms = _timed(lambda: catalogue.take(less))
    return Change(
        conversations,
        len(entries),
        prepared_ms,
        start_ms,
        more_prepared_ms,
        more_ms,
        hashed,
        less_ms,
    )


def _entries(conversations: int, length: int) -> list[Entry]:
    chance = np.random.default_rng(0)
    ends = [RUN * (at + 1) for at in range(length)]
    entries: list[Entry] = []
    for _ in range(conversations):
        tokens = chance.integers(0, 50_000, RUN * length).astype(np.int32)
        keys = prefix_keys(NAMESPACE, tokens, [0, *ends])
        for end, parent, key in zip(ends, keys, keys[1:], strict=False):
            start = end - RUN
            rows = Segment(
                "rows",
                NAMESPACE,
                key,
                parent if start else "",
                start,
                end,
                tokens[start:end],
                (Tensor("0.0", "F32", (1, 1, RUN, 1)),),
            )
            state = Segment(
                "state",
                NAMESPACE,
                key,
                key,
                end,
                end,
                tokens[:0],
                (Tensor("1.0", "F32", (1, 32)),),
            )
            for segment in (rows, state):
                entries.append(Entry(segment, len(entries), False, segment.file_nbytes))
    return entries


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    begun = time.thread_time()
    found = call()
    return found, 1000 * (time.thread_time() - begun)
