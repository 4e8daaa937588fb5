"""The store's accounting and what it lets go, with rows and states of known size."""

import random

import pytest
from stores.full_scan import check_values
from stores.small_store import ROW, STATE, N, blocks, held, rows, save, weigh

from mlx_hybridcache.errors import BudgetError, NotStoredError
from mlx_hybridcache.store.store import Store
from mlx_hybridcache.tokens import Namespace, as_tokens


def test_rows_are_stored_once_however_many_checkpoints_share_them():
    """Checkpoints at 10 and 20 and a branch at 15: 25 tokens of rows, three states."""
    store = Store(10**6, needs_checkpoints=True)
    path = list(range(20))
    save(store, path[:10])
    save(store, path)
    save(store, [*path[:15], *range(100, 105)])
    stats = store.stats()
    assert stats.tokens == 25
    assert (stats.rows_bytes, stats.snapshot_bytes) == (25 * ROW, 3 * STATE) == held(store)
    assert stats.checkpoints == 3


def test_checkpoints_of_a_slice_leave_room_to_cut_what_is_stored():
    """Two states are made before either is counted, and the first one's run is cut by copying it."""
    store = Store(10**6, needs_checkpoints=True)
    save(store, range(1000, 1050))
    save(store, range(40))
    prompt = as_tokens([*range(30), *range(100, 120)])
    needed = 20 * ROW + 40 * ROW + 2 * STATE  # new rows, the cut run's other copy, the states
    store.budget.limit(store.budget.used_bytes + needed)
    wanted = store.afford(
        N, prompt, [30, 50], branch_points=(30,), rows_nbytes=weigh, snapshot_bytes=STATE
    )
    assert (wanted, store.evictions) == ([30, 50], 0)
    store.budget.limit(store.budget.limit_bytes - 1)
    wanted = store.afford(
        N, prompt, [30, 50], branch_points=(30,), rows_nbytes=weigh, snapshot_bytes=STATE
    )
    assert (wanted, store.evictions) == ([30, 50], 1)
    assert store.budget.has_room(20 * ROW + 40 * ROW + len(wanted) * STATE)


@pytest.mark.parametrize("parts_at", [100, 200])
def test_the_checkpoint_at_which_prompts_part_ways_is_kept(parts_at):
    """Two like each other inside a stored prompt, where only the one at which it was left counts."""
    store = Store(10**6, needs_checkpoints=True)
    save(store, range(1000), is_end=True)
    for cut in (100, 200):
        save(store, range(cut), is_branch_point=cut == parts_at)
    for other in range(40):
        store.tick()
        save(store, range(5000 + 100 * other, 5080 + 100 * other), is_end=True)
    store.shrink(STATE)
    assert [node.end for _, node in store.checkpoints(N) if node.end in (100, 200)] == [parts_at]


def test_saving_the_same_again_stores_nothing():
    """Twice the same tokens: the first state stays."""
    store = Store(10**6, needs_checkpoints=True)
    save(store, range(10))
    first = next(store.checkpoints(N))[1].checkpoint
    before = store.stats()
    assert save(store, range(10))
    assert store.stats() == before
    assert next(store.checkpoints(N))[1].checkpoint is first


def test_the_budget_is_never_exceeded_and_bytes_are_what_nodes_hold():
    """500 random conversations and claims under 20,000 bytes, checked after each."""
    chance = random.Random(1)
    store = Store(20_000, needs_checkpoints=True)
    claims = []
    for turn in range(500):
        store.tick()
        family = chance.randrange(5)
        tokens = [family] * chance.randrange(1, 40) + [chance.randrange(9)] * chance.randrange(
            1, 40
        )
        save(store, tokens, is_end=chance.random() < 0.3)
        if chance.random() < 0.2:
            claims.append(store.claim(chance.randrange(1, 4000)))
        if claims and (turn % 3 == 0 or sum(claim.nbytes for claim in claims) > 10_000):
            claims.pop(0).release()
        assert store.budget.used_bytes <= store.budget.limit_bytes
        assert (store.budget.rows_bytes, store.budget.snapshot_bytes) == held(store)
        assert store.budget.running_bytes == sum(claim.nbytes for claim in claims)
    assert store.stats().evictions > 100


