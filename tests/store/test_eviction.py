"""What goes first is what looking at everything would say, whatever happened before."""

import random
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import pytest
from long import forms
from mlx_hybridcache_bench.policies.simulate import Simulation
from mlx_hybridcache_bench.policies.sized import (
    SHAPES,
    SizedCache,
    SizedCaches,
    SizedCheckpoint,
    SizedLayout,
    SizedRows,
)
from mlx_hybridcache_bench.policies.workloads import WORKLOADS, workload
from stores import full_scan
from stores.full_scan import FullScan
from stores.small_store import ROW, STATE, N, save, weigh

from mlx_hybridcache.errors import BudgetError, NotStoredError
from mlx_hybridcache.store.eviction import policy, values
from mlx_hybridcache.store.eviction.choose import Eviction
from mlx_hybridcache.store.eviction.limits import Limits
from mlx_hybridcache.store.eviction.policy import Weights
from mlx_hybridcache.store.eviction.ranking import BLOCK, Ranking
from mlx_hybridcache.store.eviction.values import NodeValues
from mlx_hybridcache.store.materialize import Materializer
from mlx_hybridcache.store.outline import Outline
from mlx_hybridcache.store.store import Store
from mlx_hybridcache.store.tree import Node
from mlx_hybridcache.tokens import Namespace, as_tokens

SPACES = [N, N, N, Namespace("n", "salt"), Namespace("m")]


class Checked(Eviction):
    """Every choice beside the full scan's."""

    def first(self):
        line = full_scan.in_line(self.store)
        found = super().first()
        lifted = [node for node in line if node.soft_pin is None]
        assert lifted == line[: len(lifted)]
        if lifted:  # only where nothing else could go, and no more of them than it takes
            assert self.alone
            assert found in (lifted[-1], None)
        self.store.seen["lifted"] += len(lifted)
        return found

    def _look(self):
        found = super()._look()
        self.alone = found is None or getattr(self, "alone", False)
        scan = self.scan
        assert found == scan.first()
        assert self.fixed_bytes() == scan.fixed_bytes()
        self.store.seen["choices"] += 1
        self.store.seen["kept"] += bool(self.kept)
        self.store.seen["dead"] += found is not None and found[0] < 0
        return found


class CheckedLimits(Limits):
    """Every conversation that is one too many beside the full scan's."""

    def surplus(self, written):
        found = super().surplus(written)
        assert found is full_scan.surplus(self.store, written)
        self.store.seen["surplus"] += found is not None
        return found


