"""The radix tree of everything read so far: runs of tokens, the rows they own, the checkpoints at their ends.

    root ──[0, 512)●──[512, 1024)●──[1024, 3000) ──[3000, 3100)●        a conversation
                                          └───────[3000, 3050)●        one that parted ways at 3,000

A node owns the rows of exactly its own run, so that rows are stored once however many checkpoints
and branches share them. `●` is a checkpoint, and a checkpoint stands only at the end of a node.
Splitting a node splits its rows and leaves the new upper half without a checkpoint. Nothing here
knows MLX: rows and checkpoints are opaque, and matching compares token arrays only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np

from ..tokens import Tokens, as_tokens

SHOWN = 64
"""Branches that are looked at to show how a tree goes on."""


class Rows(Protocol):
    """One stretch of keys and values for every attention layer, positions `[start, end)`."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def split(self, position: int) -> tuple[Self, Self]:
        """Two stretches that own their bytes, `[start, position)` and `[position, end)`."""
        ...


class Held(Protocol):
    """What stands at a checkpoint, seen from the tree: something with a weight."""

    @property
    def nbytes(self) -> int: ...


R = TypeVar("R", bound=Rows)
"""The rows of one store."""

S = TypeVar("S", bound=Held)
"""What stands at its checkpoints."""


class Noted:
    """Nodes that changed since somebody last looked, in the order in which they did.

    `changed` ones did in themselves or in what is next to them, `passed` ones in what lies far below them
    only: where that ends, and when something was stored there. `roots` are those of trees in which
    something changed that outlines show.
    """

    __slots__ = ("changed", "passed", "roots")

    def __init__(self) -> None:
        self.changed: dict[AnyNode, None] = {}
        self.passed: dict[AnyNode, None] = {}
        self.roots: dict[AnyNode, None] = {}


_serials = itertools.count()

JUST_BEFORE = 1e-3
"""What is split off above a node counts as made before it, the nearer the shorter, and behind what was."""


