"""How many conversations a store keeps, and how many checkpoints on a path: what goes beyond that."""

import random
from contextlib import suppress

import pytest
from stores.full_scan import conversations
from stores.small_store import ROW, STATE, N, held, save

from mlx_hybridcache.errors import BudgetError, NotStoredError
from mlx_hybridcache.store.store import Store
from mlx_hybridcache.tokens import Namespace, as_tokens


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
    assert getattr(Store(1000, needs_checkpoints=True, **{name: 1}).limits, name) == 1


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
