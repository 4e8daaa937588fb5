"""From pairs that agree to groups: pure functions, numbers by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_hybridcache.router.discovery.agreement import spread
from mlx_hybridcache.router.discovery.groups import cliques, make_groups
from mlx_hybridcache.router.patch import Group, copied_rows, differing_rows


def test_a_chain_is_no_group() -> None:
    """0 like 1 and 1 like 2, but 0 not like 2: the nearer pair is the group."""
    assert cliques({(0, 1): 0.02, (1, 2): 0.01}) == [(1, 2)]
    assert cliques({(0, 1): 0.01, (1, 2): 0.02}) == [(0, 1)]


def test_every_pair_of_a_group_agrees() -> None:
    """Four experts of which all six pairs agree; take one pair away and they fall apart."""
    pairs = {(a, b): 0.01 for a in range(4) for b in range(a + 1, 4)}
    assert cliques(pairs) == [(0, 1, 2, 3)]
    del pairs[0, 3]
    assert all((a, b) in pairs for group in cliques(pairs) for a in group for b in group if a < b)
    assert sorted(len(group) for group in cliques(pairs)) in ([3], [2, 2])


def test_equal_distances_are_taken_by_index_whatever_their_order() -> None:
    """The same groups from the same pairs, however the dictionary was filled."""
    pairs = {(0, 1): 0.01, (0, 2): 0.01, (3, 4): 0.01}
    backwards = dict(reversed(pairs.items()))
    assert cliques(pairs) == cliques(backwards) == [(0, 1), (3, 4)]


def test_nothing_agrees_nothing_is_grouped() -> None:
    """No pairs, no groups."""
    assert cliques({}) == []
    assert make_groups({}, np.zeros((5, 2), np.int64), 4) == ()


def test_the_cap_is_the_most_that_one_token_took() -> None:
    """Members 1, 2 and 4: two of them in one token, never three."""
    pairs = {(1, 2): 0.0, (1, 4): 0.0, (2, 4): 0.0}
    chosen = np.array([[0, 1, 3], [2, 4, 5], [4, 0, 3], [4, 5, 0]])
    assert make_groups(pairs, chosen, 6) == (Group((1, 2, 4), representative=4, cap=2),)
    never_together = np.array([[0, 1], [2, 0], [2, 5]])
    assert make_groups(pairs, never_together, 6) == (Group((1, 2, 4), representative=2, cap=1),)


def test_among_equally_busy_members_the_first_gives_the_row() -> None:
    """Each was chosen once."""
    (group,) = make_groups({(1, 3): 0.0}, np.array([[3], [1]]), 4)
    assert group.representative == 1


def test_rows_are_copied_as_bytes_once_and_for_all() -> None:
    """Four rows of two bytes; twice gives what once gives."""
    data, groups = b"aabbccdd", (Group((0, 2), 2, 1), Group((1, 3), 1, 1))
    once = copied_rows(data, 4, groups)
    assert once == b"ccbbccbb"
    assert copied_rows(once, 4, groups) == once
    assert differing_rows(data, once, 4) == {0, 3}
    assert data == b"aabbccdd"


@pytest.mark.parametrize(
    ("count", "expected"), [(2, [0, 9]), (10, [*range(10)]), (99, [*range(10)])]
)
def test_a_spread_reaches_from_beginning_to_end(count: int, expected: list[int]) -> None:
    """Two of ten are the first and the last; more than there are is all."""
    assert spread(np.arange(10), count).tolist() == expected
