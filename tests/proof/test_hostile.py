"""Hostile concurrency: whoever lags, leaves or is refused, everything stored is what a cold run would leave.

One round of each family but a slow one always, two hundred rounds by `pytest -m long`, the same every time. `HOSTILE_ROUNDS=5000` has
more in the long form, `HOSTILE_ROUND=17` runs one of them.
"""

import os
from typing import Any

import pytest
from hostile import rounds as hostile
from hostile.families import FAMILIES
from hostile.retained import WITH_ROWS, RetainedRound
from long import forms, mostly_long

from mlx_hybridcache.caches.layout import Layout
from mlx_hybridcache.tiers import Tiers

MANY = -(-int(os.environ.get("HOSTILE_ROUNDS", "200")) // len(FAMILIES))
"""Rounds of each family."""

ROUNDS = forms(1, MANY)
SLOW = "rwkv7"

ALONE = os.environ.get("HOSTILE_ROUND")

FLOORS = {"asked": 60, "replies": 50, "compared": 90, "left behind": 1, "evicted": 15}
"""What happens at least in eighteen rounds of one family."""


def seeds(count: int) -> list[int]:
    return list(range(count)) if ALONE is None else [int(ALONE)]


@pytest.mark.parametrize(
    ("name", "rounds"),
    mostly_long(
        [(name, rounds) for name in FAMILIES for rounds in dict.fromkeys((1, MANY))],
        [(name, 1) for name in FAMILIES if name != SLOW],
    ),
)
def test_whatever_is_stored_in_any_order_of_events_equals_cold(name: str, rounds: int) -> None:
    """Replies that lag, end, break, are cancelled or dropped, in batches and budgets for one or for forty,
    under two salts: no checkpoint of any namespace and no reply differs from a cold run of its tokens.
    """
    seen = hostile.run(hostile.Round, name, seeds(rounds))
    floors = FLOORS | {"batched": 20 * FAMILIES[name].batches}
    rare = {what: seen[what] for what, least in floors.items() if seen[what] < least * rounds // 18}
    assert ALONE is not None or rounds < 18 or not rare, f"{rare} in {rounds} rounds"
    assert seen["compared"]
    assert FAMILIES[name].batches or not seen["batched"], "this model is not exact in batches"


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("name", WITH_ROWS)
def test_whatever_goes_on_in_retained_buffers_equals_cold(name: str, rounds: int) -> None:
    """The same for conversations whose turns mostly come one after another: at least every twentieth request is
    resumed in the buffers of one before, though budgets are small.
    """
    seen = hostile.run(RetainedRound, name, seeds(rounds))
    assert seen["compared"]
    assert ALONE is not None or rounds < 18 or seen["taken over"] >= seen["asked"] / 20, seen


@pytest.mark.parametrize("name", mostly_long(FAMILIES, ["mamba", "gemma3_text", "qwen3_next"]))
def test_whatever_threads_leave_behind_equals_cold(name: str) -> None:
    """Three or four clients on threads of their own, each with two or three questions."""
    seen = hostile.run(hostile.ThreadedRound, name, seeds(1))
    assert seen["asked"] >= 6
    assert seen["compared"]


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_rounds_see_states_under_other_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the guard, and with histories that lack the last token: within six rounds one is off."""
    save = Tiers.save_end

    def short(self: Tiers, request: Any, live: Any, history: Any) -> None:
        save(self, request, live, history[: max(1, len(history) - 1)])

    monkeypatch.setattr(Tiers, "save_end", short)
    hostile.run(hostile.Round, name, range(2))  # the guard refuses all of them
    monkeypatch.setattr(Layout, "mismatch", lambda *what: None)
    monkeypatch.setattr(hostile.Round, "save_own", lambda self: None)
    with pytest.raises(AssertionError, match="is off by"):
        hostile.run(hostile.Round, name, range(6))
