"""The trees of all namespaces, of which none is empty, found by name, by salt and by their nodes.

Whoever names a salt gets a tree of their own, and there may be a hundred thousand of them in a day: so
a tree goes with its last node, and nothing here takes longer because there are others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Generic

from ..tokens import Namespace
from .frozen import FrozenMap
from .outline import Outline, outlined
from .tree import AnyNode, Noted, PrefixTree, R, S


class Trees(Mapping[Namespace, PrefixTree[R, S]], Generic[R, S]):
    """Trees by namespace. `noted` is told what changes in any of them; `needs` says which need checkpoints."""

    def __init__(self, noted: Noted, needs: Callable[[Namespace], bool]) -> None:
        self._noted = noted
        self._needs = needs
        self._trees: dict[Namespace, PrefixTree[R, S]] = {}
        self._names: dict[AnyNode, Namespace] = {}  # by root
        self._of_salt: dict[str, dict[Namespace, PrefixTree[R, S]]] = {}
        self._outlines: FrozenMap[Namespace, Outline] = FrozenMap()
        self._gone: dict[Namespace, None] = {}  # since there were outlines last

    def __getitem__(self, name: Namespace) -> PrefixTree[R, S]:
        return self._trees[name]

    def __iter__(self) -> Iterator[Namespace]:
        return iter(self._trees)

    def __len__(self) -> int:
        return len(self._trees)

    def others(self, name: Namespace) -> list[PrefixTree[R, S]]:
        """Those of the same salt under other settings."""
        return [tree for each, tree in self._of_salt.get(name.salt, {}).items() if each != name]

    def tree_of(self, node: AnyNode) -> tuple[Namespace, PrefixTree[R, S]]:
        """Where a node stands."""
        while node.parent is not None:
            node = node.parent
        name = self._names[node]
        return name, self._trees[name]

    def planted(self, name: Namespace) -> PrefixTree[R, S]:
        """The tree of this namespace, about to be extended if it is a new one."""
        tree = self._trees.get(name)
        if tree is None:
            tree = PrefixTree(self._noted, needs_checkpoints=self._needs(name))
            self._trees[name] = tree
            self._names[tree.root] = name
            self._of_salt.setdefault(name.salt, {})[name] = tree
        return tree

    def clear_away(self, tree: PrefixTree[R, S]) -> None:
        """Something was taken out of this tree: it goes too if that was the last."""
        if tree.root.children:
            return
        name = self._names.pop(tree.root)
        del self._trees[name], self._of_salt[name.salt][name]
        if not self._of_salt[name.salt]:
            del self._of_salt[name.salt]
        self._noted.roots.pop(tree.root, None)
        self._gone[name] = None

    def outlines(self, now: float | None) -> FrozenMap[Namespace, Outline]:
        """What any thread may look at, by namespace. `now` is the wall clock's seconds."""
        changed: dict[Namespace, Outline | None] = dict.fromkeys(self._gone)
        for root in self._noted.roots:
            if (name := self._names.get(root)) is not None:
                changed[name] = outlined(root, lambda node: now)
        self._gone.clear()
        self._noted.roots.clear()
        self._outlines = self._outlines.differing(changed)
        return self._outlines
