"""The store's accounting and what it lets go, with rows and states of known size."""

import random
from contextlib import suppress

import mlx.core as mx
import pytest
from full_scan import conversations

from mlx_hybridcache.caches.checkpoint import Checkpoint
from mlx_hybridcache.caches.kinds.kind import Snapshot
from mlx_hybridcache.caches.kinds.rows import RowBlock
from mlx_hybridcache.errors import BudgetError, NotStoredError
from mlx_hybridcache.store.lazy_rows import rows_before
from mlx_hybridcache.store.store import Store
from mlx_hybridcache.tokens import Namespace, as_tokens

ROW = 16
"""Bytes of one token's rows: a key and a value of two float32 each."""

STATE = 400
"""Bytes of one checkpoint."""


def rows(start, end):
    keys, values = (mx.zeros((1, 1, end - start, 2)) for _ in range(2))
    mx.eval(keys, values)
    return RowBlock(start, end, ((keys, values),))


def state(position):
    array = mx.full((100,), float(position))
    mx.eval(array)
    return Checkpoint(position, (None, Snapshot((array,))))


N = Namespace("n")


def save(store, tokens, *, is_end=False, is_branch_point=False, space=N):
    return store.save(
        space,
        as_tokens(tokens),
        lambda start: rows(start, len(tokens)),
        state(len(tokens)) if store.needs_checkpoints else None,
        row_bytes=ROW,
        is_end=is_end,
        is_branch_point=is_branch_point,
    )


def blocks(found):
    """The rows that it restores."""
    return rows_before(found.nodes(), found.position)


