"""The one place that knows mlx-lm's cache classes: which kind each is, and how a model's are built."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_caches
from mlx_lm.models.deepseek_v41 import LayerCache

from . import counting
from .capture import CaptureHook
from .kinds.compressed import CompressedKind, looked_ahead
from .kinds.idle import IdleKind, is_idle
from .kinds.kind import LayerKind
from .kinds.recurrent import RecurrentKind
from .kinds.rows import EVERYWHERE, RowsKind, Span
from .kinds.smaller import FULL, N, StorePrecision
from .kinds.window import ChunkedKind, FullWindowKind, WindowKind
from .quantizing import forwards, trial
from .quantizing.cache import QuantizingCache
from .quantizing.precision import Precision
from .rewritten import Rewritten
from .slicing import MaskListener, rotation_limit
from .subclassed import Subclassed

_KINDS: dict[type, Callable[[Any, int], LayerKind]] = {
    mlx_caches.KVCache: lambda cache, step: RowsKind.seen(cache, headroom=True),
    mlx_caches.ConcatenateKVCache: lambda cache, step: RowsKind.seen(cache, headroom=False),
    mlx_caches.RotatingKVCache: WindowKind.seen,
    mlx_caches.ChunkedKVCache: ChunkedKind.seen,
    mlx_caches.ArraysCache: lambda cache, step: RecurrentKind.seen(cache),
    LayerCache: CompressedKind.seen,
}

STATE_CACHE = partial(mlx_caches.ArraysCache, 1)
"""Makes an empty one for a single array that holds at one position only."""

_BLOCKS = {
    "mamba2": 256,
    "falcon_h1": 256,
    "granitemoehybrid": 256,
    "nemotron_h": 256,
    "plamo2": 256,
    "bailing_hybrid": 128,
    "bailing_moe_linear": 128,
}
"""Families whose recurrent layers are computed in blocks of so many tokens (`ssm_attn` and kin)."""

MOST_BLOCK = 64
"""Tokens of a block that is read to be taken back in part."""

LEARNT_FROM = 8
"""Tokens that a model reads so that its layout is learnt: states that begin with their tokens, such
as the context of n-grams, have their full size by then."""


def fresh_caches(model: Any) -> list[Any]:
    """The model's own empty caches, as mlx-lm makes them."""
    return list(mlx_caches.make_prompt_cache(model))


def replaced(caches: Sequence[Any], which: Collection[int], make: Callable[[], Any]) -> list[Any]:
    """The caches with others in place of the leaves whose numbers are in `which`."""
    numbers = count()

    def opened(cache: Any) -> Any:
        if isinstance(cache, mlx_caches.CacheList):
            return mlx_caches.CacheList(*map(opened, cache.caches))
        return make() if next(numbers) in which else cache

    return [opened(cache) for cache in caches] if which else [*caches]


def leaves(caches: Sequence[Any]) -> list[Any]:
    """The caches with composites opened, in order. A composite returns where all its children can."""
    flat: list[Any] = []
    for cache in caches:
        if isinstance(cache, mlx_caches.CacheList):
            flat.extend(leaves(cache.caches))
        else:
            flat.append(cache)
    return flat


def selects_rows(caches: Sequence[Any]) -> bool:
    """Whether some layer of `caches`, which have read tokens, keeps an index beside its rows.

    That is keys without values, by which sparse attention selects what it looks at (deepseek_v32,
    minimax_m3_vl): nothing of a short prompt is left out.
    """
    beside = [
        child
        for cache in caches
        if isinstance(cache, mlx_caches.CacheList)
        and sum(type(each) is mlx_caches.KVCache for each in cache.caches) > 1
        for child in cache.caches
    ]
    return any(not mx.any(child.state[1]).item() for child in beside)


def _made(model: Any, which: Collection[int], make: Callable[[], Any]) -> list[Any]:
    return replaced(fresh_caches(model), which, make)


