"""What a router patch does: four arms, read in every way of real serving, held against the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..patch import Patch
from .arms import Arm, Switched, regrouped
from .differences import (
    NO_FLIPS,
    Difference,
    Flips,
    Floats,
    Groups,
    divergence,
    flips,
    log_probabilities,
    perplexity_change,
)
from .reading import Observation, Way, read

AT_ONCE = 4
"""Texts that are read for all arms before the next ones, which bounds the memory that logits take."""

TOKENS_AT_ONCE = 64
"""Positions whose whole distributions are held in float64 at a time."""

OTHER_SLICES = Way(step=37, singly=8)

NOISE = "noise"
QUANTIZED = "8-bit weights"

PAIRS: dict[str, tuple[Way, Way]] = {
    "the same again": (Way(), Way()),
    "other slices": (Way(), OTHER_SLICES),
    "beside others": (Way(), Way(rows=AT_ONCE)),
    "bfloat16": (Way(), Way(rounded=True)),
    f"{NOISE} 0.001": (Way(noise=1e-3), replace(OTHER_SLICES, noise=1e-3)),
}
"""Name -> how a text is read cold and how hot. Noise stands for a device whose rounding depends on the shape
of a slice: cold and hot differ there in both. A quantized copy of the model is one more pair."""


@dataclass(frozen=True, slots=True)
class Compared:
    """An arm beside the original, both read in one and the same way."""

    perplexity: float
    change: Difference
    """Relative change of perplexity: 0.01 is 1 % more."""
    changes: tuple[float, ...]
    """The same for each variant alone."""
    divergence: float
    """KL(original || arm), nats per token."""
    greedy: float
    """Share of positions with the same likeliest next token."""
    top_k: float
    """Share of the chosen experts that the original chose."""
    flips: Flips
    """Experts exchanged against the original."""
    replies: int
    """Texts with the original's reply."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "perplexity": self.perplexity,
            "change": self.change.as_json(),
            "changes": list(self.changes),
            "kl_nats": self.divergence,
            "greedy_agreement": self.greedy,
            "top_k_agreement": self.top_k,
            "flips": self.flips.as_json(),
            "same_replies": self.replies,
        }


@dataclass(frozen=True, slots=True)
class Seen:
    """An arm read cold and hot: what became of the choice of experts and of what is written."""

    flips: Flips
    routed: int
    """Texts in which every token chose the same experts in every layer."""
    replies: int
    """Texts with the same greedy reply."""
    greedy: float
    """Share of positions with the same likeliest next token."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **self.flips.as_json(),
            "same_routing": self.routed,
            "same_replies": self.replies,
            "greedy_agreement": self.greedy,
        }


@dataclass(frozen=True, slots=True)
class Measurements:
    """All that was measured: for each arm its distance from the original and its flips, by pair."""

    texts: int
    tokens: int
    reply_tokens: int
    arms: Mapping[str, Compared]
    seen: Mapping[str, Mapping[str, Seen]]
    """Pair -> arm -> what was seen."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "texts": self.texts,
            "tokens": self.tokens,
            "reply_tokens": self.reply_tokens,
            "arms": {name: each.as_json() for name, each in self.arms.items()},
            "seen": {
                pair: {arm: each.as_json() for arm, each in arms.items()}
                for pair, arms in self.seen.items()
            },
        }


