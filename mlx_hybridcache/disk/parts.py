"""What the trees of a directory consist of: parts of files, and which files those still need.

Nothing here touches a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

from ..store.match import Found
from ..store.references import References
from ..store.store import Store
from ..store.tree import Held, Node
from ..tokens import Tokens
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


FileNode: TypeAlias = Node[FileRows, FileState | FileEnd]
"""A run of tokens whose rows, and whose checkpoint, lie in files."""


FileFound: TypeAlias = Found[FileRows, FileState | FileEnd]
"""What files restore of a prompt."""


def payloads(nodes: Iterable[FileNode]) -> Iterator[FileRows | FileState]:
    """Parts of files that nodes consist of."""
    for node in nodes:
        yield from node.rows
        if isinstance(node.checkpoint, FileState):
            yield node.checkpoint


def parts_of(found: FileFound) -> Iterator[FileRows]:
    """The rows that a restore from files needs, in order."""
    for node in found.nodes():
        for rows in node.rows:
            if rows.start < found.position:
                yield rows


def state_of(found: FileFound) -> Segment | None:
    """The checkpoint that a restore from files needs; None for models of rows alone."""
    stands = found.node.checkpoint if found.node is not None else None
    return stands.segment if isinstance(stands, FileState) else None


class Files(References):
    """Which files the trees still need, in bytes of each that they use.

    `leads` are what leads to where rows begin, None at the beginning, or to where a state stands.
    `ends` are nodes at whose end a file of rows ended when it came; see `standing`. `went` are files that were let go of since whoever wants to know has cleared it.
    """

    def __init__(self) -> None:
        self.delete: Callable[[Segment], None] = lambda segment: None
        self.used: dict[str, int] = {}
        self.segments: dict[str, Segment] = {}
        self.leads: dict[str, Link | None] = {}
        self.ends: dict[str, FileNode] = {}
        self.states = 0
        self.went: set[str] = set()

    def add(self, segment: Segment, nbytes: int, lead: Link | None) -> int:
        """So many bytes more of a file are needed; by how much what is in flight changes."""
        if segment.name in self.used:
            self.used[segment.name] += nbytes
            return -nbytes
        self.used[segment.name] = nbytes
        self.segments[segment.name] = segment
        self.leads[segment.name] = lead
        self.states += segment.kind == "state"
        return segment.file_nbytes - nbytes

    def standing(self, link: Link) -> FileNode | None:
        """The node that ends where a link does, if that was noted and is so still."""
        node = self.ends.get(link.segment.name) if link.end == link.segment.end else None
        return (
            node if node is not None and node.parent is not None and node.end == link.end else None
        )

    def split_nbytes(self, rows: Held) -> int:
        return 0  # a file is shared out, not copied

    def dropped(self, payload: Held) -> int:
        if not isinstance(payload, FileRows | FileState):
            return 0  # where rows end that restore by themselves
        part = payload
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


FileStore: TypeAlias = Store[FileRows, FileState | FileEnd]
"""The trees of a directory."""