def held(store, space=N):
    """What the nodes really hold, counted afresh."""
    tree = store._trees[space]
    return sum(node.rows_nbytes for node in tree.nodes()), sum(
        node.checkpoint.nbytes for node in tree.nodes() if node.checkpoint
    )


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
        N, prompt, [30, 50], branch_points=(30,), row_bytes=ROW, snapshot_bytes=STATE
    )
    assert (wanted, store.evictions) == ([30, 50], 0)
    store.budget.limit(store.budget.limit_bytes - 1)
    wanted = store.afford(
        N, prompt, [30, 50], branch_points=(30,), row_bytes=ROW, snapshot_bytes=STATE
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
    store.save(N, as_tokens(range(30)), lambda start: rows(start, 30), None, row_bytes=ROW)
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


# Limits


def most_on_a_path(store, space=N):
    """The checkpoints of the path that has most."""
    paths = store._trees[space].root.paths()
    return max(sum(node.checkpoint is not None for node in path) for path in paths)


def positions(store):
    return sorted(node.end for _, node in store.checkpoints(N))


@pytest.mark.parametrize("name", ["max_conversations", "max_checkpoints"])
def test_a_limit_is_at_least_one(name):
    """Zero and less are refused by name; one is a limit."""
    for most in (0, -1):
        with pytest.raises(ValueError, match=rf"{name} is {most}; it must be >= 1"):
            Store(1000, needs_checkpoints=True, **{name: most})
    assert getattr(Store(1000, needs_checkpoints=True, **{name: 1}), name) == 1


def test_the_least_recently_used_conversation_goes_and_what_it_shares_stays():
    """Two of three conversations behind 20 common tokens fit: B, unused since, goes with the
    checkpoint at 25 that only it needs.
    """
    store = Store(10**6, needs_checkpoints=True, max_conversations=2)
    shared, a, b, c = list(range(20)), [100] * 10, [101] * 10, [102] * 10
    for tokens in (shared, [*shared, *a], [*shared, *b[:5]], [*shared, *b]):
        store.tick()
        save(store, tokens)
    for asked in (a, c):  # C restores what is common, which is no use of B
        store.tick()
        store.use(store.find(N, as_tokens([*shared, *asked, 1])))
    save(store, [*shared, *c])
    assert [store.find(N, as_tokens([*shared, *x, 1])).position for x in (a, b, c)] == [30, 20, 30]
    stats = store.stats()
    assert (stats.conversations, stats.checkpoints, stats.tokens) == (2, 3, 40)
    assert stats.evictions == 2
    assert (stats.rows_bytes, stats.snapshot_bytes) == (40 * ROW, 3 * STATE) == held(store)


def test_a_conversation_that_had_to_go_is_remembered():
    """Of three one fits; the report of the others can say `evicted`, of a fourth it cannot."""
    store = Store(10**6, needs_checkpoints=True, max_conversations=1)
    for first in (1, 2, 3):
        store.tick()
        save(store, [first] * 10)
        save(store, [first] * 20, is_end=True)
    assert [store.was_evicted(N, as_tokens([f] * 11)) for f in (1, 2, 3, 4)] == [1, 1, 0, 0]
    assert positions(store) == [10, 20]
    assert store.stats().evictions == 4


def test_a_prompt_and_its_reply_are_one_conversation_and_a_branch_is_another():
    """Ends at 10, 20 and 30 of one path: one. A regenerated reply behind 20: two."""
    store = Store(10**6, needs_checkpoints=True)
    path = list(range(30))
    for end in (10, 20, 30):
        save(store, path[:end], is_end=True)
        assert store.stats().conversations == 1
    save(store, [*path[:20], *[100] * 10], is_end=True)
    assert store.stats().conversations == 2
    save(store, path, space=Namespace("other"))
    assert store.stats().conversations == 3


def test_using_a_prompt_keeps_the_reply_behind_it():
    """The end of A's prompt is restored, not that of its reply: A was used, so B goes."""
    store = Store(10**6, needs_checkpoints=True, max_conversations=2)
    for first in (1, 2):
        store.tick()
        save(store, [first] * 10)
        save(store, [first] * 20)
    store.tick()
    store.use(store.find(N, as_tokens([1] * 11)))
    save(store, [3] * 10)
    assert [store.find(N, as_tokens([f] * 21)).position for f in (1, 2, 3)] == [20, 0, 10]


def test_of_conversations_used_alike_the_one_stored_first_goes():
    """Three saved without any request between them: the last two stay."""
    store = Store(10**6, needs_checkpoints=True, max_conversations=2)
    for first in (1, 2, 3):
        save(store, [first] * 10)
    assert [store.find(N, as_tokens([f] * 11)).position for f in (1, 2, 3)] == [0, 10, 10]


def test_the_conversation_being_written_never_goes():
    """One fits: whichever of two namespaces' trees is older, what is written last is there."""
    store = Store(10**6, needs_checkpoints=True, max_conversations=1)
    names = [Namespace("a"), Namespace("b"), Namespace("a")]
    for name in names:
        save(store, range(10), space=name)
        stored = [space for space in names[:2] if list(store.checkpoints(space))]
        assert stored == [name]


def test_pinned_conversations_stay_and_count():
    """Two fit and two are pinned, one of them by its prompt: of all later ones only the last is
    kept, and nothing of the pinned ones goes in vain.
    """
    store = Store(10**6, needs_checkpoints=True, max_conversations=2)
    for first in (1, 2):
        save(store, [first] * 10)
        save(store, [first] * 20)
    store.pin(N, as_tokens([1] * 20))
    store.pin(N, as_tokens([2] * 10))
    for first in (3, 4, 5):
        store.tick()
        save(store, [first] * 10)
        assert store.stats().conversations == 3
    found = [store.find(N, as_tokens([f] * 21)).position for f in (1, 2, 3, 4, 5)]
    assert found == [20, 20, 0, 0, 10]
    assert store.stats().pinned == 2
    store.unpin(N, as_tokens([1] * 20))
    save(store, [5] * 10)  # stored already, which is a save too
    assert store.stats().conversations == 2
    assert store.stats().pinned == 1
    assert store.find(N, as_tokens([1] * 21)).position == 0


def test_a_pinned_beginning_keeps_no_conversation_behind_it_but_the_only_one():
    """One fits, and the 20 tokens that three share are pinned: each makes room for the next."""
    store = Store(10**6, needs_checkpoints=True, max_conversations=1)
    shared = list(range(20))
    save(store, shared)
    store.pin(N, as_tokens(shared))
    for last in (100, 101, 102):
        store.tick()
        save(store, [*shared, *[last] * 10])
        assert positions(store) == [20, 30]
        assert store.find(N, as_tokens([*shared, *[last] * 11])).position == 30


def test_without_checkpoints_every_leaf_is_a_conversation():
    """Rows alone: of three branches behind 20 common tokens the two used last stay."""
    store = Store(10**6, needs_checkpoints=False, max_conversations=2, max_checkpoints=1)
    shared = list(range(20))
    for last in (100, 101, 102):
        store.tick()
        for length in (5, 10):
            assert save(store, [*shared, *[last] * length])
    found = [store.find(N, as_tokens([*shared, *[last] * 11])).position for last in (100, 101, 102)]
    assert found == [20, 30, 30]
    assert store.stats().conversations == 2
    assert store.budget.rows_bytes == 40 * ROW == held(store)[0]
    assert store.was_evicted(N, as_tokens([*shared, *[100] * 11]))


def test_a_path_holds_no_more_checkpoints_than_allowed():
    """60 cuts of one path where 8 are allowed: the last ones stay, fewer and fewer further back, and
    all rows.
    """
    store = Store(10**7, needs_checkpoints=True, max_checkpoints=8)
    path = list(range(6000))
    for cut in range(100, 6001, 100):
        assert save(store, path[:cut], is_end=cut == 6000)
        assert positions(store)[-1] == cut
        assert len(positions(store)) == most_on_a_path(store) == min(cut // 100, 8)
    assert positions(store) == [1600, 3200, 4000, 4800, 5200, 5600, 5900, 6000]
    assert (store.stats().evictions, store.stats().tokens) == (52, 6000)
    assert (
        (store.budget.rows_bytes, store.budget.snapshot_bytes)
        == (6000 * ROW, 8 * STATE)
        == held(store)
    )


def test_the_checkpoint_just_saved_and_the_deepest_one_stay():
    """Two allowed, 300 and 600 stored: 450 comes between them and 300 goes; 100 then sends 450."""
    store = Store(10**6, needs_checkpoints=True, max_checkpoints=2)
    path = list(range(600))
    for cut, left in ((300, [300]), (600, [300, 600]), (450, [450, 600]), (100, [100, 600])):
        assert save(store, path[:cut])
        assert positions(store) == left


def test_every_path_through_a_saved_checkpoint_keeps_the_limit():
    """Two allowed. Saved at 20, where two paths part: each loses its own inner one, or both the
    one that they share.
    """
    shared, a, b = list(range(20)), [100] * 20, [101] * 20
    for cuts, left in (
        (([*shared, *a[:5]], [*shared, *b[:6]]), [20, 40, 40]),
        ((shared[:10],), [20, 40, 40]),
        (([*shared, *a[:5]],), [20, 40, 40]),
    ):
        store = Store(10**6, needs_checkpoints=True, max_checkpoints=2)
        for tokens in (*cuts, [*shared, *a], [*shared, *b], shared):
            assert save(store, tokens)
        assert positions(store) == left
        assert store.stats().evictions == len(cuts)
        assert most_on_a_path(store) == 2


def test_a_path_full_of_pins_refuses_one_more():
    """Two allowed, both pinned: a third is refused on their path, with nothing lost, not beside it."""
    store = Store(10**6, needs_checkpoints=True, max_checkpoints=2)
    path = list(range(30))
    for cut in (10, 20):
        save(store, path[:cut])
        store.pin(N, as_tokens(path[:cut]))
    for refused in (path, path[:15], path[:5]):
        before = store.stats()
        assert not save(store, refused)
        assert store.stats().refusals == before.refusals + 1
        assert positions(store) == [10, 20]
        assert store.stats().held_bytes == before.held_bytes == sum(held(store))
        assert store.stats().nodes == before.nodes
    assert save(store, [*path[:10], *[100] * 10])
    store.unpin(N, as_tokens(path[:20]))
    assert save(store, path)
    assert positions(store) == [10, 20, 30]


def test_where_one_is_allowed_it_is_the_end():
    """Cuts on the way give way to the next; none is taken before a stored end."""
    store = Store(10**6, needs_checkpoints=True, max_checkpoints=1)
    for cut in (10, 20, 30):
        assert save(store, range(cut))
        assert positions(store) == [cut]
    assert not save(store, range(15))
    assert positions(store) == [30]
    assert save(store, [*range(15), *[100] * 15])
    assert positions(store) == [30, 30]


@pytest.mark.parametrize("needs_checkpoints", [True, False])
def test_limits_hold_whatever_comes(needs_checkpoints):
    """500 random saves, claims, pins and unpins under 20,000 bytes, five conversations and three
    checkpoints: after each, limits and budget hold, and bytes are what nodes hold.
    """
    chance = random.Random(3)
    store = Store(
        20_000, needs_checkpoints=needs_checkpoints, max_conversations=5, max_checkpoints=3
    )
    claims = []
    for turn in range(500):
        store.tick()
        whole = [chance.randrange(3)] * chance.randrange(1, 30) + [chance.randrange(9)] * 30
        for cut in sorted(chance.sample(range(1, len(whole)), 4)):
            save(store, whole[:cut])
            stats = store.stats()
            own = conversations(store)
            pinned = sum(any(node.pinned for node in nodes) for nodes in own)
            assert stats.conversations <= max(5, pinned + 1)
            assert most_on_a_path(store) <= 3
            assert store.budget.used_bytes <= store.budget.limit_bytes
            assert (store.budget.rows_bytes, store.budget.snapshot_bytes) == held(store)
        if chance.random() < 0.2:
            claims.append(store.claim(chance.randrange(1, 4000)))
        if claims and (turn % 3 == 0 or sum(claim.nbytes for claim in claims) > 8_000):
            claims.pop(0).release()
        with suppress(BudgetError, NotStoredError):
            (store.pin if chance.random() < 0.3 else store.unpin)(N, as_tokens(whole))
    assert store.stats().evictions > 100


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
