"""Room: how many rows requests and batches are given, and what they weigh."""

from __future__ import annotations

from .layers.adapt import Layout

ROW_STEP = 256
"""Buffers are sized in multiples of so many rows, as mlx-lm's own are."""

REPLY_ROOM = 8192
"""Rows kept ready for a reply whose length is not bounded, or bounded higher."""


def rounded(rows: int) -> int:
    """So many rows as buffers have."""
    return -(-rows // ROW_STEP) * ROW_STEP


def request_rows(prompt_tokens: int, max_tokens: int) -> int:
    """Rows of a request's caches: its prompt and room for its reply. `max_tokens <= 0` means no limit."""
    room = min(max_tokens, REPLY_ROOM) if max_tokens > 0 else REPLY_ROOM
    return rounded(prompt_tokens + room)


def batch_bytes(layout: Layout, members: int, capacity: int, held_bytes: int) -> tuple[int, int]:
    """What a batch of `members` replies with `capacity` rows each claims, and what more for a moment.

    `held_bytes` are what its members hold. They are let go of a layer at a time as it is merged; where
    lengths differ mlx-lm holds it padded beside the joined one.
    """
    need = members * layout.running_bytes(capacity)
    layer = max(
        kind.running_bytes + (capacity + ROW_STEP) * kind.row_bytes for kind in layout.kinds
    )
    return need, max(0, need - held_bytes) + 2 * members * layer
