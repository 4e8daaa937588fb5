"""Whether replies may decode in batches: shown for the very model, with tokens whose result is known.

The attention code of a model decides what it makes of a batch, not the class of its caches: soft-capped
grouped heads of Gemma 2 take a batch's mask for one by heads, and are silently wrong where the two are as
many; some rotary embeddings take a single offset. So a few sequences of unequal lengths go through what
batches go through here (merging, joining, leaving, coming out again), and every logit is compared with
the one that the sequence has alone.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..caches.layout import Layout, fresh_caches, selects_rows
from .batch import merged

log = logging.getLogger("mlx_hybridcache")

NOISE = 8.0
"""A batch may differ from single sequences by so many times what it makes of the same one twice."""


def shown(model: Any, layout: Layout) -> bool:
    """Whether what this model computes in a batch is what it computes alone; said where it is not."""
    if layout.precision is not None:
        return (
            False  # mlx-lm has no batches of quantized rows, as was said when they were asked for
        )
    if not layout.merges:
        unmerged = sorted(each.__name__ for each in layout.classes if not hasattr(each, "merge"))
        log.info(
            "Replies are decoded one by one: %s.",
            f"mlx-lm makes no batches of a {unmerged[0]}"
            if unmerged
            else "batches of this model's caches are not exact",
        )
        return False
    try:
        objection = _objection(model, layout)
    except Exception as error:  # models raise whatever their arithmetic meets
        objection = f"two at once fail in this model ({error})"
    finally:
        mx.clear_cache()
    if objection is not None:
        log.warning("Replies are decoded one by one: %s.", objection)
    return objection is None


def _objection(model: Any, layout: Layout) -> str | None:
    """What tells a batch from single sequences.

    On a device whose batches have the bits of single sequences it must have them too; on others it must
    be as near as a batch of equals is.
    """
    if layout.slicing_limit is not None:
        return (
            f"beyond {layout.slicing_limit} tokens what this model computes depends on how they are "
            "put together"
        )
    known, off = _in_unequal_batches(model, layout)
    if selects_rows(next(iter(known.caches.values()))):  # of long prompts, too dear to try
        return "sparse attention selects by place in a batch"
    keeps_bits = _keeps_bits(known.logits[0].dtype)
    if off > (0.0 if keeps_bits else NOISE * _in_a_batch_of_equals(known)):
        return f"two at once differ from one alone by up to {off:.3g} in a logit of this model"
    return None


class _Sequence:
    """A stream of tokens that a model reads one by one: its logits, and its caches at positions in `kept`.

    It is read as far as it is asked for.
    """

    def __init__(self, model: Any, length: int, vocabulary: int, kept: Sequence[int]):
        self._model = model
        self.tokens = [(7 + 13 * i * i) % vocabulary for i in range(length)]
        self.logits: list[mx.array] = []
        self.caches: dict[int, list[Any]] = {}
        self._caches, self._kept = fresh_caches(model), kept
        self.behind(max(kept))

    def behind(self, position: int) -> mx.array:
        """The logits behind the token at a position, `(vocabulary,)`, of the sequence by itself."""
        while (at := len(self.logits)) <= position:
            if at in self._kept:  # a state may weigh 100 MB
                self.caches[at] = copy.deepcopy(self._caches)
            self.logits.append(self.step([self.tokens[at]], self._caches)[0])
        return self.logits[position]

    def step(self, tokens: Sequence[int], caches: list[Any]) -> mx.array:
        """The next logits `(len(tokens), vocabulary)` behind one more token for each of a batch."""
        logits: mx.array = self._model(mx.array([*tokens])[:, None], cache=caches)[:, -1]
        mx.eval(logits, [cache.state for cache in caches])
        return logits


def _in_unequal_batches(model: Any, layout: Layout) -> tuple[_Sequence, float]:
    """A sequence, and the largest difference of a logit when parts of it are read in batches.

    Of two and three, and of as many as a layer has key-value heads and of one more: a mask that is
    taken for one by heads fits the first and not the second.
    """
    sizes = sorted({2, 3, *(heads + more for heads in layout.row_heads for more in (0, 1))} - {1})
    lengths = [length ^ 1 for length in range(2, 2 + sizes[-1])]  # the longer of two comes first
    known = _Sequence(model, max(lengths) + len(sizes) + 2, layout.vocabulary, lengths)
    off = [0.0]

    def step(members: list[int], caches: list[Any]) -> None:
        """Each of `members`, which are positions, reads its next token."""
        logits = known.step([known.tokens[position] for position in members], caches)
        off.extend(_apart(row, known.behind(at)) for row, at in zip(logits, members, strict=True))
        members[:] = [position + 1 for position in members]

    members: list[int] = []
    batch: list[Any] = []
    for size in sizes:
        joining = lengths[len(members) : size]
        caches = merged([copy.deepcopy(known.caches[length]) for length in joining])
        for cache, more in zip(batch, caches, strict=False):
            cache.extend(more)
        batch, members = batch or caches, members + joining
        step(members, batch)
    staying = sorted(range(len(members)), key=lambda i: members[i])[:-1]
    for cache in batch:
        cache.filter(staying)
    members = [members[i] for i in staying]
    step(members, batch)
    for i, position in enumerate(members):
        step([position], [cache.extract(i) for cache in batch])
    return known, max(off)


def _in_a_batch_of_equals(known: _Sequence, size: int = 4) -> float:
    """The same when it is read `size` times at once, where nothing is padded."""
    at = max(known.caches)
    equals = merged([copy.deepcopy(known.caches[at]) for _ in range(size)])
    return max(
        _apart(row, known.behind(at)) for row in known.step([known.tokens[at]] * size, equals)
    )


def _keeps_bits(dtype: mx.Dtype) -> bool:
    """Whether products of several rows have the bits of single ones on this device."""
    x = mx.random.uniform(-1, 1, (5, 512), key=mx.random.key(0)).astype(dtype)
    w = mx.random.uniform(-1, 1, (512, 512), key=mx.random.key(1)).astype(dtype)
    return _apart(x @ w, mx.concatenate([x[i : i + 1] @ w for i in range(len(x))])) == 0


def _apart(one: mx.array, other: mx.array) -> float:
    """The largest difference; infinite where either is no number."""
    most = float(mx.abs(one.astype(mx.float32) - other.astype(mx.float32)).max())
    return math.inf if math.isnan(most) else most
