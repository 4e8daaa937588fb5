"""What has a time to live goes after all that has none, within half the budget, and until its time is over."""

from collections import Counter

import pytest
from stores import full_scan
from stores.small_store import ROW, STATE, N, save, weigh

from mlx_hybridcache.errors import BudgetError
from mlx_hybridcache.store.eviction.pins import Pins
from mlx_hybridcache.store.eviction.soft_pins import SPARE, SoftPins
from mlx_hybridcache.store.store import Store
from mlx_hybridcache.tokens import as_tokens

ONE = STATE + 10 * ROW
"""A conversation of ten tokens with its checkpoint."""


@pytest.fixture
def now():
    """The clock: a list with the seconds."""
    return [0.0]


@pytest.fixture
def store(now):
    """Room for ten conversations, of which five may have a soft pin."""
    made = Store(10 * ONE, needs_checkpoints=True)
    made.seconds = lambda: now[0]
    return made


def tokens(first, length=10):
    return list(range(100 * first, 100 * first + length))


def keep(store, first, seconds=300.0):
    return store.hold(N, as_tokens(tokens(first)), {10: seconds})


def stored(store):
    """The conversations that are there, by their first token."""
    return sorted(int(tokens[0]) // 100 for tokens, _ in store.checkpoints(N))


def fill(store, firsts):
    for first in firsts:
        store.tick()
        save(store, tokens(first), is_end=True)


def test_what_has_a_time_to_live_goes_after_all_that_has_none(store):
    """The oldest two of ten are kept: eight others go for nine new ones before one of them does."""
    fill(store, range(10))
    assert keep(store, 0) == keep(store, 1) == {10}
    fill(store, range(10, 18))
    assert stored(store) == [0, 1, *range(10, 18)]
    assert store.stats().soft_pinned == 2
    full_scan.check_values(store)


def test_a_soft_pin_refuses_nothing(store):
    """A request that needs all of the budget gets it; the pin whose time ends first goes before the other."""
    fill(store, range(4))
    keep(store, 0, 100.0)
    keep(store, 1, 50.0)
    store.claim(9 * ONE).release()
    assert stored(store) == [0]
    store.claim(10 * ONE).release()
    assert stored(store) == []
    with pytest.raises(BudgetError):
        store.claim(10 * ONE + 1)


def test_a_use_begins_the_time_anew_and_the_clock_ends_it(store, now):
    """300 s, used after 299: kept at 598, and like everything else at 599."""
    fill(store, range(10))
    keep(store, 0)
    now[0] = 299.0
    store.use(store.find(N, as_tokens([*tokens(0), 1])))
    now[0] = 598.0
    assert store.stats().soft_pinned == 1
    now[0] = 599.0
    assert store.stats().soft_pinned == store.stats().soft_pinned_bytes == 0
    fill(store, range(10, 20))
    assert 0 not in stored(store)


def test_what_is_kept_for_an_hour_is_not_cut_down_to_minutes(store, now):
    """The same place is named with 3,600 s and then with 300."""
    fill(store, [0])
    keep(store, 0, 3600.0)
    keep(store, 0, 300.0)
    now[0] = 3599.0
    assert store.stats().soft_pinned == 1


def test_half_of_the_budget_may_have_soft_pins(store, now):
    """Seven of ten are kept one after another: the last five have it, whose times end last."""
    fill(store, range(10))
    for first in range(7):
        now[0] += 1
        keep(store, first)
    assert store.stats().soft_pinned == 5
    assert store.stats().soft_pinned_bytes == 5 * ONE
    fill(store, range(10, 15))
    assert stored(store) == [*range(2, 7), *range(10, 15)]


def test_what_alone_is_more_than_half_is_not_kept_and_lifts_no_other(store):
    """A conversation of 6/10 of the budget."""
    fill(store, [0])
    keep(store, 0)
    long = list(range(1000, 1000 + (6 * ONE - STATE) // ROW))
    save(store, long)
    assert store.hold(N, as_tokens(long), {len(long): 300.0}) == set()
    assert store.stats().soft_pinned == 1


def test_what_leads_to_several_is_weighed_once(store):
    """Two conversations of 20 tokens behind the same 10 with a checkpoint of its own: 30 rows and three states."""
    save(store, tokens(0))
    for first in (1, 2):
        save(store, [*tokens(0), *tokens(first)])
        store.hold(N, as_tokens([*tokens(0), *tokens(first)]), {20: 300.0, 10: 300.0})
    assert store.stats().soft_pinned_bytes == 30 * ROW + 3 * STATE


def test_a_cut_that_will_be_kept_is_not_left_out_for_what_has_no_soft_pin(store):
    """A full store of conversations that were just used: of three cuts in a new slice the declared one is taken."""
    for first in range(10):
        save(store, tokens(first), is_end=True)
    prompt, cuts = as_tokens(range(5000, 5012)), [2, 4, 12]
    asked = {"branch_points": (), "rows_nbytes": weigh, "snapshot_bytes": STATE}
    assert 2 not in store.afford(N, prompt, cuts, **asked)
    assert 2 in store.afford(N, prompt, cuts, lasting={2}, **asked)


@pytest.mark.parametrize("needs_checkpoints", [True, False])
def test_limits_take_what_has_a_time_to_live_last(needs_checkpoints):
    """At most three conversations: the oldest is kept, so the second goes; all kept, the oldest does."""
    store = Store(10**9, needs_checkpoints=needs_checkpoints, max_conversations=3)
    store.seconds = lambda: 0.0
    fill(store, range(3))
    keep(store, 0)
    fill(store, [3])
    assert not store.find(N, as_tokens([*tokens(1), 1])).position
    assert store.find(N, as_tokens([*tokens(0), 1])).position == 10
    for first in (2, 3):
        keep(store, first)
    fill(store, [4])
    assert not store.find(N, as_tokens([*tokens(0), 1])).position


def test_a_path_that_is_full_loses_what_has_no_time_to_live_first():
    """At most three checkpoints on a path, the first of them kept."""
    store = Store(10**9, needs_checkpoints=True, max_checkpoints=3)
    store.seconds = lambda: 0.0
    prompt = list(range(40))
    for end in (10, 20, 30):
        save(store, prompt[:end])
    store.hold(N, as_tokens(prompt), {10: 300.0})
    save(store, prompt)
    assert next(len(each) for each, _ in store.checkpoints(N)) == 10


def test_where_rows_alone_restore_the_leaf_behind_a_place_is_kept():
    """Ten conversations without states; the oldest is kept, and its rows up to the end of their run."""
    store = Store(100 * ROW, needs_checkpoints=False)
    store.seconds = lambda: 0.0
    fill(store, range(10))
    assert store.hold(N, as_tokens(tokens(0)), {5: 300.0}) == {10}
    fill(store, range(10, 19))
    assert store.find(N, as_tokens([*tokens(0), 1])).position == 10


def test_what_is_forgotten_has_no_soft_pin_any_more(store):
    """Dropped, and cleared."""
    fill(store, range(3))
    keep(store, 0)
    keep(store, 1)
    store.drop(N, as_tokens(tokens(0)), 0)
    assert store.stats().soft_pinned == 1
    store.clear()
    assert store.stats().soft_pinned == store.stats().soft_pinned_bytes == 0


def counted(seen, name, plain):
    """The same, and how often it was called."""

    def watched(*args):
        seen[name] += 1
        return plain(*args)

    return watched


def looked_at(monkeypatch, size):
    """How many nodes are weighed and looked at for ten soft pins that come and ten that go."""
    seen, now = Counter(), [0.0]
    store = Store(10**9, needs_checkpoints=True)
    store.seconds = lambda: now[0]
    shared = list(range(30))
    for first in range(100, 100 + size):
        now[0] += 1
        save(store, [*shared, first, 1, 2])
        store.hold(N, as_tokens([*shared, first, 1, 2]), {33: 10.0**6})
    store.stats()
    with monkeypatch.context() as watching:
        for owner, name in ((Pins, "_keep"), (Pins, "_let_go"), (SoftPins, "_wait")):
            watching.setattr(owner, name, counted(seen, name, getattr(owner, name)))
        for first in range(10):
            save(store, [*shared, 50 + first, 1, 2])
            store.hold(N, as_tokens([*shared, 50 + first, 1, 2]), {33: 10.0**7})
        now[0] = 10.0**6 + 10
        assert store.stats().soft_pinned == size
    return seen


def test_what_soft_pins_cost_does_not_grow_with_their_number(monkeypatch):
    """100 or 2,000 of them behind one system prompt: as many nodes are looked at for ten more and ten less."""
    assert looked_at(monkeypatch, 100) == looked_at(monkeypatch, 2_000)


def test_what_led_to_a_dropped_one_is_kept_no_longer():
    """Behind ten tokens two go on alike for five; one is kept and goes for a limit: nothing is, and runs join."""
    store = Store(10**9, needs_checkpoints=True, max_conversations=2)
    store.seconds = lambda: 0.0
    save(store, tokens(0))
    shared = [*tokens(0), *range(70, 75)]
    kept, other = [*shared, 80, 81], [*shared, 90, 91]
    save(store, kept)
    save(store, other)
    store.hold(N, as_tokens(kept), {17: 300.0})
    assert store.stats().soft_pinned_bytes == 17 * ROW + STATE
    store.pin(N, as_tokens(other))
    save(store, tokens(1))
    assert store.find(N, as_tokens([*kept, 1])).position == 10
    assert store.stats().soft_pinned_bytes == 0
    full_scan.check_values(store)


def test_a_place_whose_state_is_lost_is_kept_no_longer(store):
    """The first of two checkpoints on a path is kept; what stands there is found to be of no use."""
    save(store, tokens(0))
    save(store, [*tokens(0), *tokens(1)])
    keep(store, 0)
    store.forget(store.find(N, as_tokens([*tokens(0), 1])).node, rows=False)
    assert (store.stats().soft_pinned, store.stats().soft_pinned_bytes) == (0, 0)


def test_pins_of_what_is_gone_do_not_pile_up(store):
    """200 conversations come and go behind one whose time ends first: few of them wait in line."""
    fill(store, [999])
    keep(store, 999, seconds=1.0)
    for first in range(200):
        fill(store, [first])
        keep(store, first)
        store.drop(N, as_tokens(tokens(first)), 0)
    assert len(store._values.soft._line) <= SPARE + 2
