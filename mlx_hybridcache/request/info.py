"""What a cache is for all of its life: what its model needs, and within what it works."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..report import StoreError
from ..tokens import TurnMarks


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """One cache, told to whoever serves or measures it. Counts are tokens unless they say bytes.

    `settings` is the digest that its namespaces begin with. `unsupported` names the model's cache
    classes that cannot be stored; with any, requests are served without the cache.
    `checkpoint_layers` of `layers` restore at checkpoints only. Beyond `slicing_limit`, if not None,
    only what was read in the same slices is shared. `longest_prompt` is the most that a prompt
    may have for its caches to fit `budget_bytes`, None without a limit; `reserve_bytes` of the
    system's memory stay free. Replies share forwards where it `batches`, which they never do where
    no batch of such caches `merges` exactly; mlx-lm's own drafts are for caches that it `goes_back` in. The model is
    spread over `ranks`. In a smaller store a token weighs `stored_row_bytes` and a
    checkpoint `stored_checkpoint_bytes`; `store_error` is what that costs, a `StoreError`, else None.
    """

    settings: str
    marks: TurnMarks
    vocabulary: int
    needs_checkpoints: bool
    unsupported: tuple[str, ...]
    layers: int
    checkpoint_layers: int
    row_bytes: int
    checkpoint_bytes: int
    stored_row_bytes: int
    stored_checkpoint_bytes: int
    store_error: StoreError | None
    slicing_limit: int | None
    longest_prompt: int | None
    budget_bytes: int
    reserve_bytes: int
    exact: bool
    batches: bool
    merges: bool
    goes_back: bool
    ranks: int
    model: Any = field(repr=False)
