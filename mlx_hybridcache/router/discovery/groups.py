"""From pairs of experts that agree to groups: cliques, their caps and representatives. No MLX here."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ..patch import Group

Pairs = Mapping[tuple[int, int], float]
"""(lower, higher) index of two experts that agree -> how far apart they are."""

Chosen = npt.NDArray[np.int64]
"""Experts chosen for each token, shape (T, k)."""


def cliques(pairs: Pairs) -> list[tuple[int, ...]]:
    """Groups in which every pair agrees, each ascending, in the order of their lowest members.

    Nearest pairs first, two clusters become one only if all pairs across agree: A like B and B like C
    does not make A like C. Ties in distance are taken by index, so the result is one for all times.
    """
    cluster: dict[int, frozenset[int]] = {}
    for low, high in sorted(pairs, key=lambda pair: (pairs[pair], pair)):
        one = cluster.get(low, frozenset({low}))
        other = cluster.get(high, frozenset({high}))
        if one is not other and all(_pair(a, b) in pairs for a in one for b in other):
            for member in (merged := one | other):
                cluster[member] = merged
    return sorted(tuple(sorted(group)) for group in set(cluster.values()))


def _pair(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a < b else (b, a)


def usage(chosen: Chosen, experts: int) -> npt.NDArray[np.int64]:
    """How many tokens chose each expert, shape (E,)."""
    return np.bincount(chosen.reshape(-1), minlength=experts).astype(np.int64)


def make_groups(pairs: Pairs, chosen: Chosen, experts: int) -> tuple[Group, ...]:
    """The groups with what calibration fixes: the cap, and whose row all get.

    The row is that of the member chosen most often, the lower index among equals: it is the one that
    fewest tokens miss.
    """
    used = usage(chosen, experts)
    made = []
    for members in cliques(pairs):
        together = np.isin(chosen, members).sum(axis=1)
        cap = max(1, int(together.max(initial=0)))
        representative = min(members, key=lambda member: (-used[member], member))
        made.append(Group(members, representative, cap))
    return tuple(made)
