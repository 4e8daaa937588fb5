"""What the trees of a directory consist of: parts of files, and which files those still need.

Nothing here touches a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, cast

from ..store.budget import Holders
from ..store.store import Store
from ..store.tree import Held, Node
from ..tokens import Namespace, Tokens
from .chains import Link
from .segment import Segment


@dataclass(frozen=True, slots=True)
class FileRows:
    """The rows of `[start, end)`, which lie in a segment."""

    segment: Segment
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """The part's share of the file. Shares add up to the file, however it is split."""
        return self._up_to(self.end) - self._up_to(self.start)

    def _up_to(self, position: int) -> int:
        segment = self.segment
        length = segment.end - segment.start
        return segment.file_nbytes * (position - segment.start) // length

    def tokens(self) -> Tokens:
        """Its own."""
        return self.segment.tokens[self.start - self.segment.start : self.end - self.segment.start]

    def split(self, position: int) -> tuple[FileRows, FileRows]:
        """Two parts of the same file."""
        return replace(self, end=position), replace(self, start=position)


@dataclass(frozen=True, slots=True)
class FileState:
    """A checkpoint, which is a segment of its own."""

    segment: Segment

    @property
    def nbytes(self) -> int:
        return self.segment.file_nbytes


@dataclass(frozen=True, slots=True)
class FileEnd:
    """Where rows of a model without states end: they restore by themselves."""

    segment: Segment

    nbytes: ClassVar[int] = 0


def payloads(nodes: Iterable[Node]) -> Iterator[FileRows | FileState]:
    """Parts of files that nodes consist of."""
    for node in nodes:
        yield from cast("tuple[FileRows, ...]", node.rows)
        if isinstance(node.checkpoint, FileState):
            yield node.checkpoint


class Files(Holders):
    """Which files the trees still need, in bytes of each that they use.

    `leads` are what leads to where rows begin, None at the beginning, or to where a state stands.
    `ends` are nodes at whose end a file of rows ended when it came; see `standing`. `went` are files that were let go of since whoever wants to know has cleared it.
    """

    def __init__(self) -> None:
        self.delete: Callable[[Segment], None] = lambda segment: None
        self.used: dict[str, int] = {}
        self.segments: dict[str, Segment] = {}
        self.leads: dict[str, Link | None] = {}
        self.ends: dict[str, Node] = {}
        self.states = 0
        self.went: set[str] = set()

    def add(self, segment: Segment, nbytes: int, lead: Link | None) -> int:
        """So many bytes more of a file are needed; by how much what lingers changes."""
        if segment.name in self.used:
            self.used[segment.name] += nbytes
            return -nbytes
        self.used[segment.name] = nbytes
        self.segments[segment.name] = segment
        self.leads[segment.name] = lead
        self.states += segment.kind == "state"
        return segment.file_nbytes - nbytes

    def standing(self, link: Link) -> Node | None:
        """The node that ends where a link does, if that was noted and is so still."""
        node = self.ends.get(link.segment.name) if link.end == link.segment.end else None
        return (
            node if node is not None and node.parent is not None and node.end == link.end else None
        )

    def split_nbytes(self, rows: Held) -> int:
        return 0  # a file is shared out, not copied

    def dropped(self, payload: Held) -> int:
        if isinstance(payload, FileEnd):
            return 0
        part = cast("FileRows | FileState", payload)
        name = part.segment.name
        self.used[name] -= part.nbytes
        if self.used[name] > 0:
            return part.nbytes
        del self.used[name], self.segments[name], self.leads[name]
        self.ends.pop(name, None)
        self.states -= part.segment.kind == "state"
        self.went.add(name)
        self.delete(part.segment)
        return part.nbytes - part.segment.file_nbytes


class FileStore(Store):
    """The trees of a directory. What is known to be new is put where it belongs without another look."""

    def root(self, namespace: Namespace) -> Node:
        """Where a namespace's tree begins."""
        return self._trees.planted(namespace).root

    def tidy(self, namespace: Namespace) -> None:
        """Nothing grew behind that root: then there is no such tree."""
        tree = self._trees.get(namespace)
        if tree is not None:
            self._trees.clear_away(tree)

    def graft(self, above: Node, tokens: Tokens, rows: tuple[FileRows, ...]) -> Node:
        """A new leaf behind `above`, where nothing begins like it yet."""
        node = above.add(tokens, rows)
        self.rows_bytes += node.rows_nbytes
        return node

    def stand(self, node: Node, stands: FileState | FileEnd, *, is_parting: bool) -> None:
        """Something restores at the end of `node` from now on."""
        node.checkpoint = stands
        node.is_end, node.returns = True, int(is_parting)
        self.snapshot_bytes += stands.nbytes
        node.touch()
