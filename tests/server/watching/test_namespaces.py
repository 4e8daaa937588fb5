"""Two tiers seen as one tree: every token once, every byte once, and each run where it can be told apart."""

import random

import numpy as np
import pytest
from mlx_hybridcache_server.watching.namespaces import named, namespace_trees
from stores.small_store import N, save

from mlx_hybridcache.cache import Outlines
from mlx_hybridcache.disk.segment import PrefixDigest, digest, prefix_keys
from mlx_hybridcache.store.conversations import Runs
from mlx_hybridcache.store.store import Store
from mlx_hybridcache.tokens import Namespace, as_tokens

ON_DISK = Namespace(digest(N))


def store(*prompts, space=N, ends=()):
    """A tier that holds these, with a checkpoint at the end of each."""
    made = Store(10**6, needs_checkpoints=True)
    for prompt in prompts:
        made.tick()
        save(made, prompt, space=space)
    return made


def trees(memory, disk=None):
    on_disk = disk.outlines(9.0) if disk is not None else {}
    return namespace_trees(Outlines(memory.outlines(5.0), on_disk), N)


def grown(tree):
    """Every run of a namespace with the tokens that lead to its end."""
    runs, found = Runs(), []
    waiting = [(start, PrefixDigest(tree.key), []) for start in tree.branches]
    while waiting:
        start, above, before = waiting.pop()
        run = runs.run(start, above)
        tokens = before + np.concatenate(run.tokens).tolist()
        found.append((run, tokens))
        waiting += [(branch, run.digest, tokens) for branch in run.branches]
    return found


def test_a_run_ends_where_prompts_part_ways_in_either_tier():
    """Memory knows 0..9, disk 0..5 and another ending: a run to 6, then one each."""
    memory = store(range(10))
    disk = store([*range(6), 60, 61], range(3), space=ON_DISK)
    (tree,) = trees(memory, disk)
    runs = {(run.start, run.end): run for run, _ in grown(tree)}
    assert set(runs) == {(0, 6), (6, 10), (6, 8)}
    assert runs[0, 6].parts == [(0, 6, True, True)]
    assert runs[6, 10].parts == [(6, 10, True, False)]
    assert runs[6, 8].parts == [(6, 8, False, True)]
    (place,) = runs[0, 6].places
    assert (place.position, place.memory_bytes, place.disk_bytes) == (3, None, 400)


def test_one_run_may_lie_here_and_there():
    """Memory holds 0..4 of what the directory holds to 9, and its own end: one run of two parts."""
    disk = store(range(4), range(10), space=ON_DISK)
    (tree,) = trees(store(range(4)), disk)
    ((run, _),) = grown(tree)
    assert (run.start, run.end) == (0, 10)
    assert run.parts == [(0, 4, True, True), (4, 10, False, True)]
    assert [(p.position, p.memory_bytes, p.disk_bytes) for p in run.places] == [
        (4, 400, 400),
        (10, None, 400),
    ]
    assert (run.memory_bytes, run.disk_bytes) == (4 * 16 + 400, 10 * 16 + 800)


def test_what_is_of_another_model_or_salt_stands_apart():
    """The model's own first, then what has a salt, then what only files know; only that has no salt."""
    memory = store(range(5))
    save(memory, range(5), space=Namespace("n", "alice"))
    disk = store(range(7), space=Namespace("f" * 32))
    own, salted, other = trees(memory, disk)
    assert (own.salt, salted.salt, other.salt) == ("", "alice", None)
    assert own.key == digest(N)
    assert "alice" not in salted.key
    assert other.nbytes == 7 * 16 + 400


@pytest.mark.parametrize("seed", range(4))
def test_any_two_trees_add_up(seed):
    """Random trees: the runs' bytes are the tiers', every prefix is found by its key, all tokens once."""
    draw = random.Random(seed)

    def prompts():
        return [[draw.randrange(3) for _ in range(draw.randrange(1, 14))] for _ in range(25)]

    memory, disk = store(*prompts()), store(*prompts(), space=ON_DISK)
    found = trees(memory, disk)
    (tree,) = found
    runs = grown(tree)
    assert sum(run.memory_bytes for run, _ in runs) == memory.budget.stored_bytes
    assert sum(run.disk_bytes for run, _ in runs) == disk.budget.stored_bytes
    assert tree.nbytes == memory.budget.stored_bytes + disk.budget.stored_bytes
    stored = {
        tuple(tokens.tolist()[: k + 1])
        for tier, space in ((memory, N), (disk, ON_DISK))
        for tokens, _ in tier.checkpoints(space)
        for k in range(len(tokens))
    }
    assert sum(run.end - run.start for run, _ in runs) == len(stored)
    standing = {place.key for run, _ in runs for place in run.places}
    for run, tokens in runs:
        assert run.key == prefix_keys(tree.key, as_tokens(tokens), [len(tokens)])[0]
        assert named(found, run.key)[1].tolist() == tokens
    expected = {
        prefix_keys(tree.key, tokens, [len(tokens)])[0]
        for tier, space in ((memory, N), (disk, ON_DISK))
        for tokens, _ in tier.checkpoints(space)
    }
    assert standing == expected
    assert named(found, "0" * 32) is None


def test_a_second_look_grows_only_what_changed(monkeypatch):
    """A hundred conversations, one more token in one: its run is another object, all others are the same."""
    memory = store(*([7, 7, k, *range(5)] for k in range(100)))
    runs = Runs()

    def look():
        runs.look_again()
        (tree,) = namespace_trees(Outlines(memory.outlines(1.0), {}), N)
        top = runs.run(next(iter(tree.branches)), PrefixDigest(tree.key))
        return {run.key: run for run in (runs.run(b, top.digest) for b in top.branches)}

    before = look()
    memory.tick()
    save(memory, [7, 7, 50, *range(6)])
    after = look()
    assert len(after) == 100
    assert sum(before.get(key) is run for key, run in after.items()) == 99
