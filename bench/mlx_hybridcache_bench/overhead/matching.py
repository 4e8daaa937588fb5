"""Matching a long prompt in a full store, and what the tree weighs beside the arrays it keeps."""

from __future__ import annotations

import gc
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from mlx_hybridcache.caches.checkpoint import Checkpoint
from mlx_hybridcache.caches.kinds.rows import RowBlock
from mlx_hybridcache.caches.memory import MemoryStore
from mlx_hybridcache.prefill.schedule import Grid, Reading, cuts_for
from mlx_hybridcache.store.store import Store
from mlx_hybridcache.tokens import Namespace, Tokens, prompt_tokens

from ..kit.tables import Figure, show

VOCABULARY = 151_936
SYSTEM_PROMPTS, SYSTEM_TOKENS = 20, 1_500
TURNS = 3
TARGET_MS, TARGET_BYTES = 5.0, 8.0
SPACE = Namespace("bench")


@dataclass(frozen=True, slots=True)
class Lookup:
    """One prompt's match. Milliseconds, medians; `worst_ms` is the slowest round of all."""

    name: str
    prompt_tokens: int
    matched_tokens: int
    array_ms: float
    match_ms: float
    total_ms: float
    worst_ms: float


@dataclass(frozen=True, slots=True)
class Matching:
    """A store of many conversations. Bytes are what Python allocated for it."""

    conversations: int
    stored_tokens: int
    nodes: int
    checkpoints: int
    tree_bytes_per_token: float
    lookups: tuple[Lookup, ...]

    def figures(self) -> list[Figure]:
        """The promised ones."""
        slowest = max(lookup.total_ms for lookup in self.lookups)
        longest = self.lookups[0].prompt_tokens
        return [
            Figure(f"matching {longest:,} tokens", slowest, "ms", TARGET_MS, False),
            Figure(
                "tree beside its arrays", self.tree_bytes_per_token, "B/token", TARGET_BYTES, True
            ),
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        names = Lookup.__dataclass_fields__
        return {
            "conversations": self.conversations,
            "stored_tokens": self.stored_tokens,
            "nodes": self.nodes,
            "checkpoints": self.checkpoints,
            "tree_bytes_per_token": self.tree_bytes_per_token,
            "lookups": [{name: getattr(each, name) for name in names} for each in self.lookups],
        }

    def show(self, console: Console) -> None:
        """Print it."""
        show(
            console,
            f"Matching in {self.conversations:,} conversations: {self.stored_tokens:,} tokens in "
            f"{self.nodes:,} nodes, {self.tree_bytes_per_token:.2f} bytes a token beside the arrays",
            ("prompt", "tokens", "matched", "to array ms", "match ms", "total ms", "worst"),
            [
                (
                    each.name,
                    f"{each.prompt_tokens:,}",
                    f"{each.matched_tokens:,}",
                    f"{each.array_ms:.2f}",
                    f"{each.match_ms:.2f}",
                    f"{each.total_ms:.2f}",
                    f"{each.worst_ms:.2f}",
                )
                for each in self.lookups
            ],
        )


def measure_matching(*, conversations: int, tokens: int, rounds: int, seed: int = 1162) -> Matching:
    """Store `conversations`, the longest of `tokens`, and look long prompts up `rounds` times."""
    generator = np.random.default_rng(seed)
    histories = _histories(generator, random.Random(seed), conversations, tokens)
    store: MemoryStore = Store(1 << 50, needs_checkpoints=True)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for history in histories:
        _read(store, history)
    gc.collect()
    allocated = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    stats = store.stats()

    longest = histories[0]
    half = tokens // 2
    other = generator.integers(0, VOCABULARY, tokens, dtype=np.int32)
    prompts = {
        "all of it stored": longest,
        "parts ways in the middle": np.concatenate([longest[:half], other[: tokens - half]]),
        "a stored system prompt": np.concatenate([longest[:SYSTEM_TOKENS], other])[:tokens],
        "nothing stored": other,
    }
    return Matching(
        conversations=conversations,
        stored_tokens=stats.tokens,
        nodes=stats.nodes,
        checkpoints=stats.checkpoints,
        tree_bytes_per_token=(allocated - 4 * stats.tokens) / stats.tokens,
        lookups=tuple(_look_up(store, name, each, rounds) for name, each in prompts.items()),
    )


def _histories(
    generator: np.random.Generator, sizes: random.Random, count: int, longest: int
) -> list[Tokens]:
    """Conversations of 2,000 to 8,000 tokens, and one long one, under a few system prompts."""
    systems = generator.integers(0, VOCABULARY, (SYSTEM_PROMPTS, SYSTEM_TOKENS), dtype=np.int32)
    lengths = [longest, *(sizes.randrange(2_000, 8_000) for _ in range(count - 1))]
    return [
        np.concatenate(
            [
                systems[index % SYSTEM_PROMPTS],
                generator.integers(0, VOCABULARY, max(1, length - SYSTEM_TOKENS), dtype=np.int32),
            ]
        )
        for index, length in enumerate(lengths)
    ]


def _read(store: MemoryStore, history: Tokens) -> None:
    """Store a conversation turn by turn, with the checkpoints that reading it would take."""
    for turn in range(1, TURNS + 1):
        prompt = history[: SYSTEM_TOKENS + (len(history) - SYSTEM_TOKENS) * turn // TURNS]
        if len(prompt) < 2:
            continue
        store.tick()
        found = store.find(SPACE, prompt)
        reading = Reading(
            found.position, len(prompt) - 1, [SYSTEM_TOKENS], branch=found.match.matched
        )
        for cut in cuts_for(reading, Grid()):
            store.save(
                SPACE, prompt[:cut], _no_rows(cut), Checkpoint(cut, ()), rows_nbytes=_nothing
            )


def _nothing(start: int, end: int) -> int:
    return 0


def _no_rows(end: int) -> Callable[[int], RowBlock]:
    return lambda start: RowBlock(start, end, ())


def _look_up(store: MemoryStore, name: str, prompt: Tokens, rounds: int) -> Lookup:
    ids = [int(token) for token in prompt]
    array_ms: list[float] = []
    match_ms: list[float] = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        tokens = prompt_tokens(ids, VOCABULARY)
        read = time.perf_counter()
        found = store.find(SPACE, tokens)
        ended = time.perf_counter()
        array_ms.append((read - began) * 1e3)
        match_ms.append((ended - read) * 1e3)
    totals = [a + b for a, b in zip(array_ms[1:], match_ms[1:], strict=True)]
    return Lookup(
        name=name,
        prompt_tokens=len(prompt),
        matched_tokens=found.match.matched,
        array_ms=statistics.median(array_ms[1:]),
        match_ms=statistics.median(match_ms[1:]),
        total_ms=statistics.median(totals),
        worst_ms=max(totals),
    )
