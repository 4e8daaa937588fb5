"""Room: how many rows requests and batches are given, and what they weigh."""

from __future__ import annotations

from bisect import bisect_left

from .layout import Layout

MOST_TOKENS = 2**31
"""More than any prompt has."""

ROW_STEP = 256
"""Buffers are sized in multiples of so many rows, as mlx-lm's own are."""

REPLY_ROOM = 8192
"""Rows kept ready for a reply whose length is not bounded, or bounded higher."""

FIRST_ROOM = 512
"""The same for a reply that gets what fits: it grows, so that many of them do not claim what few need."""


def rounded(rows: int) -> int:
    """So many rows as buffers have."""
    return -(-rows // ROW_STEP) * ROW_STEP


def request_rows(prompt_tokens: int, max_tokens: int, *, best_effort: bool = False) -> int:
    """Rows of a request's caches: its prompt and room for its reply. `max_tokens <= 0` means no limit.

    With `best_effort` there is room for the reply's beginning.
    """
    most = FIRST_ROOM if best_effort else REPLY_ROOM
    room = min(max_tokens, most) if max_tokens > 0 else most
    return rounded(prompt_tokens + room)


def longest_prompt(layout: Layout, budget_bytes: int) -> int | None:
    """The most tokens that a prompt may have for its caches to fit the budget; None: any number."""

    def is_beyond(tokens: int) -> bool:
        return layout.running_bytes(request_rows(tokens, max_tokens=1)) > budget_bytes

    if not is_beyond(MOST_TOKENS):
        return None
    return bisect_left(range(MOST_TOKENS), True, key=is_beyond) - 1


def batch_bytes(layout: Layout, members: int, capacity: int, held_bytes: int) -> tuple[int, int]:
    """What a batch of `members` replies with `capacity` rows each claims, and what more for a moment.

    `held_bytes` are what its members hold. They are let go of a layer at a time as it is merged; where
    lengths differ mlx-lm holds it padded beside the joined one.
    """
    need = members * layout.running_bytes(capacity)
    layer = layout.largest_layer_bytes(capacity + ROW_STEP)
    return need, max(0, need - held_bytes) + 2 * members * layer