class Node(Generic[R, S]):
    """A run of tokens at positions `[start, end)`, reached through its parents."""

    __slots__ = (
        "checkpoint",
        "children",
        "deepest",
        "fresh",
        "is_end",
        "last_passed",
        "last_used",
        "needs_checkpoint",
        "noted",
        "outline",
        "parent",
        "pinned",
        "returns",
        "rows",
        "serial",
        "soft_pin",
        "standing",
        "start",
        "tokens",
    )

    def __init__(
        self,
        parent: Node[R, S] | None,
        start: int,
        tokens: Tokens,
        rows: tuple[R, ...],
        noted: Noted,
    ):
        self.serial: float = next(_serials)  # the earlier made, the less
        self.parent = parent  # None for the root, and for what was taken out
        self.start = start
        self.tokens = tokens
        self.rows = rows
        self.children: dict[int, Node[R, S]] | None = None
        self.checkpoint: S | None = None
        self.is_end = False  # a prompt or a reply ended here
        self.pinned = False
        self.soft_pin: Any = (
            None  # for how long it is kept where anything else may go (`soft_pins`)
        )
        self.last_used = 0  # the store's logical clock
        self.last_passed = 0  # the same: a request stored something here or below
        self.returns = 0  # prompts that parted ways here with what is stored below
        self.deepest = start + len(tokens)  # the last position of anything here or below
        # Whether rows alone restore nothing here: as in all of its tree.
        self.needs_checkpoint: bool = parent is None or parent.needs_checkpoint
        self.noted = noted
        self.standing: Any = None  # what is known of it to let things go (`values`)
        self.outline: Any = None  # what other threads know of it (`outline`)
        # Since that was made it has changed, or what begins with these tokens below it; None: neither.
        self.fresh: set[int] | None = set()

    @property
    def end(self) -> int:
        """The position behind the run's last token."""
        return self.start + len(self.tokens)

    @property
    def rows_nbytes(self) -> int:
        """Bytes of the rows that this node owns."""
        return sum(rows.nbytes for rows in self.rows)

    def child(self, token: int) -> Node[R, S] | None:
        """The run that goes on with `token`."""
        return self.children.get(token) if self.children else None

    def set_checkpoint(self, checkpoint: S | None, *, is_branch_point: bool = False) -> None:
        """This stands at its end from now on; `is_branch_point` says that prompts part ways there."""
        self.checkpoint = checkpoint
        if checkpoint is not None:
            self.returns = int(is_branch_point)
        else:
            self.soft_pin = None
        self.touch()

    def set_rows(self, rows: tuple[R, ...]) -> None:
        """The same rows lie elsewhere from now on, and weigh something else here."""
        self.rows = rows
        self.note()

    def pin(self, *, is_pinned: bool) -> None:
        """Keep it whatever comes, or no longer."""
        self.pinned = is_pinned
        self.touch()

    def hold(self, soft_pin: Any) -> None:
        """Keep it for a time, as long as anything else may go; None: no longer."""
        self.soft_pin = soft_pin
        self.touch()

    def use(self, clock: int, *, is_end: bool = False) -> None:
        """It was taken or restored at this time of the store's clock; `is_end` as for a node."""
        self.last_used = clock
        self.is_end = self.is_end or is_end
        self.touch()

    def part(self) -> None:
        """One more prompt has parted ways here with what is stored below."""
        self.returns += 1
        self.touch()

    def note(self) -> None:
        """Say that something changed here that decides what is let go."""
        self.noted.changed[self] = None

    def touch(self) -> None:
        """Say that something changed here, so that the next outline shows it too."""
        self.note()
        if self.fresh is None:
            self.fresh = set()
            self.tell()

    def tell(self) -> None:
        """Let the nodes above know that this one, or what is in its place now, has changed."""
        node = self
        while (parent := node.parent) is not None:
            knew = parent.fresh is not None
            if parent.fresh is None:
                parent.fresh = set()
            parent.fresh.add(int(node.tokens[0]))
            if knew:
                return
            node = parent
        self.noted.roots[node] = None

    def add(self, run: Tokens, rows: tuple[R, ...]) -> Node[R, S]:
        """A new leaf behind this node, where nothing begins like it yet."""
        child = Node(self, self.end, run, rows, self.noted)
        if self.children is None:
            self.children = {}
        assert int(run[0]) not in self.children
        self.children[int(run[0])] = child
        child.note()
        child.tell()
        child.reach()
        self.note()
        return child

    def pass_by(self, clock: int) -> None:
        """A request stored something here or below at this time of the store's clock."""
        self.last_passed = clock
        self.noted.passed[self] = None

    def reach(self) -> None:
        """Something that ends at `deepest` is new here: so far reach the nodes above too."""
        node = self.parent
        while node is not None and node.deepest < self.deepest:
            node.deepest = self.deepest
            self.noted.passed[node] = None
            node = node.parent

    def reach_less(self, gone: int) -> None:
        """What ended at `gone` is no longer below: look how far this node and those above reach now."""
        node = self
        while node.parent is not None and node.deepest == gone:
            deepest = node.end
            for child in (node.children or {}).values():
                deepest = max(deepest, child.deepest)
                if deepest == gone:
                    return
            node.deepest = deepest
            self.noted.passed[node] = None
            node = node.parent

    def path(self) -> list[Node[R, S]]:
        """The nodes from below the root down to this one."""
        nodes: list[Node[R, S]] = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def paths(self) -> Iterator[list[Node[R, S]]]:
        """Every path through this node, from below the root to a leaf."""
        return (below.path() for below in self.descendants() if not below.children)

    def unshared(self) -> list[Node[R, S]]:
        """This leaf and the nodes above it that lead to no other one, bottom up."""
        nodes = [self]
        above = self.parent
        while above is not None and above.parent is not None and len(above.children or ()) == 1:
            nodes.append(above)
            above = above.parent
        return nodes

    def goes_beyond(self, position: int) -> bool:
        """Whether something below this node ends behind `position`."""
        return self.deepest > position

    def descendants(self) -> Iterator[Node[R, S]]:
        """This node and all below it, parents before children, older children before younger."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            if node.children:
                stack.extend(reversed(node.children.values()))


AnyNode = Node[Any, Any]
"""A node, to whom its payloads are weights only."""


@dataclass(frozen=True, slots=True)
class Match(Generic[R, S]):
    """How far a prompt agrees with the tree, and the deepest places to return to.

    `matched` tokens agree. `path` holds the nodes that agree wholly; `inside` is the node in whose
    run the agreement ends, if it does not end at a node's end. `contradicted` says that the tree
    goes on from there, but differently.
    """

    matched: int
    path: tuple[Node[R, S], ...]
    inside: Node[R, S] | None
    contradicted: bool

    @property
    def last(self) -> Node[R, S] | None:
        """The deepest node that agrees wholly, if there is one."""
        return self.path[-1] if self.path else None

    def nodes(self) -> tuple[Node[R, S], ...]:
        """The path, with the node in whose run the agreement ends."""
        return self.path if self.inside is None else (*self.path, self.inside)

    def paths(self, position: int) -> Iterable[Sequence[Node[R, S]]]:
        """The paths on which a node that ends at `position` of the prompt lies, or would lie."""
        return self.nodes()[-1].paths() if self.matched == position else (self.path,)

    def continuation(self) -> Tokens:
        """How the tree goes on where the prompt contradicts it; of several branches, the last used.

        Of very many, it is the last used of the youngest: it is only shown.
        """
        if self.inside is not None:
            return self.inside.tokens[self.matched - self.inside.start :]
        children = self.path[-1].children if self.path else None
        if not children:
            return as_tokens([])
        youngest = itertools.islice(reversed(children.values()), SHOWN)
        return max(youngest, key=lambda child: (child.last_used, -child.serial)).tokens

    def deepest_checkpoint(self, limit: int) -> Node[R, S] | None:
        """The deepest node on the path with a checkpoint at a position of at most `limit`."""
        for node in reversed(self.path):
            if node.checkpoint is not None and node.end <= limit:
                return node
        return None


AnyMatch = Match[Any, Any]


class PrefixTree(Generic[R, S]):
    """One namespace's tree. Looking up changes nothing; `extend` and `remove` do.

    Without `needs_checkpoints` its rows restore at any position.
    """

    def __init__(self, noted: Noted | None = None, *, needs_checkpoints: bool = True) -> None:
        self.root: Node[R, S] = Node(None, 0, as_tokens([]), (), noted or Noted())
        self.root.needs_checkpoint = needs_checkpoints
        self.root.fresh = None  # its first child tells that there is something

    def match(self, tokens: Tokens, known: Node[R, S] | None = None) -> Match[R, S]:
        """The longest stored prefix of `tokens` (int32, shape `(n,)`), linear in `n`.

        `known` is a node found on the way of these tokens before, of fewer or of more of them: what leads to
        it is not compared again. That holds as long as it is in the tree: a node may get other
        parents, but from the root to its end they spell the same tokens.
        """
        path = self._path_to(known, len(tokens))
        node = path[-1] if path else self.root
        start = position = node.end
        content, width = tokens[start:].tobytes(), tokens.itemsize
        while position < len(tokens):
            child = node.child(int(tokens[position]))
            if child is None:
                return Match(position, tuple(path), None, contradicted=bool(node.children))
            # A conversation's path has hundreds of runs: bytes compare in a third of the time, where they lie.
            if not content.startswith(child.tokens.data, width * (position - start)):
                position += common_length(child.tokens, tokens[position:])
                return Match(position, tuple(path), child, contradicted=position < len(tokens))
            path.append(child)
            node, position = child, position + len(child.tokens)
        return Match(position, tuple(path), None, contradicted=False)

    def _path_to(self, known: Node[R, S] | None, limit: int) -> list[Node[R, S]]:
        """The nodes down to `known` that end at `limit` at the latest; none where it has left the tree."""
        path = known.path() if known is not None else []
        if not path or path[0].parent is not self.root:
            return []
        while path and path[-1].end > limit:
            path.pop()
        return path

    def extend(
        self, tokens: Tokens, rows: tuple[R, ...], known: Node[R, S] | None = None
    ) -> Node[R, S]:
        """The node that ends exactly at `len(tokens)`, made by splitting or by adding a run.

        `rows` are those of the positions that the tree does not hold yet, in order and without a
        gap; empty when it holds them all, or where no layer keeps rows. `known` as for `match`.
        """
        match = self.match(tokens, known)
        node = match.path[-1] if match.path else self.root
        if match.inside is not None:
            node = self._split(match.inside, match.matched)
        if match.matched == len(tokens):
            return node
        assert not rows or (rows[0].start == match.matched and rows[-1].end == len(tokens))
        run = as_tokens(tokens[match.matched :])
        return node.add(run, rows)

    def remove(self, node: Node[R, S]) -> None:
        """Take a leaf out. Its rows go with it."""
        assert not node.children and node.parent is not None and node.parent.children
        del node.parent.children[int(node.tokens[0])]
        if not node.parent.children:
            node.parent.children = None
        node.parent.note()
        node.tell()
        node.parent.reach_less(node.end)
        node.note()
        node.parent, node.rows = None, ()  # whoever still knows the node must not hold its bytes

    def merge(self, node: Node[R, S]) -> None:
        """Let the only child of `node`, which has no checkpoint, take over its run and its rows."""
        assert node.checkpoint is None and node.parent is not None and node.parent.children
        (child,) = (node.children or {}).values()
        child.parent, child.start = node.parent, node.start
        child.tokens = as_tokens(np.concatenate([node.tokens, child.tokens]))
        child.rows = node.rows + child.rows
        node.parent.children[int(node.tokens[0])] = child
        child.touch()
        child.tell()
        node.note()
        node.parent, node.rows = None, ()

    def nodes(self) -> Iterator[Node[R, S]]:
        """Every node but the root, parents before children."""
        every = self.root.descendants()
        next(every)
        yield from every

    def _split(self, node: Node[R, S], position: int) -> Node[R, S]:
        """Cut `node` at `position`, strictly inside its run; returns the new upper half."""
        assert node.parent is not None and node.parent.children is not None
        upper_rows: list[R] = []
        lower_rows: list[R] = []
        for rows in node.rows:
            if rows.end <= position:
                upper_rows.append(rows)
            elif rows.start >= position:
                lower_rows.append(rows)
            else:
                upper, lower = rows.split(position)
                upper_rows.append(upper)
                lower_rows.append(lower)
        node.touch()
        at = position - node.start
        run = as_tokens(node.tokens[:at])
        upper_node = Node(node.parent, node.start, run, tuple(upper_rows), node.noted)
        upper_node.last_used, upper_node.last_passed = node.last_used, node.last_passed
        upper_node.deepest = node.deepest
        upper_node.serial = node.serial - JUST_BEFORE / position
        upper_node.outline = node.outline  # from which it takes when that was
        node.parent.children[int(node.tokens[0])] = upper_node
        node.parent, node.start = upper_node, position
        node.tokens, node.rows = as_tokens(node.tokens[at:]), tuple(lower_rows)
        upper_node.children = {int(node.tokens[0]): node}
        upper_node.fresh = {int(node.tokens[0])}
        upper_node.note()
        return upper_node


def common_length(run: Tokens, tokens: Tokens) -> int:
    """Length of the common beginning of two token arrays."""
    length = min(len(run), len(tokens))
    differs = run[:length] != tokens[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length