def measure(
    model: Switched,
    patch: Patch,
    texts: Sequence[Sequence[int]],
    arms: Sequence[Arm],
    *,
    pairs: Mapping[str, tuple[Way, Way]] = PAIRS,
    rounder: Switched | None = None,
    reply_tokens: int = 16,
    on_text: Callable[[int], object] = lambda done: None,
) -> Measurements:
    """Read `texts`, at least two and all of one length, in every arm and every pair of ways.

    The first arm is the original. Flips are sorted by the groups of `patch`, in every arm alike.
    `rounder` is the same model with rounder weights, read in each arm beside the plain one.
    """
    measured = _Measured(model, patch, arms, pairs, rounder)
    for start in range(0, len(texts), AT_ONCE):
        measured.add(_Desk([list(text) for text in texts[start : start + AT_ONCE]], reply_tokens))
        on_text(min(start + AT_ONCE, len(texts)))
    return Measurements(
        len(texts),
        sum(len(text) for text in texts),
        reply_tokens,
        {name: tally.result() for name, tally in measured.tallies.items()},
        {
            pair: {arm: tally.result() for arm, tally in by_arm.items()}
            for pair, by_arm in measured.seen.items()
        },
    )


class _Measured:
    """What is known of each arm, while texts come in."""

    def __init__(
        self,
        model: Switched,
        patch: Patch,
        arms: Sequence[Arm],
        pairs: Mapping[str, tuple[Way, Way]],
        rounder: Switched | None,
    ):
        groups = [[group.members for group in layer.groups] for layer in patch.layers]
        names = [*pairs, *([QUANTIZED] if rounder else [])]
        self.tallies = {arm.name: _Tally(groups) for arm in arms}
        self.seen = {pair: {arm.name: _SeenTally(groups) for arm in arms} for pair in names}
        self._model, self._arms, self._pairs, self._rounder = model, arms, pairs, rounder
        self._again = {
            arm.name: regrouped(rounder.model, by) if rounder and (by := arm.patches[0]) else None
            for arm in arms
        }

    def add(self, desk: _Desk) -> None:
        """A few more texts, in every arm. The first one reads what the others are held against."""
        originals: list[_Original] = []
        for arm in self._arms:
            for number, by in enumerate(arm.patches):
                plain = desk.whole(self._model, by, arm.way(Way()))
                originals = originals or list(map(_Original, desk.texts, plain))
                for original, each in zip(originals, plain, strict=True):
                    self.tallies[arm.name].add(number, original, each)
            self._add_pairs(desk, arm)

    def _add_pairs(self, desk: _Desk, arm: Arm) -> None:
        first = arm.patches[0]
        for pair, ways in self._pairs.items():
            self.seen[pair][arm.name].add(*desk.pair(self._model, first, *map(arm.way, ways)))
        if self._rounder is not None:
            way = arm.way(Way())
            cold = desk.read(self._model, first, way)
            hot = desk.read(self._rounder, self._again[arm.name], way)
            self.seen[QUANTIZED][arm.name].add(cold, hot)


@dataclass
class _Desk:
    """A few texts and what was read of them already, so that no arm reads what another has read."""

    texts: list[list[int]]
    reply_tokens: int
    known: dict[tuple[int, str | None, Way, bool], list[Observation]] = field(default_factory=dict)

    def whole(self, model: Switched, by: Patch | None, way: Way) -> list[Observation]:
        """With logits, which are many; they are not kept here."""
        with model.by(by):
            found = read(model.model, model.layers, self.texts, way, reply_tokens=self.reply_tokens)
        self.known.setdefault(_key(model, by, way), [replace(each, logits=None) for each in found])
        return found

    def read(
        self, model: Switched, by: Patch | None, way: Way, *, again: bool = False
    ) -> list[Observation]:
        """Without logits. `again` is a second reading in the same way, which is not the first one."""
        key = _key(model, by, way, again)
        if key not in self.known:
            with model.by(by):
                found = read(
                    model.model, model.layers, self.texts, way, reply_tokens=self.reply_tokens
                )
            self.known[key] = [replace(each, logits=None) for each in found]
        return self.known[key]

    def pair(
        self, model: Switched, by: Patch | None, cold: Way, hot: Way
    ) -> tuple[list[Observation], list[Observation]]:
        """Cold and hot: two readings, even where both are read in one way."""
        return self.read(model, by, cold), self.read(model, by, hot, again=cold == hot)


