"""What the cache itself costs at Qwen3-Next-80B's real shapes, without a model.

Restoring is compared with one plain copy of the same bytes, saving with copying the checkpoint and
its new rows, and ten branches of one prompt with the bytes that their own contents weigh.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache
from rich.console import Console

from mlx_hybridcache import HybridPromptCache, Ready

from ..kit.machine import GIB
from ..kit.paired import Paired, copied, measure, tidy
from ..kit.standin import QWEN3_NEXT_80B, SHAPES, VOCABULARY, Shapes, StandIn, stands_at
from ..kit.tables import Figure, show

MIB = 1024**2
TARGET_COPY, TARGET_HELD = 1.5, 1.05
WRITE = 256
"""Tokens written behind a restored cache, to see whether its buffers hold."""

NEW_ROWS = 512
"""Tokens that each measured save adds."""

BRANCHES, ENDING, SHARED_LESS = 10, 500, 300
"""Branches leave the prompt `SHARED_LESS` tokens before its end, and end `ENDING` tokens later."""


@dataclass(frozen=True, slots=True)
class FullSize:
    """Bytes and seconds. Growth is what peak memory rose by beyond what was there."""

    shapes: str
    tokens: int
    checkpoints: int
    cold_seconds: float
    restore: Paired
    restored_bytes: int
    restore_peak_bytes: int
    restored_right: bool
    growth_copies: int
    growth_peak_bytes: int
    exact_size_growth_copies: int
    save: Paired
    saved_bytes: int
    branch_bytes: int
    branch_expected_bytes: int
    branch_reported_bytes: int

    @property
    def branch_ratio(self) -> float:
        """Bytes really held per byte that the branches' own contents weigh."""
        return self.branch_bytes / self.branch_expected_bytes

    def figures(self) -> list[Figure]:
        """The promised ones."""
        return [
            Figure("restore / plain copy", self.restore.ratio, "x", TARGET_COPY, False),
            Figure("buffers copied by the next 256 tokens", self.growth_copies, "", 0, True),
            Figure("restored caches that are wrong", float(not self.restored_right), "", 0, True),
            Figure("save / plain copy", self.save.ratio, "x", TARGET_COPY, False),
            Figure("ten branches / their contents", self.branch_ratio, "x", TARGET_HELD, True),
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in {"restore", "save"}
        }
        return {
            **plain,
            "branch_ratio": self.branch_ratio,
            "restore": self.restore.as_json(),
            "save": self.save.as_json(),
        }

    def show(self, console: Console) -> None:
        """Print it."""
        show(
            console,
            f"The cache alone, no model: {self.shapes} shapes, {self.tokens:,} tokens",
            ("", "MiB", "plain copy s", "cache s", "ratio", "of pairs"),
            [
                _row("restore", self.restored_bytes, self.restore),
                _row("save", self.saved_bytes, self.save),
            ],
        )
        console.print(
            f"reading all of it cold: {self.cold_seconds:.2f} s beside the model, "
            f"{self.checkpoints} checkpoints; restoring peaked at "
            f"{self.restore_peak_bytes / self.restored_bytes:.2f} x its bytes\n"
            f"the next {WRITE} tokens: {self.growth_copies} buffers copied, peak "
            f"+{self.growth_peak_bytes / MIB:.0f} MiB "
            f"(caches of exactly the prompt's size: {self.exact_size_growth_copies} copied)\n"
            f"{BRANCHES} branches hold {self.branch_bytes / GIB:.2f} GiB for "
            f"{self.branch_expected_bytes / GIB:.2f} GiB of contents: {self.branch_ratio:.4f} x; "
            f"reported {self.branch_reported_bytes / GIB:.2f} GiB",
            highlight=False,
        )


def _row(name: str, nbytes: int, paired: Paired) -> tuple[str, ...]:
    return (
        name,
        f"{nbytes / MIB:.0f}",
        f"{paired.a_seconds:.4f}",
        f"{paired.b_seconds:.4f}",
        f"{paired.ratio:.2f}",
        f"{min(paired.ratios):.2f} to {max(paired.ratios):.2f}",
    )


def measure_full_size(
    tokens: int, *, pairs: int, shapes: Shapes = QWEN3_NEXT_80B, seed: int = 1162
) -> FullSize:
    """All of it for a prompt of `tokens`. Needs about 160 KiB of memory a token at full shapes."""
    bench = _Bench(shapes, random.Random(seed), tokens)
    try:
        return bench.run(pairs)
    finally:
        bench.cache.close()
        tidy()