class CheckedStore(Store):
    """Every choice that is made for it beside the full scan's, and how often it was made."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen, self.seconds = Counter(), lambda: self.clock / 10
        self.limits.__class__, self.limits.store = CheckedLimits, self

    def _eviction(self, keep=(), spare=None):
        super()._eviction(keep, spare)  # whose time is over
        eviction = Checked(
            self._values, frozenset(keep), spare, self.clock, self.branch_rate.interior
        )
        eviction.store = self
        eviction.scan = FullScan(self, eviction.kept, spare)
        return eviction


def change(store, draw, claims):
    """One of the things that happen to a store."""
    store.tick()
    space = draw.choice(SPACES)
    tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 5))]
    tokens += [draw.randrange(3)] * draw.randrange(1, draw.choice([4, 10, 150]))
    prompt = as_tokens(tokens)
    what = draw.randrange(19)
    if what < 6:
        cuts = sorted(draw.sample(range(1, len(tokens) + 1), min(len(tokens), draw.randrange(4))))
        for cut in cuts:
            is_branch_point = draw.random() < 0.2
            save(
                store,
                tokens[:cut],
                space=space,
                is_end=cut == len(tokens),
                is_branch_point=is_branch_point,
            )
    elif what < 9:
        found = store.find(space, prompt)
        if found.position:
            store.use(found)
        with suppress(BudgetError):
            claims.append(store.claim(draw.randrange(1, 1500), found))
    elif what < 11:
        cuts = sorted(draw.sample(range(1, len(tokens) + 1), min(len(tokens), 3)))
        store.afford(
            space, prompt, cuts, branch_points=cuts[:1], rows_nbytes=weigh, snapshot_bytes=STATE
        )
    elif what > 15:
        places = {draw.randrange(1, len(tokens) + 1): draw.choice([0.3, 2.0, 9.0])}
        store.seen["held"] += len(store.hold(space, prompt, places))
        assert store.stats().soft_pinned_bytes <= store.budget.limit_bytes // 2
    elif what == 11:
        with suppress(NotStoredError, BudgetError):
            draw.choice([store.pin, store.unpin, store.unpin])(space, prompt)
    else:
        lose(store, draw, space, prompt, what)
    while claims and (len(claims) > 3 or draw.random() < 0.3):
        claims.pop(0).release()


def lose(store, draw, space, prompt, what):
    """One of the ways in which something goes."""
    if what == 12:
        store.shrink(draw.randrange(2000))
    elif what == 13:
        stored, start = store.shared(space, prompt)
        if stored == len(prompt) and not store.pins(space, prompt, start):
            store.drop(space, prompt, start)
    elif what == 14 and (nodes := [*store.nodes()]):
        node = draw.choice(nodes)
        if not any(below.pinned for below in node.descendants()):
            store.forget(node, rows=draw.random() < 0.3)
    elif draw.random() < 0.02:
        store.clear()


@pytest.mark.parametrize("changes", forms(500, 3_000))
@pytest.mark.parametrize("limits", [{}, {"max_conversations": 6}, {"max_checkpoints": 3}])
@pytest.mark.parametrize("needs_checkpoints", [True, False])
def test_each_choice_is_that_of_a_full_scan(needs_checkpoints, limits, changes):
    """500 or 3,000 saves, restores, claims, pins, drops at random; each of the evictions goes as all nodes looked
    at afresh say, and after each change so does everything that is counted.
    """
    draw = random.Random(f"{needs_checkpoints} {limits}")
    store, claims = CheckedStore(9_000, needs_checkpoints=needs_checkpoints, **limits), []
    for _ in range(changes):
        change(store, draw, claims)
        full_scan.check_values(store)
    floors = {"choices": 300, "held": 50}
    floors |= {} if limits else {"lifted": 3}
    floors |= {"dead": 5, "kept": 100} if needs_checkpoints else {}
    floors |= {"surplus": 50} if "max_conversations" in limits else {}
    assert not {
        what
        for what, floor in floors.items()
        if store.seen[what] < floor * min(changes, 1_500) // 1_500
    }, store.seen


@pytest.mark.parametrize("name", WORKLOADS)
def test_each_choice_on_a_trace_is_that_of_a_full_scan(name):
    """Rows that lie in running caches weigh nothing until the request ends: 60 requests at 2 GB."""
    trace = workload(name, 5, requests=60)
    simulation = Simulation(trace, SHAPES["qwen3-next-80b"], 2 * 10**9)
    store = simulation.store
    store.__class__, store.seen = CheckedStore, Counter()
    store.seconds = lambda: 0.0
    for index in range(len(trace)):
        simulation.serve(index)
        full_scan.check_values(store)
    assert store.seen["choices"] > 50


def looked_at(node, *_, is_less):
    """Of its children at most so many are looked at."""
    return len(node.children or ()) if is_less else 0


def weighed(monkeypatch, size):
    """How many nodes are weighed, outlined and looked at by the ranking for a request to a full store."""
    seen = Counter()

    def counted(watching, owner, name, count):
        plain = getattr(owner, name)

        def watched(*args, **options):
            seen[name] += count(*args, **options)
            return plain(*args, **options)

        watching.setattr(owner, name, watched)

    store = Store(10**9, needs_checkpoints=True, max_conversations=size)
    shared = list(range(30))
    save(store, shared)
    for first in range(100, 100 + size):
        store.tick()
        save(store, [*shared, first, *range(20 + 3 * (first % 7))], is_end=True)
    store.stats()
    store.outlines(0.0)
    store.budget.limit(store.budget.used_bytes)
    with monkeypatch.context() as watching:
        counted(watching, NodeValues, "weights", lambda *_: 1)
        counted(watching, NodeValues, "_look_up", lambda *_: 1)
        counted(watching, values, "_farthest", looked_at)
        counted(watching, Ranking, "_least_of", lambda _, blocks, *__: len(blocks))
        counted(watching, Outline, "__init__", lambda *_: 1)
        counted(watching, Node, "unshared", lambda *_: 1)
        for first in range(5):
            store.tick()
            save(store, [*shared, 90 + first, *range(20)], is_end=True)
            store.stats()
            store.outlines(1.0)
    assert store.evictions == 5
    return seen


def test_what_a_request_costs_does_not_grow_with_what_is_stored(monkeypatch):
    """Five requests to a full store of 100 or of 3,000 conversations behind one system prompt: as many
    nodes are weighed and outlined, and no more than twice as many blocks of the ranking are looked at.
    """
    few, many = (weighed(monkeypatch, size) for size in (100, 3_000))
    blocks = few.pop("_least_of"), many.pop("_least_of")
    assert few == many
    assert blocks[1] <= 2 * blocks[0]


def test_what_was_hidden_in_one_look_is_found_in_the_next():
    """Of 300, in two blocks, the least: 1, then 50 in the other block, then 1 again."""
    ranking = Ranking()
    for serial in range(300):
        item = ranking.add()
        worth = 50.0 if item >= BLOCK else 1.0 if serial == 0 else 100.0
        ranking.put(item, Weights(worth, 0.0, 0.0), 0, 0, serial)
    looks = [ranking.least(0, 0.03, hidden) for hidden in ((), (0,), ())]
    assert looks == [(1.0, 0), (50.0, BLOCK), (1.0, 0)]


def test_rows_that_running_caches_hold_weigh_nothing_until_they_are_the_stores_again():
    """A leaf's 40 rows are let go for those of a request that has them too, and copied back."""
    layout = SizedLayout.of_shape(replace(SHAPES["qwen3-next-80b"], row_bytes=ROW))
    store = Store(10**9, needs_checkpoints=True)
    tokens = as_tokens(range(40))
    checkpoint = SizedCheckpoint(40, STATE)
    store.save(N, tokens, lambda start: SizedRows(start, 40, ROW), checkpoint, rows_nbytes=weigh)
    full_scan.check_values(store)
    materializer = Materializer(store)
    live = SizedCaches(materializer, layout, N, tokens)
    live.restored([SizedCache(40)], 40, 64, [(0, 40, 0)])
    materializer.alias()
    assert store.budget.rows_bytes == 0
    full_scan.check_values(store)
    assert materializer.materialize(live)
    assert store.budget.rows_bytes == 40 * ROW
    full_scan.check_values(store)