def _key(
    model: Switched, by: Patch | None, way: Way, again: bool = False
) -> tuple[int, str | None, Way, bool]:
    return id(model), by.digest if by is not None else None, way, again


class _Original:
    """What the original made of a text, and what each arm's reading is held against."""

    def __init__(self, text: Sequence[int], reading: Observation) -> None:
        self.following = np.array(text[1:])
        self.reading = reading
        self.likeliest = reading.likeliest
        self.nats, _ = self.scores(reading)

    def scores(self, reading: Observation) -> tuple[Floats, float]:
        """(T - 1,) -log p of each token that follows; and the sum of KL(original || reading)."""
        nats, total = [], 0.0
        for start in range(0, len(self.following), TOKENS_AT_ONCE):
            following = self.following[start : start + TOKENS_AT_ONCE, None]
            rows = slice(start, start + len(following))
            ours = log_probabilities(_rows(reading, rows))
            nats.append(-np.take_along_axis(ours, following, axis=-1)[:, 0])
            if reading is not self.reading:
                theirs = log_probabilities(_rows(self.reading, rows))
                total += float(divergence(theirs, ours).sum())
        return np.concatenate(nats), total


def _rows(reading: Observation, rows: slice) -> Floats:
    assert reading.logits is not None, "these readings are compared by their logits"
    return np.array(reading.logits[rows].astype(mx.float32))


@dataclass
class _Tally:
    """`Compared` while texts come in. Sums over variants are divided in the end."""

    groups: Sequence[Groups]
    differences: dict[int, list[Floats]] = field(default_factory=dict)
    nats: float = 0.0
    tokens: int = 0
    divergence: float = 0.0
    positions: int = 0
    same: int = 0
    flips: Flips = NO_FLIPS
    replies: int = 0

    def add(self, variant: int, original: _Original, reading: Observation) -> None:
        nats, divergence_sum = original.scores(reading)
        self.differences.setdefault(variant, []).append(nats - original.nats)
        self.nats, self.tokens = self.nats + float(nats.sum()), self.tokens + len(nats)
        self.divergence += divergence_sum
        self.positions += len(original.likeliest)
        self.same += int((original.likeliest == reading.likeliest).sum())
        self.flips += _flips(original.reading, reading, self.groups)
        if variant == 0:
            self.replies += original.reading.reply == reading.reply

    def result(self) -> Compared:
        each = [perplexity_change(Difference.of(texts)).mean for texts in self.differences.values()]
        # Of several variants the mean, token by token: one more draw is no new text.
        by_text = zip(*self.differences.values(), strict=True)
        pooled = Difference.of(np.mean(drawn, axis=0) for drawn in by_text)
        return Compared(
            perplexity=float(np.exp(self.nats / self.tokens)),
            change=perplexity_change(pooled),
            changes=tuple(each),
            divergence=self.divergence / self.tokens,
            greedy=self.same / self.positions,
            top_k=1 - self.flips.share,
            flips=self.flips,
            replies=self.replies,
        )


@dataclass
class _SeenTally:
    """`Seen` while texts come in."""

    groups: Sequence[Groups]
    flips: Flips = NO_FLIPS
    routed: int = 0
    replies: int = 0
    same: int = 0
    positions: int = 0

    def add(self, cold: Sequence[Observation], hot: Sequence[Observation]) -> None:
        for before, after in zip(cold, hot, strict=True):
            found = _flips(before, after, self.groups)
            self.flips += found
            self.routed += found.swapped == 0
            self.replies += before.reply == after.reply
            self.same += int((before.likeliest == after.likeliest).sum())
            self.positions += len(before.likeliest)

    def result(self) -> Seen:
        return Seen(self.flips, self.routed, self.replies, self.same / self.positions)


def _flips(first: Observation, second: Observation, groups: Sequence[Groups]) -> Flips:
    layers = zip(first.selected, second.selected, groups, strict=True)
    return sum((flips(a, b, each) for a, b, each in layers), NO_FLIPS)
