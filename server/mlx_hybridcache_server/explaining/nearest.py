"""The stored prompt that has most in common with one that is asked for, of one salt alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.disk.segment import digest
from mlx_hybridcache.report import Divergence
from mlx_hybridcache.store.outline import Outline
from mlx_hybridcache.store.tree import common_length
from mlx_hybridcache.tokens import Namespace, Tokens


def stored_behind(cache: HybridPromptCache, salt: str | None, tokens: Tokens) -> tuple[int, Tokens]:
    """Up to which position `tokens` are stored for `salt`, and how what is stored goes on from there.

    As the last request left it, without waiting for the worker. Nothing of another salt is looked at.
    """
    found = [_behind(tree, tokens) for tree in _trees(cache, salt or "")]
    return max(found, key=lambda each: each[0], default=(0, tokens[:0]))


def _trees(cache: HybridPromptCache, salt: str) -> Iterator[Outline]:
    outlines = cache.outlines
    own = [name for name in outlines.memory if name.salt == salt]
    yield from (outlines.memory[name] for name in own)
    for name in {*own, Namespace(cache.info.settings, salt)}:
        filed = Namespace(digest(name))
        if filed in outlines.disk:
            yield outlines.disk[filed]


def _behind(tree: Outline, tokens: Tokens) -> tuple[int, Tokens]:
    node, position = tree, 0
    while position < len(tokens):
        child = node.children.get(int(tokens[position]))
        if child is None:
            return position, _on(node, tokens[:0])
        common = common_length(child.tokens, tokens[position:])
        position += common
        if common < len(child.tokens):
            return position, _on(child, child.tokens[common:])
        node = child
    return position, tokens[:0]


def _on(node: Outline, rest: Tokens) -> Tokens:
    """`rest` and what was used last of what goes on behind `node`: as much as is shown."""
    parts, count = [rest], len(rest)
    while node.children and count < Divergence.AROUND:
        node = max(node.children.values(), key=lambda child: child.below.used)
        parts.append(node.tokens)
        count += len(node.tokens)
    return np.concatenate(parts)[: Divergence.AROUND]
