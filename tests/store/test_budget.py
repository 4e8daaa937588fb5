"""The budget's counters: nobody else writes them, and what they say adds up."""

import subprocess
import sys
from collections import Counter

import pytest
from places import ROOT

from mlx_hybridcache.errors import BudgetError
from mlx_hybridcache.store.budget import Budget

COUNTERS = ("_rows_bytes", "_snapshot_bytes", "_running_bytes", "_in_flight_bytes")


def nothing_goes(nbytes, keep, spare):
    raise BudgetError(f"{nbytes} bytes do not fit.")


def filled():
    """Of 100 bytes, 10 each of rows, snapshots, in flight and for a request."""
    budget = Budget(100, nothing_goes)
    budget.keep(rows=20, snapshots=10)
    budget.free(rows=10, in_flight=10)
    return budget, budget.claim(10)


def test_bytes_move_between_counters_and_their_sum_is_what_is_used():
    """20 bytes of rows of which 10 go while others hold them: 10 are rows then, and 10 in flight."""
    budget, claim = filled()
    assert (budget.stored_bytes, budget.running_bytes, budget.in_flight_bytes) == (20, 10, 10)
    assert (budget.used_bytes, budget.freed_bytes) == (40, 10)
    assert claim.abandon(4) == 4
    assert (claim.nbytes, budget.running_bytes, budget.in_flight_bytes) == (6, 6, 14)
    claim.release()
    budget.settle(14)
    assert (budget.used_bytes, budget.freed_bytes) == (20, 16)
    budget.given_back()
    assert budget.freed_bytes == 0


@pytest.mark.parametrize("name", COUNTERS)
@pytest.mark.parametrize("by", [-11, -1, 1])
def test_a_counter_that_was_written_wrongly_is_noticed_at_the_next_change(name, by):
    """One byte too many or too few in one of them, or less than none."""
    budget, claim = filled()
    setattr(budget, name, getattr(budget, name) + by)
    with pytest.raises(AssertionError):
        claim.shrink(5)


@pytest.mark.parametrize(
    "more",
    [
        lambda budget: budget.keep(rows=61),
        lambda budget: budget.keep(snapshots=61),
        lambda budget: budget.claim(61),
        lambda budget: budget.hold(61),
    ],
)
def test_what_does_not_fit_is_never_added(more):
    """40 of 100 bytes are used, and nobody has made room for 61."""
    budget, _ = filled()
    with pytest.raises(AssertionError, match="more than 100"):
        more(budget)


@pytest.mark.parametrize(
    "less",
    [
        lambda budget: budget.free(rows=11),
        lambda budget: budget.free(snapshots=11),
        lambda budget: budget.settle(11),
    ],
)
def test_nothing_goes_that_is_not_there(less):
    """Ten bytes of each."""
    budget, _ = filled()
    with pytest.raises(AssertionError, match="less than nothing"):
        less(budget)


def test_room_is_made_by_whoever_was_named_and_only_where_there_is_none():
    """60 bytes are free; for 61 something must go."""
    asked = Counter()
    budget = Budget(100, lambda nbytes, keep, spare: asked.update([nbytes]))
    budget.keep(rows=40)
    budget.make_room(60)
    assert not asked
    budget.make_room(61)
    assert asked == {61: 1}
    budget.limit(30)  # what is over it stays until room is made
    budget.free(rows=5)
    budget.make_room(0)
    assert asked == {61: 1, 0: 1}


ALONE = """
import importlib, pkgutil, sys, types
package = types.ModuleType("mlx_hybridcache")  # without what its own `__init__` imports
package.__path__ = [sys.argv[1]]
sys.modules["mlx_hybridcache"] = package
store = importlib.import_module("mlx_hybridcache.store")
for each in pkgutil.walk_packages(store.__path__, "mlx_hybridcache.store."):
    importlib.import_module(each.name)
    print(each.name)
assert not {"mlx", "mlx_lm", "transformers"} & {name.partition(".")[0] for name in sys.modules}
"""


def test_the_store_needs_no_mlx():
    """Every module of it, imported in a process of its own."""
    told = subprocess.run(
        [sys.executable, "-c", ALONE, str(ROOT / "mlx_hybridcache")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    assert "mlx_hybridcache.store.materialize" in told.stdout.split()