def test_a_conversation_of_many_runs_goes_from_its_end_as_far_as_it_must():
    """Rows of 10 times 10 tokens fill a store; a request for 75 gets them, and 2 runs stay."""
    store = Store(100 * ROW, needs_checkpoints=False)
    for end in range(10, 101, 10):
        save(store, range(end))
    claim = store.claim(75 * ROW)
    assert store.find(N, as_tokens(range(101))).position == 20
    claim.release()
    store.shrink(10**6)
    assert store.stats().nodes == 0


def test_no_rows_are_kept_that_nothing_restores():
    """Under pressure, every leaf has a checkpoint."""
    store = Store(15_000, needs_checkpoints=True)
    for first in range(40):
        store.tick()
        save(store, [first, *range(30)])
        save(store, [first, *range(30), *range(50, 70)], is_end=True)
    leaves = [node for node in store._trees[N].nodes() if not node.children]
    assert leaves
    assert all(leaf.checkpoint is not None for leaf in leaves)


def test_only_what_was_used_is_refreshed():
    """Of three conversations the one looked up goes, the one restored stays."""
    store = Store(4 * (STATE + 30 * ROW), needs_checkpoints=True)
    for first in (1, 2, 3):
        store.tick()
        save(store, [first] * 30, is_end=True)
    store.tick()
    store.find(N, as_tokens([2] * 31))
    store.use(store.find(N, as_tokens([1] * 31)))
    for first in (4, 5):
        store.tick()
        save(store, [first] * 30, is_end=True)
    assert store.find(N, as_tokens([1] * 31)).position == 30
    assert store.find(N, as_tokens([2] * 31)).position == 0


def test_a_long_conversation_thins_itself_near_its_beginning():
    """60 checkpoints of one path where 20 fit: its end stays densely covered."""
    store = Store(60 * 100 * ROW + 20 * STATE + ROW, needs_checkpoints=True)
    path = list(range(6000))
    store.tick()
    for cut in range(100, 6001, 100):
        assert save(store, path[:cut], is_end=cut == 6000)
    kept = [node.end for _, node in store.checkpoints(N)]
    assert kept[-3:] == [5800, 5900, 6000]
    assert store.find(N, as_tokens(path)).match.matched == 6000
    early = sum(position <= 3000 for position in kept)
    assert 1 <= early < len(kept) / 2


def test_what_cannot_fit_is_refused_before_anything_is_let_go():
    """A claim over the budget leaves the store as it was."""
    store = Store(5000, needs_checkpoints=True)
    save(store, range(50))
    before = store.stats()
    with pytest.raises(BudgetError, match="memory_budget"):
        store.claim(5001)
    assert store.stats() == before


def test_pins_are_kept_and_bounded_to_half_the_budget():
    """One conversation fits into half the budget, two do not."""
    store = Store(4 * (STATE + 30 * ROW), needs_checkpoints=True)
    for first in (1, 2, 3):
        save(store, [first] * 30)
    assert store.pin(N, as_tokens([1] * 40)) == 30
    assert store.pin(N, as_tokens([2] * 40)) == 30
    with pytest.raises(BudgetError, match="half"):
        store.pin(N, as_tokens([3] * 40))
    with pytest.raises(NotStoredError):
        store.pin(N, as_tokens([9]))
    for first in range(10, 20):
        store.tick()
        save(store, [first] * 30, is_end=True)
    assert store.find(N, as_tokens([1] * 31)).position == 30
    store.unpin(N, as_tokens([1] * 40))
    for first in range(20, 30):
        store.tick()
        save(store, [first] * 30, is_end=True)
    assert store.find(N, as_tokens([1] * 31)).position == 0


