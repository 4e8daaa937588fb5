"""Trees whose bytes are counted: nothing comes or goes but that the budget is told, and who else holds it asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Generic

import numpy as np

from ..tokens import Namespace, Tokens
from .budget import Budget
from .frozen import FrozenMap
from .namespaces import Trees
from .outline import Outline
from .references import References
from .tree import AnyNode, Match, Node, Noted, PrefixTree, R, S


class CountedTrees(Generic[R, S]):
    """All namespaces' trees of one store. `noted` is told what changes in them."""

    def __init__(self, limit_bytes: int, references: References | None, noted: Noted):
        self.budget = Budget(limit_bytes, self._evict)
        self.references = references or References()
        self._trees: Trees[R, S] = Trees(noted, self.needs)

    def needs(self, namespace: Namespace) -> bool:
        """Whether prompts resume at checkpoints only there; without, rows restore at any position."""
        raise NotImplementedError

    def _evict(self, nbytes: int, keep: Iterable[AnyNode], spare: AnyNode | None) -> None:
        raise NotImplementedError

    # Looking

    def nodes(self) -> Iterator[Node[R, S]]:
        """Every node of every namespace, parents before children."""
        for tree in self._trees.values():
            yield from tree.nodes()

    def checkpoints(self, namespace: Namespace) -> Iterator[tuple[Tokens, Node[R, S]]]:
        """Every checkpoint with the tokens that lead to it."""
        tree = self._trees.get(namespace)
        for node in tree.nodes() if tree else ():
            if node.checkpoint is not None:
                yield tokens_to(node), node

    def outlines(self, now: float | None) -> FrozenMap[Namespace, Outline]:
        """What any thread may look at, by namespace. `now` is the wall clock's seconds."""
        return self._trees.outlines(now)

    def match(
        self, namespace: Namespace, tokens: Tokens, known: Node[R, S] | None = None
    ) -> Match[R, S]:
        """How far `tokens` are stored. `known` is a node found on their way before, as for a tree."""
        tree = self._trees.get(namespace)
        return tree.match(tokens, known) if tree else Match(0, (), None, contradicted=False)

    def known_elsewhere(self, namespace: Namespace, tokens: Tokens) -> int:
        """The longest match under other settings. Other salts are none of this request's business."""
        others = self._trees.others(namespace)
        return max((tree.match(tokens).matched for tree in others), default=0)

    def shared(self, namespace: Namespace, tokens: Tokens) -> tuple[int, int]:
        """Of `tokens`, how many are stored, and how many of those something else needs too.

        Something else is a run that parts ways with them before their end.
        """
        match = self.match(namespace, tokens)
        shared = match.matched if match.inside and match.matched < len(tokens) else 0
        for node in match.path:
            others = len(node.children or ()) - (match.matched > node.end)
            if others and node.end < len(tokens):
                shared = max(shared, node.end)
        return match.matched, shared

    def pins(self, namespace: Namespace, tokens: Tokens, start: int) -> int:
        """How many pins `drop` would take with it."""
        first = self._first_beyond(namespace, tokens, start)
        return sum(node.pinned for node in first.descendants()) if first else 0

    def _first_beyond(self, namespace: Namespace, tokens: Tokens, start: int) -> Node[R, S] | None:
        match = self.match(namespace, tokens)
        if match.matched <= start:
            return None
        return next(node for node in match.nodes() if node.end > start)

    def split_nbytes(self, match: Match[R, S], cuts: Sequence[int]) -> int:
        """Room that cutting what matches at each of `cuts`, one after another, takes for a moment."""
        first = min(cuts, default=match.matched)
        return max(
            (
                self.references.split_nbytes(rows)
                for node in match.nodes()
                if node.end > first
                for rows in node.rows
                if any(rows.start < cut < rows.end for cut in cuts)
            ),
            default=0,
        )

    # Coming

    def root(self, namespace: Namespace) -> Node[R, S]:
        """Where a namespace's tree begins. `tidy` is due if nothing grows behind it."""
        return self._trees.planted(namespace).root

    def tidy(self, namespace: Namespace) -> None:
        """Nothing grew behind that root: then there is no such tree."""
        tree = self._trees.get(namespace)
        if tree is not None:
            self._trees.clear_away(tree)

    def graft(self, above: Node[R, S], tokens: Tokens, rows: tuple[R, ...]) -> Node[R, S]:
        """A new leaf behind `above`, where nothing begins like it yet."""
        node = above.add(tokens, rows)
        self.budget.keep(rows=node.rows_nbytes)
        return node

    def stand(self, node: Node[R, S], checkpoint: S, *, is_branch_point: bool) -> None:
        """Prompts can be resumed at the end of `node` from now on; `is_branch_point` as for a node."""
        node.set_checkpoint(checkpoint, is_branch_point=is_branch_point)
        self.budget.keep(snapshots=checkpoint.nbytes)

    def extend(
        self, namespace: Namespace, match: Match[R, S], tokens: Tokens, rows: R | None
    ) -> Node[R, S]:
        """The node that ends with `tokens`, which match so; `rows` are those that were not stored yet."""
        inside = match.inside
        before = inside.rows if inside is not None else ()
        tree = self._trees.planted(namespace)
        node = tree.extend(tokens, () if rows is None else (rows,), match.last)
        if inside is not None:
            assert inside.parent is not None
            after = {id(part) for part in (*inside.parent.rows, *inside.rows)}
            cut = [part for part in before if id(part) not in after]
            self.budget.hold(sum(self.references.split(part) for part in cut))
        if rows is not None:
            self.budget.keep(rows=rows.nbytes)
        return node

    def cut(self, namespace: Namespace, tokens: Tokens, match: Match[R, S]) -> Node[R, S]:
        """The node that ends where `tokens` and the tree part ways."""
        if match.inside is None:
            return match.path[-1]
        self.budget.make_room(self.split_nbytes(match, [match.matched]), match.nodes())
        return self.extend(namespace, match, tokens[: match.matched], None)

    # Going

    def forget(self, node: Node[R, S], *, rows: bool) -> None:
        """What stands at `node` is of no use any more; with `rows`, neither is its run.

        Then all below it goes too, because nothing there can be restored.
        """
        if node.parent is None:
            return
        _, tree = self._trees.tree_of(node)
        self.drop_checkpoint(node)
        if rows:
            for below in reversed(list(node.descendants())):
                self._remove(tree, below)

    def drop_checkpoint(self, node: Node[R, S]) -> None:
        """What stands at `node` goes; its rows stay."""
        if (gone := node.checkpoint) is not None:
            self.budget.free(snapshots=gone.nbytes, in_flight=self.references.dropped(gone))
            node.set_checkpoint(None)

    def replace_rows(self, node: Node[R, S], rows: R, instead: R) -> None:
        """Rows of `node` go for the same that weigh nothing, because somebody else pays for them."""
        node.set_rows(tuple(instead if each is rows else each for each in node.rows))
        self.budget.free(rows=rows.nbytes, in_flight=self.references.dropped(rows))

    def clear(self) -> None:
        """Forget everything that is stored."""
        for tree in [*self._trees.values()]:
            for node in reversed(list(tree.nodes())):
                self._remove(tree, node)

    def _remove(self, tree: PrefixTree[R, S], leaf: Node[R, S]) -> None:
        self.drop_checkpoint(leaf)
        self.budget.free(
            rows=leaf.rows_nbytes,
            in_flight=sum(self.references.dropped(rows) for rows in leaf.rows),
        )
        tree.remove(leaf)
        self._trees.clear_away(tree)


def tokens_to(node: AnyNode) -> Tokens:
    """All tokens that lead to the end of `node`."""
    return np.concatenate([part.tokens for part in node.path()])
