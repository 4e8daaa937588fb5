"""What other threads see of the trees: always what is there, and made anew only where it changed."""

import random
from contextlib import suppress

import pytest
from stores.outlines import seen, there
from stores.small_store import N, save

from mlx_hybridcache.errors import BudgetError, NotStoredError
from mlx_hybridcache.store import outline
from mlx_hybridcache.store.outline import Outline
from mlx_hybridcache.store.store import Store
from mlx_hybridcache.tokens import Namespace, as_tokens

OTHER = Namespace("n", "salt")


def nodes(each):
    """An outline and all below it."""
    return [each, *(below for child in each.children.values() for below in nodes(child))]


@pytest.fixture
def made(monkeypatch):
    """Every outline that is made."""
    every = []

    class Noted(Outline):
        def __init__(self, node, now):
            every.append(node)
            super().__init__(node, now)

    monkeypatch.setattr(outline, "Outline", Noted)
    return every


def change(store, draw):
    """One of the things that happen to a store."""
    tokens = [draw.randrange(3) for _ in range(draw.randrange(2, 14))]
    space = draw.choice([N, N, OTHER])
    what = draw.randrange(9)
    store.tick()
    if what < 4:
        save(store, tokens, space=space, is_end=draw.random() < 0.3)
    elif what == 4:
        found = store.find(space, as_tokens(tokens))
        if found.position:
            store.use(found)
    elif what == 5:
        with suppress(NotStoredError, BudgetError):
            draw.choice([store.pin, store.unpin])(space, as_tokens(tokens))
    elif what == 6:
        store.shrink(draw.randrange(2000))
    elif what == 7:
        stored, start = store.shared(space, as_tokens(tokens))
        if stored == len(tokens) and not store.pins(space, as_tokens(tokens), start):
            store.drop(space, as_tokens(tokens), start)
    elif draw.random() < 0.1:
        store.clear()


@pytest.mark.parametrize("needs_checkpoints", [True, False])
def test_it_shows_what_is_there_whatever_happened(needs_checkpoints):
    """2,000 saves, uses, pins, evictions, drops: each outline equals the tree, and the last one still
    what it was when it was made.
    """
    draw = random.Random(7)
    store = Store(8_000, needs_checkpoints=needs_checkpoints, max_checkpoints=4)
    before, was = {}, {}
    for step in range(2_000):
        change(store, draw)
        now = store.outlines(float(step))
        assert {name: seen(each) for name, each in before.items()} == was
        trees = {name: tree for name, tree in store._trees.items() if tree.root.children}
        was = {name: seen(each) for name, each in now.items()}
        assert was == {name: there(tree.root) for name, tree in trees.items()}
        for each in now.values():
            total = sum(one.rows_bytes + (one.checkpoint_bytes or 0) for one in nodes(each))
            assert each.below.nbytes == total
            assert each.below.leaves == sum(not one.children for one in nodes(each))
        assert sum(each.below.nbytes for each in now.values()) == store.budget.stored_bytes
        before = now


def test_only_what_changed_is_made_anew(made):
    """A thousand conversations of five runs: a save into one of them makes its path anew, no more."""
    store = Store(10**8, needs_checkpoints=True)
    for k in range(1000):
        store.tick()
        for end in (4, 6, 8, 10, 12):
            save(store, [7, 7, *divmod(k, 40), *range(end - 4)][:end])
    first = store.outlines(1.0)[N]
    everything = len(made)
    assert everything > 4_000
    store.tick()
    save(store, [7, 7, *divmod(500, 40), *range(9)])
    second = store.outlines(2.0)[N]
    assert len(made) - everything <= 10
    assert store.outlines(3.0)[N] is second
    old, new = {id(one) for one in nodes(first)}, nodes(second)
    assert sum(id(one) not in old for one in new) <= 10


def test_the_time_of_a_use_stays_until_the_next():
    """Used at 1, saved beside at 2: still 1. Used at 3: 3. A run that was there at the start has none."""
    store = Store(10**6, needs_checkpoints=True)
    save(store, range(10))
    (run,) = store.outlines(None)[N].children.values()
    assert run.used_at is None
    store.tick()
    save(store, [*range(5), 99])
    (upper,) = store.outlines(2.0)[N].children.values()
    assert (upper.start, upper.end, upper.used_at) == (0, 5, None)
    assert {child.end: child.used_at for child in upper.children.values()} == {10: None, 6: 2.0}
    store.tick()
    store.use(store.find(N, as_tokens(range(11))))
    (upper,) = store.outlines(3.0)[N].children.values()
    assert {child.end: child.used_at for child in upper.children.values()} == {10: 3.0, 6: 2.0}
    assert upper.below.used == (3.0, store.clock)
