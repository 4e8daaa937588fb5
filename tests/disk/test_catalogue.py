"""The catalogue of a cache directory: what a checkpoint lacks, what goes with it, who shares what."""

import numpy as np
import pytest

from mlx_hybridcache.disk.catalogue import Catalogue
from mlx_hybridcache.disk.chains import Chains
from mlx_hybridcache.disk.index import Entry
from mlx_hybridcache.disk.parts import parts_of, state_of
from mlx_hybridcache.disk.segment import Segment, Tensor
from mlx_hybridcache.errors import BudgetError
from mlx_hybridcache.tokens import as_tokens

STEP = 8
ONE = as_tokens(range(20))
OTHER = as_tokens([*range(12), *range(50, 58)])
"""Parts ways with `ONE` at 12, inside the run [8, 16)."""


class Filed:
    """A catalogue and what it was told to delete."""

    def __init__(self, budget_bytes=10**6, **options):
        self.catalogue = Catalogue(budget_bytes, **{"needs_checkpoints": True, **options})
        self.deleted = []
        self.catalogue.on_unneeded(lambda segment: self.deleted.append(segment.name))

    def write(self, tokens, namespace="ab", state=True):
        """Everything that the tokens lack, as if it were written; the new segments."""
        lacking = self.catalogue.lacking(namespace, tokens, state=state, step=STEP)
        new = [segment(one, tokens, namespace) for one in lacking]
        for one in new:
            assert self.catalogue.add(one, tokens[: one.end])
        return new

    def kept(self):
        return {one.name for one in self.catalogue.segments()}


def segment(lacking, tokens, namespace):
    shape = (1, 1, lacking.end - lacking.start, 4) if lacking.kind == "rows" else (1, 32)
    return Segment(
        kind=lacking.kind,
        namespace=namespace,
        key=lacking.key,
        parent=lacking.parent,
        start=lacking.start,
        end=lacking.end,
        tokens=tokens[lacking.start : lacking.end],
        tensors=(Tensor("0.0", "F32", shape),),
    )


def spans(segments):
    return [(one.kind, one.start, one.end) for one in segments]


@pytest.fixture
def filed():
    return Filed()


def test_a_checkpoint_lacks_rows_up_to_each_step_and_its_state(filed):
    """20 tokens at a step of 8: three files of rows, one state; afterwards nothing."""
    assert spans(filed.write(ONE)) == [
        ("rows", 0, 8),
        ("rows", 8, 16),
        ("rows", 16, 20),
        ("state", 20, 20),
    ]
    assert filed.write(ONE) == []
    found = filed.catalogue.find("ab", as_tokens([*ONE, 1]))
    assert found.position == 20
    assert state_of(found).kind == "state"
    assert [(part.start, part.end) for part in parts_of(found)] == [(0, 8), (8, 16), (16, 20)]


def test_a_branch_begins_inside_another_file(filed):
    """It goes on from position 12; the first file of eight tokens is shared by both."""
    filed.write(ONE)
    assert spans(filed.write(OTHER)) == [
        ("rows", 12, 16),
        ("rows", 16, 20),
        ("state", 20, 20),
    ]
    found = filed.catalogue.find("ab", as_tokens([*OTHER, 1]))
    parts = [(part.segment.start, part.start, part.end) for part in parts_of(found)]
    assert parts == [(0, 0, 8), (8, 8, 12), (12, 12, 16), (16, 16, 20)]


def test_what_was_let_go_of_a_file_that_stays_is_taken_back_not_written_again(filed):
    """Of [8, 16) the branch needs [8, 12); its other end comes back with its conversation."""
    first = filed.write(ONE)
    filed.write(OTHER)
    used = filed.catalogue.store.budget.used_bytes
    leaf = filed.catalogue.find("ab", ONE).match.path[-1]
    filed.catalogue.store.forget(leaf, rows=True)
    assert first[1].name in filed.kept()
    assert sum(one.file_nbytes for one in filed.catalogue.segments()) == (
        filed.catalogue.store.budget.used_bytes
    )
    assert spans(filed.write(ONE)) == [("rows", 16, 20), ("state", 20, 20)]
    assert filed.catalogue.store.budget.used_bytes == used