def test_a_pin_inside_a_run_keeps_no_more_than_it_needs_and_can_be_lifted():
    """Rows of 60 tokens, 40 of them pinned, parted from at 40 and at 20 later: only the 40 stay under
    pressure, and nothing stays once they are unpinned.
    """
    store = Store(130 * ROW, needs_checkpoints=False)
    path = list(range(60))
    save(store, path)
    assert store.pin(N, as_tokens(path[:40])) == 40
    save(store, [*path[:40], *range(100, 105)])
    save(store, [*path[:20], *range(200, 205)])
    store.tick()
    save(store, range(300, 390))
    assert store.find(N, as_tokens([*path, 1])).position == 40
    assert (store.budget.rows_bytes, 0) == (130 * ROW, 0) == held(store)
    assert store.unpin(N, as_tokens(path[:40])) == 40
    assert store.stats().pinned == 0
    store.shrink(10**6)
    assert store.stats().nodes == 0


@pytest.mark.parametrize("needs_checkpoints", [True, False])
def test_a_pin_is_lifted_though_more_of_its_prompt_was_stored_since(needs_checkpoints):
    """Pinned when 29 of its 30 tokens were stored; 30 and a reply are by the time it is unpinned."""
    store = Store(10**6, needs_checkpoints=needs_checkpoints)
    path = list(range(40))
    save(store, path[:29])
    assert store.pin(N, as_tokens(path[:30])) == 29
    save(store, path[:30])
    save(store, path)
    assert store.unpin(N, as_tokens(path[:30])) == 29
    assert store.stats().pinned == 0
    assert store.unpin(N, as_tokens(path[:30])) == 30


def test_a_pin_for_whose_cut_there_is_no_room_is_refused():
    """A full store and a run of 60 tokens: cutting it takes a copy, and nothing else may go."""
    store = Store(70 * ROW, needs_checkpoints=False)
    save(store, range(60))
    claim = store.claim(5 * ROW)
    with pytest.raises(BudgetError):
        store.pin(N, as_tokens(range(20)))
    assert store.stats().pinned == 0
    claim.release()


def test_namespaces_share_nothing_and_know_of_each_other():
    """The same tokens under two models are two trees; another salt is not even told of them."""
    store = Store(10**6, needs_checkpoints=True)
    save(store, range(10), space=Namespace("a"))
    save(store, range(4), space=Namespace("c"))
    asked = as_tokens(range(11))
    assert store.find(Namespace("b"), asked).match.matched == 0
    assert store.known_elsewhere(Namespace("b"), asked) == 10
    assert store.known_elsewhere(Namespace("b", "salt"), asked) == 0
    assert store.known_elsewhere(Namespace("a", "salt"), asked) == 0


def test_a_restore_refreshes_the_checkpoint_that_it_took_and_none_behind_it():
    """20 tokens are asked for again: one must be read, so that at 10 serves, though 20 are matched."""
    store = Store(10**6, needs_checkpoints=True)
    save(store, range(10))
    save(store, range(20))
    store.tick()
    store.use(store.find(N, as_tokens(range(20))))
    assert {node.end: node.last_used for node, _ in store.restoring()} == {10: 1, 20: 0}


def test_nothing_is_left_of_a_salt_whose_prompts_went():
    """2,000 salts of which three fit: three trees and three outlines, also after a save that is refused;
    and none once all is let go.
    """
    store = Store(3 * (STATE + 10 * ROW), needs_checkpoints=True)
    for salt in range(2_000):
        store.tick()
        save(store, range(10), space=Namespace("n", str(salt)))
        if salt % 500 == 0:
            store.outlines(0.0)
    assert not save(store, range(1_000), space=Namespace("n", "too long"))
    left = {Namespace("n", str(salt)) for salt in (1997, 1998, 1999)}
    assert set(store._trees) == set(store.outlines(0.0)) == left
    assert set(store._trees._of_salt) == {name.salt for name in left}
    assert len(store._trees._names) == 3
    store.shrink(10**6)
    assert not store._trees
    assert not store.outlines(0.0)
    assert not store._trees._of_salt
    assert not store._trees._names
    assert save(store, range(10), space=Namespace("n", "7"))
    assert [*store.outlines(0.0)] == [Namespace("n", "7")]


