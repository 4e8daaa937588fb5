"""What a tree has beside a prompt and behind it: texts in which the prompt's reply may be found again."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np

from ...store.tree import AnyMatch, AnyNode
from ...tokens import Tokens, as_tokens

RUNS = 256
"""So many runs are looked through, those used last."""


def _none() -> Tokens:
    return as_tokens([])


@dataclass(frozen=True, slots=True)
class Passages:
    """`ahead` is how a path went on behind the whole prompt, empty where none did; `others` are runs
    that lie on other paths, what was used last at the end.
    """

    others: tuple[Tokens, ...] = ()
    ahead: Tokens = field(default_factory=_none)


def passages(match: AnyMatch, length: int, most: int) -> Passages:
    """Of the tree in which a prompt of `length` tokens matches so; at most `most` tokens of each."""
    if not match.matched:
        return Passages()
    root = match.nodes()[0].parent
    assert root is not None
    inside, is_whole = match.inside, match.matched == length
    rest = _none() if inside is None else inside.tokens[match.matched - inside.start :]
    below = _below(match, most) if is_whole else []
    own = {id(node) for node in (*match.nodes(), *below)}
    recent = heapq.nlargest(
        RUNS,
        (node for node in root.descendants() if id(node) not in own),
        key=lambda node: (node.last_used, node.serial),
    )
    runs = [rest, *(node.tokens for node in below)]
    if is_whole:
        return Passages(_up_to(most, [node.tokens for node in recent]), np.concatenate(runs)[:most])
    return Passages(_up_to(most, [rest, *(node.tokens for node in recent)]))


def _below(match: AnyMatch, most: int) -> list[AnyNode]:
    """The nodes below the match, by the branch used last, to a leaf or until there are tokens enough."""
    nodes: list[AnyNode] = []
    node: AnyNode = match.nodes()[-1]
    while node.children and node.end - match.matched < most:
        node = max(node.children.values(), key=lambda child: (child.last_used, child.serial))
        nodes.append(node)
    return nodes


def _up_to(most: int, runs: list[Tokens]) -> tuple[Tokens, ...]:
    """The first of these runs, no more than so many tokens; the first one last."""
    kept = []
    for run in runs:
        kept.append(run[:most])
        most -= len(kept[-1])
        if most <= 0:
            break
    return tuple(reversed(kept))