def test_what_is_being_written_is_built_on_only_where_something_leads_to_it(filed):
    """Rows that come are as good as there, unless those before them are neither there nor coming."""
    lacking = filed.catalogue.lacking("ab", ONE, state=False, step=STEP)
    first, second, third = ((segment(one, ONE, "ab"), ONE[: one.end]) for one in lacking)

    def begins(*coming, namespace="ab", tokens=OTHER):
        left = filed.catalogue.lacking(namespace, tokens, state=False, step=STEP, coming=coming)
        return left[0].start if left else None

    assert begins(first, second) == 12
    assert begins(first, third) == 8
    assert begins(second, third) == 0
    assert (
        begins(second, first) == 8
    )  # written in this order, the second would be led to by nothing
    assert begins(first, second, namespace="cd") == 0
    assert begins(first, second, third, tokens=ONE) is None
    filed.write(ONE[:8])
    assert begins(second, third, tokens=ONE) is None


def test_used_bytes_are_those_of_the_files_whatever_goes(filed):
    """Every file is whole or gone: shares of it are never counted as free."""
    chance = np.random.default_rng(3)
    for _ in range(60):
        shared = int(chance.integers(0, 20))
        tokens = as_tokens([*ONE[:shared], *chance.integers(100, 104, size=12)])
        filed.write(tokens)
        if chance.random() < 0.5:
            nodes = list(filed.catalogue.store.nodes())
            node = nodes[chance.integers(len(nodes))]
            filed.catalogue.store.forget(node, rows=bool(chance.random() < 0.5))
        whole = sum(one.file_nbytes for one in filed.catalogue.segments())
        assert whole == filed.catalogue.store.budget.used_bytes


def test_a_budget_lets_the_least_useful_go_first():
    """Ten conversations where six fit: the oldest are deleted, the newest stays."""
    filed = Filed(budget_bytes=10**9)
    weight = sum(one.file_nbytes for one in filed.write(as_tokens(range(20)), "cd"))
    filed = Filed(budget_bytes=6 * weight)
    for turn in range(10):
        filed.catalogue.store.tick()
        tokens = as_tokens(np.arange(20) + 100 * turn)
        lacking = filed.catalogue.lacking("ab", tokens, state=True, step=STEP)
        for one in (segment(each, tokens, "ab") for each in lacking):
            claim = filed.catalogue.claim(one.file_nbytes, [("ab", tokens)])
            claim.release()
            filed.catalogue.add(one, tokens[: one.end])
        assert filed.catalogue.store.budget.used_bytes <= 6 * weight
    position = [
        filed.catalogue.find("ab", as_tokens([*(np.arange(20) + 100 * turn), 1])).position
        for turn in range(10)
    ]
    assert position == [0] * 4 + [20] * 6
    assert len(filed.deleted) == 16


@pytest.mark.parametrize("under_way", [1, 2])
def test_what_leads_to_what_is_written_stays_and_others_go(under_way):
    """Rows of which no state is there yet would go first of all: where they are claimed for, another
    conversation goes instead; with nothing else to let go the claim fails, and they stay.
    """
    prompts = [as_tokens(np.arange(20) + 100 * at) for at in range(under_way)]
    filed = Filed()
    for tokens in prompts:
        filed.write(tokens, state=False)
    rows = filed.kept()
    other = {one.name for one in filed.write(as_tokens(range(900, 920)))}
    (lacking,) = filed.catalogue.lacking("ab", prompts[0], state=True, step=STEP)
    state = segment(lacking, prompts[0], "ab")
    store, paths = filed.catalogue.store, [("ab", tokens) for tokens in prompts]
    store.budget.limit(store.budget.used_bytes + state.file_nbytes - 1)
    claim = filed.catalogue.claim(state.file_nbytes, paths)
    assert (set(filed.deleted), filed.kept()) == (other, rows)
    claim.release()
    assert filed.catalogue.add(state, prompts[0])
    assert filed.catalogue.find("ab", as_tokens([*prompts[0], 1])).position == 20
    store.budget.limit(store.budget.used_bytes)
    with pytest.raises(BudgetError):
        filed.catalogue.claim(state.file_nbytes + 1, paths)
    assert rows <= filed.kept()


def test_a_state_inside_a_run_needs_no_room_but_its_own(filed):
    """Sharing a file out copies nothing: what fits the budget to the byte is added."""
    filed.write(ONE)
    inside = ONE[:12]
    (lacking,) = filed.catalogue.lacking("ab", inside, state=True, step=STEP)
    state = segment(lacking, inside, "ab")
    store = filed.catalogue.store
    store.budget.limit(store.budget.used_bytes + state.file_nbytes)
    filed.catalogue.claim(state.file_nbytes, [("ab", ONE)]).release()
    assert filed.catalogue.add(state, inside)
    assert filed.deleted == []
    assert len(filed.kept()) == 5