def test_an_evicted_beginning_is_remembered_by_its_digest():
    """The conversation that made room is told apart from one never seen."""
    store = Store(3 * (STATE + 30 * ROW), needs_checkpoints=True)
    for first in range(5):
        store.tick()
        save(store, [first] * 30)
    gone = [f for f in range(5) if store.find(N, as_tokens([f] * 31)).position == 0]
    assert len(gone) == 2
    assert all(store.was_evicted(N, as_tokens([f] * 35)) for f in gone)
    assert not store.was_evicted(N, as_tokens([77] * 35))


def test_rows_alone_restore_at_any_position():
    """Without snapshots a prompt resumes where it parts ways."""
    store = Store(10**6, needs_checkpoints=False)
    store.save(N, as_tokens(range(30)), lambda start: rows(start, 30), None, rows_nbytes=weigh)
    found = store.find(N, as_tokens([*range(17), 99, 99]))
    assert found.position == 17
    assert sum(block.end - block.start for block in blocks(found)) == 30


def test_rows_that_a_request_restores_stay_until_it_has_them():
    """Asked for all 20 stored tokens: 10 restores, the checkpoint at 20 may go, its rows may not."""
    store = Store(20 * ROW + 2 * STATE, needs_checkpoints=True)
    save(store, range(10))
    save(store, range(20))
    found = store.find(N, as_tokens(range(20)))
    assert found.position == 10
    claim = store.claim(STATE // 2, found)
    assert store.stats().checkpoints == 1
    assert store.budget.rows_bytes == 20 * ROW
    assert [(block.start, block.end) for block in blocks(found)] == [(0, 10)]
    assert found.checkpoint is not None
    claim.release()


def test_a_boundary_whose_checkpoint_went_is_merged_away():
    """60 cuts thinned to 20 leave as many nodes as checkpoints, all tokens and all rows."""
    store = Store(60 * 100 * ROW + 20 * STATE + ROW, needs_checkpoints=True)
    path = list(range(6000))
    for cut in range(100, 6001, 100):
        save(store, path[:cut], is_end=cut == 6000)
    save(store, path[:50])
    stats = store.stats()
    assert stats.nodes <= stats.checkpoints + 2
    assert stats.tokens == 6000
    assert store.budget.rows_bytes == 6000 * ROW == held(store)[0]
    found = blocks(store.find(N, as_tokens([*path, 1])))
    assert [block.start for block in found[1:]] == [block.end for block in found[:-1]]


def test_the_store_learns_where_prompts_part():
    """Requests that go on behind what is stored, then some that part 100 tokens before its end."""
    store = Store(1_000_000, needs_checkpoints=True)
    tokens = list(range(300))
    for end in (150, 300):
        save(store, tokens[:end])
    supposed = store.branch_rate.interior
    for _ in range(5):
        store.use(store.find(N, as_tokens([*tokens, 1, 2])))
    assert store.branch_rate.interior < supposed
    for _ in range(10):
        store.use(store.find(N, as_tokens([*tokens[:200], 1, 2])))
    assert store.branch_rate.interior > supposed


@pytest.mark.parametrize("needs", [True, False])
def test_another_models_namespace_may_need_what_the_first_does_not(needs):
    """One model restores at checkpoints, the other anywhere, in one budget: each by its own rule, until both are gone."""
    store, other = Store(200 * ROW + 4 * STATE, needs_checkpoints=needs), Namespace("other")
    store.settle_needs("other", needs_checkpoints=not needs)
    for space in (N, other):
        save(store, range(20), space=space)
        save(store, range(40), space=space)
    at = {store.needs(space): space for space in (N, other)}
    changed = as_tokens([*range(30), 99, 98])
    assert store.find(at[True], changed).position == 20
    assert store.find(at[False], changed).position == 30
    check_values(store)
    store.claim(store.budget.limit_bytes - 60 * ROW).release()
    check_values(store)
    assert 0 < store.stats().tokens < 80
    store.claim(store.budget.limit_bytes).release()
    check_values(store)
    assert store.stats().nodes == 0
    assert held_by_all(store) == (0, 0)


def held_by_all(store):
    """Rows and states, in bytes, of every namespace."""
    return store.budget.rows_bytes, store.budget.snapshot_bytes
