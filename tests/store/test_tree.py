"""The radix tree against a list of sequences that remembers everything."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_hybridcache.store.tree import PrefixTree
from mlx_hybridcache.tokens import as_tokens


@dataclass(frozen=True)
class Stretch:
    """Rows that know which tokens they were made from, so that a wrong split shows."""

    start: int
    end: int
    made_from: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return 10 * (self.end - self.start)

    def split(self, position: int) -> "tuple[Stretch, Stretch]":
        at = position - self.start
        return (
            Stretch(self.start, position, self.made_from[:at]),
            Stretch(position, self.end, self.made_from[at:]),
        )


class Weight:
    """Stands for a checkpoint of 7 bytes."""

    nbytes = 7


def put(tree: PrefixTree, tokens: list[int]):
    matched = tree.match(as_tokens(tokens)).matched
    rows = ()
    if matched < len(tokens):
        rows = (Stretch(matched, len(tokens), tuple(tokens[matched:])),)
    return tree.extend(as_tokens(tokens), rows)


def common(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=12)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(stored=sequences, asked=st.lists(st.integers(0, 2), min_size=1, max_size=14))
def test_a_match_is_the_longest_common_beginning_with_anything_stored(stored, asked):
    """Stored [0,1,2] and [0,2]; asked [0,1,1] matches 2 tokens."""
    tree = PrefixTree()
    for tokens in stored:
        put(tree, tokens)
    expected = max((common(tokens, asked) for tokens in stored), default=0)
    match = tree.match(as_tokens(asked))
    assert match.matched == expected
    goes_on = [tokens for tokens in stored if tokens[:expected] == asked[:expected]]
    longer = any(len(tokens) > expected for tokens in goes_on)
    assert match.contradicted == (longer and expected < len(asked))


@settings(derandomize=True, max_examples=300, deadline=None)
@given(stored=sequences)
def test_every_node_owns_exactly_the_rows_of_its_own_run(stored):
    """However runs are split, rows lie gapless under their node and stem from its own tokens."""
    tree = PrefixTree()
    for tokens in stored:
        node = put(tree, tokens)
        assert node.end == len(tokens)
    for node in tree.nodes():
        assert len(node.tokens) > 0
        position = node.start
        for rows in node.rows:
            assert rows.start == position
            expected = node.tokens[rows.start - node.start : rows.end - node.start].tolist()
            assert list(rows.made_from) == expected
            position = rows.end
        assert position == node.end
    distinct = {tuple(tokens[:n]) for tokens in stored for n in range(1, len(tokens) + 1)}
    assert sum(len(node.tokens) for node in tree.nodes()) == len(distinct)


def test_splitting_a_run_leaves_the_upper_half_without_a_checkpoint():
    """A checkpoint at 6 stays at 6 when the run [0, 6) is split at 3."""
    tree = PrefixTree()
    put(tree, [1, 2, 3, 4, 5, 6]).checkpoint = Weight()
    put(tree, [1, 2, 3, 9])
    upper, lower = tree.match(as_tokens([1, 2, 3, 4, 5, 6])).path
    assert (upper.end, upper.checkpoint) == (3, None)
    assert lower.end == 6
    assert lower.checkpoint is not None


def test_the_deepest_checkpoint_is_at_most_at_the_limit():
    """Checkpoints at 2 and 4; a prompt of 4 tokens may resume at 3 at most, so at 2."""
    tree = PrefixTree()
    put(tree, [1, 2]).checkpoint = Weight()
    put(tree, [1, 2, 3, 4]).checkpoint = Weight()
    match = tree.match(as_tokens([1, 2, 3, 4]))
    assert match.deepest_checkpoint(4).end == 4
    assert match.deepest_checkpoint(3).end == 2
    assert match.deepest_checkpoint(1) is None


def test_a_match_does_not_change_the_tree():
    """Looking up a prompt that parts ways inside a run leaves the run whole."""
    tree = PrefixTree()
    put(tree, [1, 2, 3, 4])
    match = tree.match(as_tokens([1, 2, 9]))
    assert (match.matched, match.inside.end, match.contradicted) == (2, 4, True)
    assert [len(node.tokens) for node in tree.nodes()] == [4]


def test_nodes_keep_no_larger_array_alive():
    """A node's tokens own their 4 bytes each, after splits too."""
    tree = PrefixTree()
    long = np.arange(10_000, dtype=np.int32)
    tree.extend(long, ())
    tree.extend(np.concatenate([long[:5_000], long[:10]]), ())
    nodes = list(tree.nodes())
    assert len(nodes) == 3
    for node in nodes:
        assert node.tokens.base is None
        assert node.tokens.nbytes == 4 * len(node.tokens)
        with pytest.raises(ValueError, match="read-only"):
            node.tokens[0] = 1


