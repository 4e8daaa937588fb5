"""The store's accounting and what it lets go, with rows and states of known size."""

import random

import mlx.core as mx
import pytest

from mlx_hybridcache.checkpoint import Checkpoint
from mlx_hybridcache.errors import BudgetError, NotStoredError
from mlx_hybridcache.layers.kind import Snapshot
from mlx_hybridcache.layers.rows import RowBlock
from mlx_hybridcache.store import Store
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


def save(store, tokens, *, is_end=False, space=N):
    return store.save(
        space,
        as_tokens(tokens),
        lambda start: rows(start, len(tokens)),
        state(len(tokens)),
        row_bytes=ROW,
        is_end=is_end,
    )


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
        assert store.used_bytes() <= store.budget_bytes
        assert (store.rows_bytes, store.snapshot_bytes) == held(store)
        assert store.running_bytes == sum(claim.nbytes for claim in claims)
    assert store.stats().evictions > 100


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


def test_namespaces_share_nothing_and_know_of_each_other():
    """The same tokens under two models are two trees; another salt is not even told of them."""
    store = Store(10**6, needs_checkpoints=True)
    save(store, range(10), space=Namespace("a"))
    asked = as_tokens(range(11))
    assert store.find(Namespace("b"), asked).match.matched == 0
    assert store.known_elsewhere(Namespace("b"), asked) == 10
    assert store.known_elsewhere(Namespace("b", "salt"), asked) == 0
    assert store.known_elsewhere(Namespace("a", "salt"), asked) == 0


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


def test_rows_alone_restore_at_any_position_or_at_a_stride():
    """Without snapshots a prompt resumes where it parts ways; in exact mode at a multiple."""
    for stride, expected in ((1, 17), (8, 16)):
        store = Store(10**6, needs_checkpoints=False, stride=stride)
        tokens = as_tokens(range(30))
        store.save(N, tokens, lambda start: rows(start, 30), None, row_bytes=ROW)
        asked = as_tokens([*range(17), 99, 99])
        assert store.find(N, asked).position == expected
        assert sum(block.end - block.start for block in store.find(N, asked).blocks()) == 30


def test_rows_that_a_request_restores_stay_until_it_has_them():
    """Asked for all 20 stored tokens: 10 restores, the checkpoint at 20 may go, its rows may not."""
    store = Store(20 * ROW + 2 * STATE, needs_checkpoints=True)
    save(store, range(10))
    save(store, range(20))
    found = store.find(N, as_tokens(range(20)))
    assert found.position == 10
    claim = store.claim(STATE // 2, found)
    assert store.stats().checkpoints == 1
    assert store.rows_bytes == 20 * ROW
    assert [(block.start, block.end) for block in found.blocks()] == [(0, 10)]
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
    assert store.rows_bytes == 6000 * ROW == held(store)[0]
    blocks = store.find(N, as_tokens([*path, 1])).blocks()
    assert [block.start for block in blocks[1:]] == [block.end for block in blocks[:-1]]