class _Bench:
    def __init__(self, shapes: Shapes, generator: random.Random, tokens: int):
        self.shapes, self.generator = shapes, generator
        self.model = StandIn(shapes)
        self.cache = HybridPromptCache(self.model, memory_budget="1TiB")  # nothing is evicted
        self.prompt = self.random_tokens(tokens + 1)  # the last one is never read

    def random_tokens(self, count: int) -> list[int]:
        return [self.generator.randrange(VOCABULARY) for _ in range(count)]

    def run(self, pairs: int) -> FullSize:
        began = time.perf_counter()
        self.cache.prefill(self.prompt, max_tokens=WRITE).release()
        cold_seconds = time.perf_counter() - began
        checkpoints = self.cache.stats().checkpoints

        ready, restore_peak = self.peak(self.restored)
        position, caches = ready.position, ready.prompt_cache
        right = stands_at(caches, self.prompt[:position])
        restored_bytes = position * self.shapes.row_bytes + self.shapes.snapshot_bytes
        copies, growth_peak = self.growth(caches, self.prompt[:WRITE])
        del ready, caches

        restore = self.measure_restore(position, pairs)
        save, saved_bytes = self.measure_save(pairs)
        held, expected, reported = self.branches()
        return FullSize(
            shapes=next(name for name, each in SHAPES.items() if each == self.shapes),
            tokens=position,
            checkpoints=checkpoints,
            cold_seconds=cold_seconds,
            restore=restore,
            restored_bytes=restored_bytes,
            restore_peak_bytes=restore_peak,
            restored_right=right,
            growth_copies=copies,
            growth_peak_bytes=growth_peak,
            exact_size_growth_copies=self.exact_size_growth(position),
            save=save,
            saved_bytes=saved_bytes,
            branch_bytes=held,
            branch_expected_bytes=expected,
            branch_reported_bytes=reported,
        )

    def restored(self) -> Ready:
        return self.cache.restore(self.prompt, max_tokens=WRITE)

    def peak(self, call: Any) -> tuple[Any, int]:
        """What `call` returns, and by how much memory rose at most while it ran."""
        tidy()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        return call(), mx.get_peak_memory() - before

    def growth(self, caches: list[Any], tokens: list[int]) -> tuple[int, int]:
        """Buffers that changed their size under `tokens` more, and the rise of peak memory."""
        rows: list[Any] = [layer for layer in caches if isinstance(layer, KVCache)]
        sizes = [layer.keys.shape for layer in rows]
        _, peak = self.peak(lambda: self.read(caches, tokens))
        return sum(a.keys.shape != b for a, b in zip(rows, sizes, strict=True)), peak

    def read(self, caches: list[Any], tokens: list[int]) -> None:
        self.model(mx.array(tokens)[None], cache=caches)
        mx.eval([layer.state for layer in caches])

    def exact_size_growth(self, position: int) -> int:
        """The control: one cache without headroom, under the same tokens."""
        shape = (1, self.shapes.kv_heads, position, self.shapes.head_dim)
        layer = KVCache()
        layer.keys, layer.values = mx.zeros(shape, mx.bfloat16), mx.zeros(shape, mx.bfloat16)
        layer.offset = position
        return self.growth([layer], self.prompt[:WRITE])[0]

    def measure_restore(self, position: int, pairs: int) -> Paired:
        """`a` copies arrays of the restored sizes, `b` is `restore`, from tokens to caches."""
        row = (1, self.shapes.kv_heads, position, self.shapes.head_dim)
        arrays = [mx.zeros(row, mx.bfloat16) for _ in range(2 * self.shapes.attention_layers)]
        arrays += self.snapshot_arrays()
        mx.eval(arrays)
        return measure(
            lambda: copied(arrays), self.restored, pairs=pairs, prepare_a=tidy, prepare_b=tidy
        )

    def snapshot_arrays(self) -> list[mx.array]:
        shapes = self.shapes
        states = (1, shapes.value_heads, shapes.value_dim, shapes.key_dim)
        taps = (1, shapes.taps, shapes.channels)
        return [mx.zeros(states) for _ in range(shapes.recurrent_layers)] + [
            mx.zeros(taps, mx.bfloat16) for _ in range(shapes.recurrent_layers)
        ]

    def measure_save(self, pairs: int) -> tuple[Paired, int]:
        """`a` copies a checkpoint and its rows, `b` is `save`, each time `NEW_ROWS` further on."""
        row = (1, self.shapes.kv_heads, NEW_ROWS, self.shapes.head_dim)
        arrays = [mx.zeros(row, mx.bfloat16) for _ in range(2 * self.shapes.attention_layers)]
        arrays += self.snapshot_arrays()
        mx.eval(arrays)
        room = (pairs + 1) * NEW_ROWS
        ready = self.cache.restore(self.prompt, max_tokens=room)
        history = self.prompt[: ready.position]

        def advance() -> None:
            more = self.random_tokens(NEW_ROWS)
            history.extend(more)
            self.read(ready.prompt_cache, more)
            tidy()

        paired = measure(
            lambda: copied(arrays),
            lambda: self.cache.save(history, ready.prompt_cache),
            pairs=pairs,
            prepare_a=tidy,
            prepare_b=advance,
        )
        return paired, self.shapes.snapshot_bytes + NEW_ROWS * self.shapes.row_bytes

    def branches(self) -> tuple[int, int, int]:
        """Bytes held by branches of one prompt: really, by their contents, and as reported."""
        self.cache.clear()
        tidy()
        before = mx.get_active_memory()
        shared = self.prompt[: max(1, len(self.prompt) - 1 - SHARED_LESS)]
        self.cache.prefill(self.prompt, max_tokens=WRITE).release()
        for branch in range(BRANCHES):
            first = branch if branch < self.prompt[len(shared)] else branch + 1
            ending = [first, *self.random_tokens(ENDING)]  # no two begin alike; the last is unread
            self.cache.prefill(shared + ending, max_tokens=WRITE).release()
        stats = self.cache.stats()
        tidy()
        rows = len(self.prompt) - 1 + BRANCHES * ENDING
        expected = rows * self.shapes.row_bytes + stats.checkpoints * self.shapes.snapshot_bytes
        return mx.get_active_memory() - before, expected, stats.held_bytes