def test_rows_of_other_tokens_stay_the_stores():
    """A request's caches hold 40 rows; what is stored has the first 30 tokens of them, and goes on otherwise."""
    layout = SizedLayout.of_shape(replace(SHAPES["qwen3-next-80b"], row_bytes=ROW))
    store = Store(10**9, needs_checkpoints=True)
    save(store, list(range(20)))
    save(store, [*range(30), *range(100, 110)])
    materializer = Materializer(store)
    source = SizedCaches(materializer, layout, N, as_tokens(range(40)))
    stored = [rows for node in store.nodes() for rows in node.rows]
    origins = [(rows.start, rows.end, rows.lineage) for rows in stored]
    source.restored([SizedCache(40)], 40, 64, origins)
    materializer.alias()
    assert store.budget.rows_bytes == 20 * ROW  # the run of `[20, 40)` parts ways inside


def test_a_cut_of_a_slice_is_worth_what_a_checkpoint_there_would_be():
    """Every 3,000 tokens of a slice that ends at 17,000: what lies nearer to the end is worth more, at the same gap."""
    eviction = Eviction(NodeValues(policy.weights), frozenset(), None, 0, 0.1)
    cuts = [5_000, 8_000, 11_000, 14_000]
    found = eviction.worths(2_000, cuts, 17_000, {11_000}, 1_000)
    assert found == [
        policy.weights(3_000, 3_000, 17_000 - cut, 1_000, cut == 11_000, False).worth(0, 0, 0.1)
        for cut in cuts
    ]
    assert found[0] < found[1] < found[3] < found[2]
