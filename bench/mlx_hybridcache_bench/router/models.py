"""What `bench router` tries: models whose equivalent experts are known, and one that is given."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hybridcache import models
from mlx_hybridcache.router import Discovery, Patch, calibration_tokens, discover
from mlx_hybridcache.router.trial.arms import Switched
from mlx_hybridcache.router.trial.trial import Trial, fresh_texts, trial

from .cloned import clone_experts
from .specialised import held_out_texts, specialised

TRUTH_SEED, TEXT_SEED = 100, 1
"""Texts of the specialised model to calibrate with, and to try on."""

Said = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is read: rows to calibrate with, texts to try on, tokens of each, tokens of a reply."""

    rows: int
    texts: int
    tokens: int
    reply: int


@dataclass(frozen=True)
class Tried:
    """A model, what discovery found in it, and what the patch did."""

    name: str
    discovery: Discovery
    trial: Trial
    planted: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    """For each layer the groups that were planted; None where nobody knows."""
    changed_logits: int | None = None
    """Logits of which any bit changed with the patch; counted where it should change nothing."""

    @property
    def missed(self) -> int:
        """Planted groups that were not found whole; 0 where nobody knows."""
        if self.planted is None:
            return 0
        layers = self.discovery.patch.layers
        found = [{group.members for group in layer.groups} for layer in layers]
        pairs = zip(self.planted, found, strict=True)
        return sum(group not in each for groups, each in pairs for group in groups)

    @property
    def wrong(self) -> int:
        """Groups with experts that were not planted together; 0 where nobody knows."""
        if self.planted is None:
            return 0
        pairs = zip(self.planted, self.discovery.patch.layers, strict=True)
        return sum(
            not any(set(group.members) <= set(truth) for truth in truths)
            for truths, layer in pairs
            for group in layer.groups
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values; the discovery's report without its patch."""
        return {
            "name": self.name,
            "planted": self.planted,
            "changed_logits": self.changed_logits,
            "groups": [
                [list(group.members) for group in layer.groups]
                for layer in self.discovery.patch.layers
            ],
            "discovery": self.discovery.as_json(),
            "trial": self.trial.as_json(),
        }


def try_specialised(seed: int, size: Size, said: Said) -> Tried:
    """One expert for each kind of text, and copies of most."""
    made = specialised(seed)
    name = f"specialised, seed {seed}"
    # Every kind, and every copy of its expert, must come often enough among the rows held out.
    rows = held_out_texts(size.rows, 2 * size.tokens, TRUTH_SEED + seed)
    texts = held_out_texts(size.texts, size.tokens, TEXT_SEED + seed)
    return replace(_tried(name, made.model, rows, texts, size, said), planted=made.groups)


@contextmanager
def cloned(source: Path, unlike: float) -> Iterator[tuple[Path, tuple[Any, ...]]]:
    """A directory, gone at the end, with a model whose experts all stand twice; and its groups."""
    with tempfile.TemporaryDirectory(prefix="bench-router-") as directory:
        target = Path(directory) / "cloned"
        yield target, tuple(clone_experts(source, target, unlike=unlike, seed=0))


def try_cloned(path: Path, groups: tuple[Any, ...], size: Size, said: Said) -> Tried:
    """The bundled model with every expert twice."""
    found = try_model("cloned", str(path), size, said)
    return replace(found, planted=groups)


def try_model(name: str, path: str, size: Size, said: Said, method: Any = "outputs") -> Tried:
    """A model as it is: nobody knows which of its experts are alike."""
    model, tokenizer = models.load(path)
    rows = calibration_tokens(tokenizer, rows=size.rows, row_tokens=size.tokens)
    texts = fresh_texts(tokenizer, after=size.rows, count=size.texts, tokens=size.tokens)
    return _tried(name, model, rows, texts, size, said, method)


def look(path: str, size: Size) -> Discovery:
    """What discovery finds in a model, and nothing more."""
    model, tokenizer = models.load(path)
    return discover(model, calibration_tokens(tokenizer, rows=size.rows, row_tokens=size.tokens))


def _tried(
    name: str, model: Any, rows: Any, texts: Any, size: Size, said: Said, method: Any = "outputs"
) -> Tried:
    said(f"{name}: calibrating")
    found = discover(model, rows, method=method)
    done = trial(
        model,
        found.patch,
        texts,
        coverages=(found.coverage, found.null_coverage),
        reply_tokens=size.reply,
        on_text=lambda done, total: said(f"{name}: {done} of {total} texts"),
    )
    changed = None
    if not found.patch.groups:
        changed = changed_logits(model, found.patch, texts[0])
    gc.collect()
    return Tried(name, found, done, changed_logits=changed)


def changed_logits(model: Any, patch: Patch, text: list[int]) -> int:
    """Logits of one text of which any bit differs once the patch is applied."""
    tokens, switched = mx.array([text]), Switched(model)
    before = np.array(model(tokens).astype(mx.float32)).view(np.uint32)
    with switched.by(patch):
        after = np.array(model(tokens).astype(mx.float32)).view(np.uint32)
    return int((before != after).sum())
