"""What is stored by namespace, in both tiers: of the served model, with and without salts, and of others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_hybridcache.cache import Outlines
from mlx_hybridcache.disk.segment import PrefixDigest, digest
from mlx_hybridcache.store.conversations import Branches, Start, walk
from mlx_hybridcache.tokens import Namespace, Tokens


@dataclass(frozen=True, slots=True)
class NamespaceTree:
    """All that one namespace holds. Without `salt` it is known by files only: of another model or salt."""

    key: str
    salt: str | None
    nbytes: int
    branches: Branches
    start: Start


def namespace_trees(outlines: Outlines, own: Namespace) -> list[NamespaceTree]:
    """The model's own first, then those with salts, then those of others."""
    salts = {digest(name): name.salt for name in (own, *outlines.memory)}
    memory = {digest(name): each for name, each in outlines.memory.items()}
    on_disk = {name.settings: each for name, each in outlines.disk.items()}
    found = []
    for key in dict.fromkeys([*memory, *on_disk]):
        top = Start(memory.get(key), on_disk.get(key), 0)
        found.append(NamespaceTree(key, salts.get(key), top.nbytes, Branches(*top), top))
    return sorted(found, key=lambda tree: (tree.salt != own.salt, tree.salt is None))


def named(trees: list[NamespaceTree], key: str) -> tuple[NamespaceTree, Tokens] | None:
    """The tokens of the prefix that `key` names, and the tree it lies in. Looks at everything."""
    for tree in trees:
        for _, path in walk(tree.branches, PrefixDigest(tree.key)):
            run = path[-1]
            place = next((each for each in run.places if each.key == key), None)
            if run.key == key or place is not None:
                tokens = np.concatenate([part for each in path for part in each.tokens])
                return tree, tokens[: run.end if place is None else place.position]
    return None
