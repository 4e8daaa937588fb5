"""A patch on trial: every arm in every way of reading, the ties that its rows leave, and the verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RouterError
from ..defaults import ROW_TOKENS, ROWS, TEXTS
from ..discovery.calibration import calibration_tokens
from ..patch import Patch
from .arms import DRAWS, Switched, arms, quantized
from .measure import PAIRS, Measurements, measure
from .reading import Way
from .ties import Ties, ties
from .verdict import Verdict, verdict

REPLY_TOKENS = 16
"""Tokens that are written after each text, greedily."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What came out."""

    groups: int
    readings: Measurements
    ties: Ties
    verdict: Verdict
    has_rounder: bool
    """Whether a copy with 8-bit weights was read too; a quantized model has none."""
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "verdict": self.verdict.sentence,
            "helps": self.verdict.helps,
            "groups": self.groups,
            "seconds": self.seconds,
            "weights_only": self.ties.as_json(),
            **self.readings.as_json(),
        }


def trial(
    model: Any,
    patch: Patch,
    texts: Sequence[Sequence[int]],
    *,
    coverages: tuple[float, float] | None = None,
    pairs: Mapping[str, tuple[Way, Way]] = PAIRS,
    draws: int = DRAWS,
    rounder: bool = True,
    reply_tokens: int = REPLY_TOKENS,
    on_text: Callable[[int, int], object] = lambda done, total: None,
) -> Trial:
    """Try `patch` on `model`, which is left as it was, with `texts` of one length.

    `coverages` are those of the patch and of the null model, where they were measured. `rounder` adds a
    copy of the model with 8-bit weights, which takes memory. `on_text` hears how many texts are done.

    Raises `RouterError` for a patch of another model, a model that is patched already, fewer than two texts.
    """
    if len(texts) < 2 or len({len(text) for text in texts}) > 1:
        raise RouterError(
            f"A trial needs at least two texts of one length; {len(texts)} were given. Give a longer file."
        )
    began = time.perf_counter()
    switched = Switched(model)
    twin = quantized(model) if rounder else None
    readings = measure(
        switched,
        patch,
        texts,
        arms(model, patch, draws=draws if patch.groups else 0),
        pairs=pairs,
        rounder=Switched(twin) if twin is not None else None,
        reply_tokens=reply_tokens,
        on_text=lambda done: on_text(done, len(texts)),
    )
    left = ties(switched, patch, texts)
    found = verdict(readings, patch.groups, coverages)
    seconds = time.perf_counter() - began
    return Trial(patch.groups, readings, left, found, twin is not None, seconds)


def fresh_texts(
    tokenizer: Any,
    file: Path | None = None,
    *,
    after: int = ROWS,
    count: int = TEXTS,
    tokens: int = ROW_TOKENS,
) -> list[list[int]]:
    """`count` texts of `tokens` tokens that follow the first `after` rows, those of a calibration.

    Raises `RouterError` when the text is too short for two of them.
    """
    rows = calibration_tokens(tokenizer, file, rows=after + count, row_tokens=tokens)[after:]
    if len(rows) < 2:
        raise RouterError(
            f"{file or 'The bundled text'} ends with what calibration reads. A trial needs texts of its own: "
            f"at least {(after + 2) * tokens:,} tokens in all."
        )
    return rows
