"""Caches that a caller read itself: whether they can be stored, and why they were not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx

from ..caches.layout import Layout
from ..errors import BudgetError, CacheMismatchError
from ..tokens import Tokens, prompt_tokens


def savable(layout: Layout, tokens: Iterable[int], caches: Sequence[Any], *, exact: bool) -> Tokens:
    """What evaluated `caches` have read. Raises `CacheMismatchError` where they cannot be stored as that."""
    history = prompt_tokens(tokens, layout.vocabulary)
    _check_savable(layout, len(history), caches, exact=exact)
    mx.eval([cache.state for cache in caches])  # lazy arrays belong to this thread
    return history


def _check_savable(layout: Layout, tokens: int, caches: Sequence[Any], *, exact: bool) -> None:
    if layout.depends_on_slices(tokens):
        raise CacheMismatchError(
            f"Beyond {layout.slicing_limit:,} tokens what this model computes depends on the "
            f"slices they are read in; use prefill, whose slices are known. Found {tokens:,}."
        )
    if exact or layout.unsupported:
        raise CacheMismatchError(
            "An exact store keeps only what it has read itself; use prefill."
            if exact
            else f"{', '.join(layout.unsupported)} cannot be stored by this version."
        )
    why = layout.mismatch(caches, tokens)
    if why is not None:
        raise CacheMismatchError(f"Cannot save {tokens} tokens: {why}. Nothing was stored.")


def not_saved(layout: Layout) -> BudgetError:
    """What to raise where the store had no room for them."""
    return BudgetError(
        "Nothing was saved: there was no room (raise memory_budget or release caches)"
        + layout.stores_every_slice * ", or rows have left a sliding window"
        + "."
    )