def _kind(cache: Any, step: int, swa_full: bool) -> LayerKind:
    if is_idle(cache):
        return IdleKind()
    if swa_full and type(cache) is mlx_caches.RotatingKVCache and cache.keep == 0:
        return FullWindowKind.seen(cache, step)
    return _KINDS[type(cache)](cache, step)


@dataclass(frozen=True)
class Layout:
    """How one model's caches come apart: one kind per leaf, in order, and the leaf's own class.

    `unsupported` names the cache classes that are in no table; a model that has any is served
    without the cache. `vocabulary` is the width of the model's logits. What its forward
    replaces of its own arrays is `rewritten`; `counted` is the model, where its forwards are. The leaves in
    `quantized` keep rows of `precision`, and `split` is the model where its forwards stop at the start. Beyond
    `slicing_limit` tokens, if not None, what the model computes depends on the slices in which a
    prompt is read. In a smaller store, as `storing` says, a token weighs `small_row_bytes` and a checkpoint
    `small_snapshot_bytes`; it counts for at least `least_row_bytes` and `least_snapshot_bytes`, which it weighs on
    another rank of a group. Until `release` the model's own classes may be replaced.
    """

    kinds: tuple[LayerKind, ...]
    classes: tuple[type[Any], ...]
    unsupported: tuple[str, ...]
    hook: CaptureHook | None
    alignment: int
    vocabulary: int
    rewritten: Rewritten | None = None
    slicing_limit: int | None = None
    counted: Subclassed | None = None
    quantized: frozenset[int] = frozenset()
    precision: Precision | None = None
    split: Subclassed | None = None
    storing: StorePrecision = FULL
    small_row_bytes: int = 0
    small_snapshot_bytes: int = 0
    least_row_bytes: int = 0
    least_snapshot_bytes: int = 0

    @classmethod
    def of(
        cls,
        model: Any,
        step: int = 2048,
        *,
        swa_full: bool = False,
        precision: Precision | None = None,
        storing: StorePrecision = FULL,
    ) -> Layout:
        """Learn the layout by letting the model read a few tokens into fresh caches.

        `step` bounds a slice, in tokens; `swa_full` stores every row of sliding windows; `precision` is
        what rows are quantized to where the model's attention can look at such; `storing` is what a smaller
        store keeps of numbers.
        """
        caches, rewritten = fresh_caches(model), Rewritten(model)
        listener = MaskListener(leaves(caches))
        logits = model(mx.array([[0] * LEARNT_FROM]), cache=caches)
        mx.eval(logits, [cache.state for cache in caches], rewritten.learn(model).arrays())
        layout = cls._seen(model, caches, logits.shape[-1], step, swa_full)
        layout = layout._smaller(storing, caches)
        limits = [each for each in (rotation_limit(model), listener.limit) if each is not None]
        layout = replace(layout, rewritten=rewritten, slicing_limit=min(limits, default=None))
        layout = layout._quantized(model, precision, trial.computed)
        mx.eval(layout.lazy())  # which the trial's forwards have left anew
        return layout

    @classmethod
    def traced(
        cls,
        model: Any,
        step: int = 2048,
        *,
        swa_full: bool = False,
        precision: Precision | None = None,
        storing: StorePrecision = FULL,
    ) -> Layout:
        """The same layout without computing anything: the shapes of the forward that `of` runs.

        So the model's parameters may be lazy and larger than this machine. They stay so: whatever asks
        for a value inside a trace gets a `ValueError` from MLX.
        """
        found: list[Layout] = []

        def read(token: mx.array) -> mx.array:
            caches = fresh_caches(model)
            logits = model(token, cache=caches)
            layout = cls._seen(model, caches, logits.shape[-1], step, swa_full)
            found.append(layout._smaller(storing, caches))
            return token

        mx.compile(read)(mx.array([[0] * LEARNT_FROM]))
        return found[0]._quantized(model, precision, trial.traced)

    @classmethod
    def _seen(
        cls, model: Any, caches: Sequence[Any], vocabulary: int, step: int, swa_full: bool
    ) -> Layout:
        """From caches that have read a few tokens, by their classes, shapes and dtypes alone."""
        classes = tuple(type(cache) for cache in leaves(caches))
        names = sorted({each.__name__ for each in classes if each not in _KINDS})
        if names:
            return cls((), classes, tuple(names), None, 1, vocabulary)
        ahead = looked_ahead(model, leaves(caches), fresh_caches, leaves)
        kinds = tuple(_kind(cache, step, swa_full) for cache in ahead)
        counted = None
        if all(
            kind.position(cache) is None for kind, cache in zip(kinds, leaves(caches), strict=True)
        ):
            counted = counting.count(model, leaves)
            kinds = tuple(kind.counted() for kind in kinds)
        blind = {i for i, kind in enumerate(kinds) if not kind.sees_interior}
        hook = CaptureHook.of(model, blind) if blind and len(kinds) == len(caches) else None
        family = type(model).__module__.rpartition(".")[2]
        blocks = _BLOCKS.get(family, 1)
        return cls(kinds, classes, (), hook, blocks, vocabulary, counted=counted)

    def _smaller(self, storing: StorePrecision, caches: Sequence[Any]) -> Layout:
        """The same for a store of that precision. `caches` have read `LEARNT_FROM` tokens: only shapes count."""
        if not storing:
            return self
        each = list(zip(self.kinds, leaves(caches), strict=True)) if self.kinds else []
        return replace(
            self,
            storing=storing,
            small_row_bytes=sum(storing.row_bytes(kind, cache) for kind, cache in each),
            small_snapshot_bytes=sum(
                storing.snapshot_bytes(kind, cache, LEARNT_FROM) for kind, cache in each
            ),
        )

    def _quantized(self, model: Any, precision: Precision | None, takes: trial.Takes) -> Layout:
        """The same with quantized rows in each layer whose attention can look at them."""
        if precision is None:
            return self
        kinds = {
            leaf: kind
            for leaf, each in enumerate(self.kinds)
            if self.classes[leaf] is mlx_caches.KVCache
            and (kind := trial.quantized_kind(each, precision)) is not None
        }
        able = trial.able(model, partial(_made, model), kinds, precision, takes)
        if not able:
            return self
        every = range(len(self.kinds))
        return replace(
            self,
            kinds=tuple(kinds[leaf] if leaf in able else self.kinds[leaf] for leaf in every),
            classes=tuple(
                QuantizingCache if leaf in able else self.classes[leaf] for leaf in every
            ),
            quantized=able,
            precision=precision,
            split=forwards.split(model, leaves) if precision.start else None,
        )

    def fresh_caches(self, model: Any) -> list[Any]:
        """The model's own empty caches, with ours in place of those whose rows are quantized."""
        if self.precision is None:
            return fresh_caches(model)
        return _made(model, self.quantized, partial(QuantizingCache, self.precision))

    def release(self) -> None:
        """Let the model be what it was before: nothing listens to it, counts or stops it any more."""
        for each in (self.hook, self.counted, self.split):
            if each is not None:
                each.release()

    def lazy(self) -> list[mx.array]:
        """Arrays of the model that the last forward left: evaluated, another thread can use them too."""
        return [] if self.rewritten is None else self.rewritten.arrays()

    def depends_on_slices(self, tokens: int) -> bool:
        """Whether reading so many tokens gives one thing or another, as they are cut into slices."""
        return self.slicing_limit is not None and tokens > self.slicing_limit

    @property
    def parts(self) -> int:
        """Over how many ranks the model is spread."""
        return 1

    @property
    def every_kind(self) -> tuple[LayerKind, ...]:
        """Those of all ranks."""
        return self.kinds

    @property
    def needs_snapshots(self) -> bool:
        """Whether some layer restores at checkpoints only."""
        return any(kind.needs_snapshot for kind in self.kinds)

    @property
    def stores_every_slice(self) -> bool:
        """Whether rows leave the live caches, so that each slice must be stored when it is read."""
        return any(isinstance(kind, FullWindowKind) for kind in self.kinds)

    @property
    def goes_back(self) -> bool:
        """Whether drafted tokens can be taken back. mlx-lm asks a fresh cache whether it can be trimmed.

        A window can until it is full. Then nothing is taken back, and the reply is another one.
        """
        return not self.unsupported and all(kind.goes_back for kind in self.kinds)

    @property
    def longest_block(self) -> int:
        """The most tokens of which caches can go back to any: no more than a window keeps."""
        if not all(kind.goes_back_in_blocks for kind in self.kinds):
            return 1
        windows = [kind for kind in self.kinds if isinstance(kind, WindowKind | FullWindowKind)]
        return min([MOST_BLOCK, *(kind.size for kind in windows)])

    def tokens_ahead(self, position: int) -> int:
        """How many tokens behind `position` may be read together.

        None beyond a position that no forward may reach across: where rows are quantized from there on, or
        where slices begin to matter.
        """
        ahead = MOST_BLOCK if self.slicing_limit is None else self.slicing_limit - position
        if position < self.quantized_start:
            ahead = min(ahead, self.quantized_start - position)
        return ahead

    @property
    def must_replay(self) -> bool:
        """Whether a position inside a block is only come by again: no hook has the states there."""
        return self.hook is None and any(isinstance(kind, RecurrentKind) for kind in self.kinds)

    def block_bytes(self, tokens: int) -> int:
        """Bytes beside the live caches' own while they may go back inside a block of so many tokens."""
        states = 2 if self.must_replay else tokens
        return sum(
            kind.block_bytes(states if isinstance(kind, RecurrentKind) else tokens)
            for kind in self.kinds
        )

    @property
    def shares_rows(self) -> bool:
        """Whether live caches have rows and keep them all, so that the store can leave its own there."""
        return self.row_bytes > 0 and not self.stores_every_slice

    @property
    def retains_rows(self) -> bool:
        """Whether another request can go on in the buffers of one that has ended: full rows with headroom,
        stored as they are.
        """
        is_full = self.shares_rows and not self.storing and self.precision is None
        rows = [kind for kind in self.kinds if kind.row_bytes]
        return is_full and all(isinstance(kind, RowsKind) and kind.headroom for kind in rows)

    @property
    def must_pause(self) -> bool:
        """Whether a checkpoint inside a slice costs a forward of its own."""
        return self.hook is None and any(not kind.sees_interior for kind in self.kinds)

    @property
    def merges(self) -> bool:
        """Whether mlx-lm makes batches of such caches in which a reply can be the same as alone.

        Of rows and states it does. A window's ring is summed in another order there, and other caches
        cannot be merged. What the attention makes of a batch is for `batching` to show.
        """
        return all(each in (mlx_caches.KVCache, mlx_caches.ArraysCache) for each in self.classes)

    @property
    def row_heads(self) -> frozenset[int]:
        """How many key-value heads the layers with rows have."""
        return frozenset(kind.shapes[0][1] for kind in self.kinds if isinstance(kind, RowsKind))

    @property
    def row_bytes(self) -> int:
        """Bytes that one token's rows weigh."""
        return sum(kind.row_bytes for kind in self.kinds)

    def rows_nbytes(self, start: int, end: int) -> int:
        """Bytes that the stored rows of `[start, end)` weigh."""
        if self.storing:
            return (end - start) * self.small_row_bytes
        return sum(kind.rows_nbytes(start, end) for kind in self.kinds)

    @property
    def array_bytes(self) -> int:
        """Bytes of one token in the largest array of rows: one layer's keys, or its values."""
        return max((kind.array_bytes for kind in self.kinds), default=0)

    @property
    def snapshot_bytes(self) -> int:
        """Bytes that one checkpoint weighs at most."""
        return sum(kind.snapshot_bytes for kind in self.kinds)

    @property
    def stored_row_bytes(self) -> int:
        """Bytes that one token's rows weigh in the store."""
        return self.small_row_bytes if self.storing else self.row_bytes

    @property
    def stored_snapshot_bytes(self) -> int:
        """Bytes that one checkpoint weighs in the store at most."""
        return self.small_snapshot_bytes if self.storing else self.snapshot_bytes

    def restoring_bytes(self, tokens: int, cut_tokens: int = 0) -> int:
        """Bytes held for a moment while caches are filled with `tokens` that are stored.

        MLX makes copies of a stretch that is restored in part, of `cut_tokens`, an array at a time. What
        is small becomes full a layer at a time; so do full rows before the start become quantized.
        """
        if not self.storing:
            start = self.quantized_start if tokens > self.quantized_start else 0
            beginning = start * max((kind.row_bytes for kind in self.kinds), default=0)
            return cut_tokens * self.array_bytes + beginning
        rows = tokens * max(kind.row_bytes for kind in self.kinds)
        return rows + 2 * max(kind.snapshot_bytes for kind in self.kinds)

    def stored(self, leaf: int, snapshot: N) -> N:
        """A state of the layer number `leaf` as the store keeps it, unevaluated."""
        return self.storing.snapshot(self.kinds[leaf], snapshot)

    def running_bytes(self, capacity: int) -> int:
        """Bytes that a live set of caches holds with room for `capacity` tokens."""
        return sum(kind.buffer_nbytes(capacity) + kind.running_bytes for kind in self.kinds)

    def growth_bytes(self, capacity: int, rows: int) -> int:
        """What it holds more with room for so many tokens more."""
        return self.running_bytes(capacity + rows) - self.running_bytes(capacity)

    def largest_buffer_bytes(self, capacity: int) -> int:
        """Bytes of the one layer's rows that weigh most, with room for `capacity` tokens."""
        return max((kind.buffer_nbytes(capacity) for kind in self.kinds), default=0)

    @property
    def largest_snapshot_bytes(self) -> int:
        """Bytes of the one layer's snapshot that weighs most."""
        return max((kind.snapshot_bytes for kind in self.kinds), default=0)

    def largest_layer_bytes(self, capacity: int) -> int:
        """Bytes of the one layer in a batch that weighs most, for each reply, with room for `capacity` tokens."""
        return max(
            (kind.running_bytes + capacity * kind.row_bytes for kind in self.kinds), default=0
        )

    @property
    def quantized_start(self) -> int:
        """The position where slices must end because rows are quantized from there on; 0 for none."""
        return 0 if self.precision is None else self.precision.start

    @cached_property
    def spans(self) -> tuple[tuple[Span, ...], ...]:
        """Of which positions each array of rows has them, by layer; empty where all have all."""
        if not any(kind.spans for kind in self.kinds):
            return ()
        return tuple(kind.spans or (EVERYWHERE, EVERYWHERE) for kind in self.kinds)

    def spans_of(self, leaf: int, arrays: int) -> tuple[Span, ...]:
        """The same of a layer that has so many."""
        return self.spans[leaf][:arrays] if self.spans else (EVERYWHERE,) * arrays

    def mismatch(self, caches: Sequence[Any], position: int) -> str | None:
        """Why `caches` are not this model's standing at `position`; None where they are."""
        found, told = leaves(caches), False
        names = [type(cache).__name__ for cache in found]
        if len(found) != len(self.classes):
            return f"expected {len(self.classes)} plain caches of this model, found {names}"
        for index, (kind, cache) in enumerate(zip(self.kinds, found, strict=True)):
            expected = self.classes[index]
            if type(cache) is not expected:
                return f"layer {index} has a {names[index]}, this model a {expected.__name__}"
            if cache.empty() and not isinstance(kind, IdleKind):
                return f"layer {index} has read nothing"
            stands = kind.position(cache)
            if stands is not None and stands != position:
                return f"layer {index} stands at {stands} tokens, not at {position}"
            told = told or stands is not None
        if not told:
            return (
                "no layer says how many tokens it has read, and nobody saw this model read them "
                "into these caches; use caches that prefill returned"
            )
        return None

    def stand(self, caches: Sequence[Any], position: int) -> None:
        """Whoever knows that `caches` stand at `position` says so to layers that could not tell."""
        for kind, cache in zip(self.kinds, leaves(caches), strict=True):
            kind.stand(cache, position)