def test_a_removed_leaf_is_matched_no_more():
    """What hung below its parent as the only child leaves the parent a leaf."""
    tree = PrefixTree()
    put(tree, [1, 2])
    leaf = put(tree, [1, 2, 3])
    tree.remove(leaf)
    assert tree.match(as_tokens([1, 2, 3])).matched == 2
    assert [node.end for node in tree.nodes()] == [2]


def test_merging_a_boundary_keeps_tokens_and_rows():
    """[0, 2) and [2, 4) become [0, 4) with the rows of both, in order."""
    tree = PrefixTree()
    put(tree, [1, 2])
    put(tree, [1, 2, 3, 4])
    upper, _ = tree.match(as_tokens([1, 2, 3, 4])).path
    tree.merge(upper)
    (node,) = tree.nodes()
    assert (node.start, node.tokens.tolist()) == (0, [1, 2, 3, 4])
    assert [(rows.start, rows.made_from) for rows in node.rows] == [(0, (1, 2)), (2, (3, 4))]
    assert tree.match(as_tokens([1, 2, 3, 4])).matched == 4


changes = st.lists(
    st.tuples(
        st.sampled_from(["put", "remove", "merge"]), st.lists(st.integers(0, 2), max_size=12)
    ),
    max_size=8,
)


def change(tree: PrefixTree, what: str, tokens: list[int]):
    """Store these tokens, or take out or join the node that they lead to, where that may be."""
    if what == "put":
        if tokens:
            put(tree, tokens)
        return
    found = tree.match(as_tokens(tokens)).last
    if what == "remove" and found is not None and not found.children:
        tree.remove(found)
    if what == "merge" and found is not None and len(found.children or ()) == 1:
        tree.merge(found)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(stored=sequences, asked=sequences, between=changes, more=st.lists(st.integers(0, 2)))
def test_a_match_from_a_known_node_is_the_one_from_the_root_whatever_came_between(
    stored, asked, between, more
):
    """[0, 3) is found for [0,1,2,2]; then it is split at 1, joined, or taken out and stored again: what the same
    tokens match, or fewer, or more, is the same with it as without it. So it is with a node of another tree.
    """
    tree, other = PrefixTree(), PrefixTree()
    for tokens in stored:
        put(tree, tokens)
        put(other, tokens)
    known = [
        (tokens, node)
        for tokens in [*asked, *stored]
        for each in (tree, other)
        for node in each.match(as_tokens(tokens)).path
    ]
    for what, tokens in between:
        change(tree, what, tokens)
    for tokens, node in known:
        for again in (tokens, tokens[: len(tokens) // 2], tokens + more):
            array = as_tokens(again)
            assert tree.match(array, node) == tree.match(array)


def test_what_leads_to_a_known_node_is_not_compared_again():
    """Of 10 tokens 6 are known: other tokens there would not be noticed, so none may be asked about."""
    tree = PrefixTree()
    node = put(tree, [1, 2, 3, 4, 5, 6])
    put(tree, [1, 2, 3, 4, 5, 6, 7, 8])
    found = tree.match(as_tokens([0, 0, 0, 0, 0, 0, 7, 8, 9, 9]), node)
    assert (found.matched, [each.end for each in found.path]) == (8, [6, 8])
