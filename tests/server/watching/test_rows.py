"""Rows as people look at them: no fork of a few tokens, every byte and every conversation once."""

import random

import numpy as np
import pytest
from mlx_hybridcache_server.watching.namespaces import namespace_trees
from mlx_hybridcache_server.watching.rows import SHORTEST, Rows
from stores.small_store import N, save
from test_namespaces import ON_DISK, store

from mlx_hybridcache.cache import Outlines
from mlx_hybridcache.tokens import TurnMarks, as_tokens

OPENER, USER, SYSTEM = 90, 91, 92
MARKS = TurnMarks(frozenset({OPENER}), (OPENER, USER))


def tree_of(rows, memory, disk=None):
    on_disk = disk.outlines(9.0) if disk is not None else {}
    rows.look_again()
    (tree,) = namespace_trees(Outlines(memory.outlines(5.0), on_disk), N)
    return tree


def below(rows, row):
    return rows.first(rows.below(row), 10_000, "recent")


def tops(rows, tree):
    return rows.first(rows.top(tree), 10_000, "recent")


def told(rows, each):
    """What a row is shown as: from where to where, its conversations, its turns."""
    return each.begins, each.run.end, rows.conversations(each.start), each.turns


def test_what_a_template_puts_first_is_no_row():
    """Four levels of one or two tokens before a real fork: two rows, of all tokens from 0."""
    opened = [OPENER, SYSTEM, 5]
    chats = [[*opened, *range(20), OPENER, USER, k, *range(9)] for k in range(3)]
    asked = [[OPENER, USER, 6, 7, k, *range(30)] for k in range(2)]
    agent = [*opened, 7, *range(40, 60)]
    rows = Rows(MARKS)
    tree = tree_of(rows, store(*chats, *asked, agent))
    found = {told(rows, each) for each in tops(rows, tree)}
    assert found == {(0, 25, 3, (1, 2)), (0, 24, 1, (1, 1)), (0, 35, 1, (1, 1))}
    assert len(rows.top(tree)) == len(tops(rows, tree)) == 4
    shared = next(each for each in tops(rows, tree) if rows.conversations(each.start) == 3)
    assert np.concatenate([*shared.folded, *shared.run.tokens]).tolist() == chats[0][:25]
    assert {told(rows, each) for each in below(rows, shared)} == {(25, 35, 1, (2, 2))}


def test_a_short_run_that_is_pinned_stays_a_row():
    """Three tokens that two prompts share, pinned: somebody must be able to unpin them."""
    memory = store(range(3), [*range(3), *range(20, 40)], [*range(3), *range(40, 60)])
    rows = Rows(TurnMarks())
    assert len(rows.top(tree_of(rows, memory))) == 2
    memory.pin(N, as_tokens(range(3)))
    (row,) = tops(rows, tree_of(rows, memory))
    assert (row.begins, row.run.end, row.turns) == (0, 3, None)


def test_tiers_that_part_ways_within_a_few_tokens_share_no_row():
    """After a restart disk holds one conversation and memory another behind the same opener."""
    rows = Rows(MARKS)
    memory = store([OPENER, USER, *range(30)])
    disk = store([OPENER, SYSTEM, *range(20)], space=ON_DISK)
    tree = tree_of(rows, memory, disk)
    assert {told(rows, each) for each in tops(rows, tree)} == {
        (0, 32, 1, (1, 1)),
        (0, 22, 1, (1, 1)),
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("order", ["recent", "size"])
def test_a_row_is_its_own_and_the_rows_below_it(seed, order):
    """Random trees in two tiers: bytes and conversations add up on every level, each leaf once."""
    draw = random.Random(seed)

    def prompts():
        return [[draw.randrange(2) for _ in range(draw.randrange(1, 40))] for _ in range(40)]

    rows = Rows(TurnMarks(frozenset({1}), (1, 0)))
    memory, disk = store(*prompts()), store(*prompts(), space=ON_DISK)
    tree = tree_of(rows, memory, disk)

    def weight(row):
        return sum(row.start.weight(each) for each in (row.start.in_memory, row.start.on_disk))

    def check(fork, whole, conversations):
        found = rows.first(fork, 10_000, order)
        own = fork.memory_bytes + fork.disk_bytes
        assert len(found) == len(fork)
        assert own + sum(map(weight, found)) == whole
        if found:
            assert sum(rows.conversations(row.start) for row in found) == conversations
        key = (lambda row: row.start.nbytes) if order == "size" else (lambda row: row.start.used)
        assert [key(row) for row in found] == sorted(map(key, found), reverse=True)
        assert [row.run for row in rows.first(fork, 3, order)] == [row.run for row in found[:3]]
        for row in found:
            run = row.run
            assert run.end - run.start >= SHORTEST or not len(run.branches)
            behind = rows.below(row)
            here = weight(row) - run.memory_bytes - run.disk_bytes
            check(behind, here, rows.conversations(row.start))

    leaves = {
        tuple(tokens.tolist())
        for tier, space in ((memory, N), (disk, ON_DISK))
        for tokens, _ in tier.checkpoints(space)
    }
    ends = {
        each for each in leaves if not any(o != each and o[: len(each)] == each for o in leaves)
    }
    assert rows.conversations(tree.start) == len(ends)
    check(rows.top(tree), tree.nbytes, len(ends))


def test_counting_again_looks_only_at_what_changed(monkeypatch):
    """Sixty conversations in both tiers, one goes on: its path is counted, and nothing else. What was
    counted before is forgotten in time.
    """
    monkeypatch.setattr("mlx_hybridcache_server.watching.rows.FEWEST_KNOWN", 20)
    prompts = [[7] * 9 + [k, *range(12)] for k in range(60)]
    memory, disk = store(*prompts), store(*prompts, space=ON_DISK)
    on_disk = disk.outlines(9.0)
    monkeypatch.setattr(disk, "outlines", lambda now: on_disk)
    rows = Rows(TurnMarks())
    known = []
    for k in range(120):
        tree = tree_of(rows, memory, disk)
        assert rows.conversations(tree.start) == 60
        rows.keep(())
        known.append(len(rows._known))
        memory.tick()
        save(memory, [*prompts[k % 60], 99, *([98] * (k // 60))])
    assert known[0] > 60
    assert known[1] <= known[0] + 4
    assert max(known) < 3 * known[0]