@pytest.mark.parametrize("there", [0, 9])
def test_a_file_needs_the_room_that_was_claimed_for_it(filed, there):
    """To the byte: its bytes are no multiple of its tokens, and some of those may be there already."""
    (lacking,) = filed.catalogue.lacking("ab", ONE[:11], state=False, step=11)
    rows = segment(lacking, ONE, "ab")
    assert rows.file_nbytes % 11
    if there:
        filed.write(ONE[:there])
    store = filed.catalogue.store
    store.budget.limit(store.budget.used_bytes + rows.file_nbytes)
    assert filed.catalogue.add(rows, ONE[:11])
    assert store.budget.used_bytes == store.budget.limit_bytes
    assert filed.deleted == []


def test_a_file_that_does_not_fit_is_not_taken():
    """It is told apart from one that nothing leads to, which would be worth another try."""
    (lacking,) = Filed().catalogue.lacking("ab", ONE[:11], state=False, step=11)
    rows = segment(lacking, ONE, "ab")
    filed = Filed(budget_bytes=rows.file_nbytes - 1)
    with pytest.raises(BudgetError, match="needs"):
        filed.catalogue.add(rows, ONE[:11])
    assert filed.catalogue.store.budget.used_bytes == 0


def test_a_catalogue_is_the_same_after_a_restart(filed):
    """Loaded in any order; recency and pins come from the index."""
    written = [*filed.write(ONE), *filed.write(OTHER), *filed.write(ONE, "cd", state=False)]
    entries = [Entry(one, used, used == 3, one.file_nbytes) for used, one in enumerate(written)]
    again = Filed()
    assert again.catalogue.load(entries[::-1]) == []
    assert again.kept() == filed.kept()
    assert again.catalogue.store.budget.used_bytes == filed.catalogue.store.budget.used_bytes
    (pinned,) = [node for node in again.catalogue.store.nodes() if node.pinned]
    assert (pinned.end, pinned.last_used) == (20, 3)


def test_what_nothing_leads_to_is_told(filed):
    """Rows whose beginning is missing, a state without its rows, tokens that are not what they were."""
    written = filed.write(ONE)
    for missing in (0, 1):
        left = [one for at, one in enumerate(written) if at != missing]
        entries = [Entry(one, 1, False, one.file_nbytes) for one in left]
        orphans = Filed().catalogue.load(entries)
        assert spans(orphans) == spans(written[missing + 1 :])


def test_rows_of_other_models_go_by_their_own_ends():
    """A hybrid's catalogue does not take another model's rows for dead weight."""
    rows_only = Filed(needs_checkpoints=False)
    written = rows_only.write(ONE, state=False)
    hybrid = Filed()
    assert hybrid.catalogue.load([Entry(one, 5, False, one.file_nbytes) for one in written]) == []
    hybrid.catalogue.make_room(hybrid.catalogue.store.budget.limit_bytes - 10 * 10**3)
    assert hybrid.kept() == {one.name for one in written}
    assert rows_only.catalogue.find("ab", ONE).position == 19


def test_a_file_that_is_gone_takes_with_it_what_needs_it(filed):
    """Rows: everything below. A state: itself; what leads to the other branch stays."""
    filed.write(ONE)
    other = filed.write(OTHER)
    filed.catalogue.forget(other[0])
    assert filed.catalogue.find("ab", as_tokens([*OTHER, 1])).position == 0
    assert filed.catalogue.find("ab", as_tokens([*ONE, 1])).position == 20
    assert {one.name for one in other} <= set(filed.deleted)


def test_nothing_is_left_of_a_namespace_whose_files_went(filed):
    """200 salts, each with what the last one had to go for: one tree and one outline, and none in the end."""
    filed.write(ONE, namespace="fe")
    filed.catalogue.store.budget.limit(filed.catalogue.store.budget.used_bytes)
    for salt in range(200):
        filed.catalogue.store.tick()
        filed.write(ONE, namespace=f"{salt:02x}")
        assert len(filed.catalogue.store._trees) == 1
    assert [name.settings for name in filed.catalogue.store.outlines(0.0)] == ["c7"]
    for segment_ in filed.catalogue.segments():
        filed.catalogue.forget(segment_)
    assert not filed.catalogue.store._trees
    assert not filed.catalogue.store.outlines(0.0)


def test_who_uses_a_checkpoint_passes_those_that_lead_to_it(filed):
    """At 8 and at 20, used at 1 and at 5: something was stored below the first one at 5."""
    written = [*filed.write(ONE[:8]), *filed.write(ONE)]
    entries = [Entry(one, 5 if one.end == 20 else 1, False, one.file_nbytes) for one in written]
    come = Chains().change(entries).come
    assert [(each.link.end, each.passed) for each in come] == [(8, 5), (20, 5)]
