"""The one picture of what is stored, for the page and for `cache ls`: both tiers' trees as one.

It is made of runs that nothing branches from, grown only where somebody looks.

A run is mostly one conversation, or what several share. It is in memory, on disk or both, here one and
there the other. Works on outlines, on any thread, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import nlargest
from operator import attrgetter
from typing import NamedTuple, Protocol

from ..tokens import Tokens
from .outline import Outline
from .tree import common_length

NOTHING: frozenset[int] = frozenset()


class Digest(Protocol):
    """What names a prefix that grows."""

    @property
    def key(self) -> str:
        """The name."""

    def read(self, tokens: Tokens) -> Digest:
        """The digest of what `tokens` make the prefix; this one stays what it is."""


class Start(NamedTuple):
    """Where a run begins, at position `at`: in each tier the node it lies in, None where it is not."""

    in_memory: Outline | None
    on_disk: Outline | None
    at: int

    @property
    def used(self) -> tuple[float, int]:
        """When it or anything below was last used. The later, the greater."""
        return max(each.below.used for each in (self.in_memory, self.on_disk) if each is not None)

    @property
    def nbytes(self) -> int:
        """What it and everything below weigh in both tiers."""
        return self.weight(self.in_memory) + self.weight(self.on_disk)

    @property
    def token(self) -> int:
        """Its first."""
        first = self.in_memory or self.on_disk
        assert first is not None
        return int(first.tokens[self.at - first.start])

    def differs_within(self, least: int) -> bool:
        """Whether what the tiers hold of it is not the same for that many tokens."""
        assert self.in_memory is not None
        assert self.on_disk is not None
        one, other = (
            each.tokens[self.at - each.start :][:least] for each in (self.in_memory, self.on_disk)
        )
        return one.tobytes() != other.tobytes()

    def weight(self, outline: Outline | None) -> int:
        """The same in one tier."""
        if outline is None:
            return 0
        return outline.below.nbytes - _rows_bytes(outline, outline.start, self.at)


class Branches:
    """What goes on at a position in either tier, by the next token.

    There may be a thousand of which thirty are looked at, once a second: so none is made before.
    """

    def __init__(self, in_memory: Outline | None, on_disk: Outline | None, at: int):
        self._in_memory, self._on_disk, self._at = _ways(in_memory, at), _ways(on_disk, at), at

    def __len__(self) -> int:
        if not self._in_memory or not self._on_disk:
            return len(self._in_memory) + len(self._on_disk)
        return len(self._in_memory.keys() | self._on_disk.keys())

    def __iter__(self) -> Iterator[Start]:
        return map(self._start, {**self._in_memory, **self._on_disk})

    def first(self, most: int, order: str, without: frozenset[int] = NOTHING) -> list[Start]:
        """The latest used (`recent`) or the heaviest (`size`), at most `most`, but for some tokens."""
        if without:
            found = self.first(most + len(without), order)
            return [start for start in found if start.token not in without][:most]
        if len(self) == 1:
            return [*self][:most]
        if order == "size":
            return nlargest(most, self, key=_NBYTES)
        if not self._in_memory or not self._on_disk:
            # The newest are mostly the last ones, and a heap that meets the greatest first is done soonest.
            newest_first = reversed([*(self._in_memory or self._on_disk).values()])
            tokens = [
                int(each.tokens[self._at - each.start])
                for each in nlargest(most, newest_first, key=_USED)
            ]
        else:
            tokens = nlargest(most, self._in_memory.keys() | self._on_disk.keys(), key=self._used)
        return list(map(self._start, tokens))

    def forks_within(self, least: int, early: Early) -> list[Start]:
        """Those that part ways again before they have `least` tokens."""
        found = {
            int(each.tokens[self._at - each.start])
            for ways in (self._in_memory, self._on_disk)
            for each in ways.values()
            if each.end - self._at < least and early.parts(each, self._at, least)
        }
        if self._in_memory and self._on_disk:
            found |= {
                token
                for token in self._in_memory.keys() & self._on_disk.keys()
                if self._start(token).differs_within(least)
            }
        return [self._start(token) for token in sorted(found)]

    def _start(self, token: int) -> Start:
        return Start(self._in_memory.get(token), self._on_disk.get(token), self._at)

    def _used(self, token: int) -> tuple[float, int]:
        in_memory, on_disk = self._in_memory.get(token), self._on_disk.get(token)
        if in_memory is None or on_disk is None:
            alone = in_memory or on_disk
            assert alone is not None
            return alone.below.used
        return max(in_memory.below.used, on_disk.below.used)


class Early:
    """Whether what begins at a position parts ways within a few tokens: looked up once while it stays."""

    def __init__(self) -> None:
        self._known: dict[Outline, bool] = {}
        self._before: dict[Outline, bool] = {}

    def look_again(self) -> None:
        """What is not asked for until the next time is forgotten."""
        self._before, self._known = self._known, {}

    def parts(self, outline: Outline, at: int, least: int) -> bool:
        """In one tier; `least` must always be the same."""
        found = self._before.get(outline) if at == outline.start else None
        if found is None:
            below, end = outline, at + least
            while below.end < end and len(below.children) == 1:
                (below,) = below.children.values()
            found = below.end < end and len(below.children) > 1
        if at == outline.start:
            self._known[outline] = found
        return found


_NBYTES, _USED = attrgetter("nbytes"), attrgetter("below.used")


@dataclass(frozen=True, slots=True)
class Place:
    """A position that prompts can be resumed at, and what stands there in each tier, in bytes."""

    position: int
    key: str
    memory_bytes: int | None
    disk_bytes: int | None
    is_pinned: bool
    used_at: float | None
    soft_until: float | None


@dataclass(eq=False, slots=True)
class Run:
    """Positions `[start, end)`; `key` is that of the prefix `[0, end)`, as `mlx-hybridcache cache` shows it.

    `parts` are ranges with the tiers that hold them. Bytes are the run's own, rows and checkpoints.
    """

    digest: Digest
    start: int
    end: int = 0
    key: str = ""
    memory_bytes: int = 0
    disk_bytes: int = 0
    parts: list[tuple[int, int, bool, bool]] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)
    branches: Branches = field(default_factory=lambda: Branches(None, None, 0))
    turns: int | None = None  # that open in it, once somebody has counted

    @property
    def used_at(self) -> float | None:
        """When one of its places was last used."""
        return max((place.used_at or 0.0 for place in self.places), default=0.0) or None


class Runs:
    """Runs as they are looked at. What did not change since the last look is the same object."""

    def __init__(self) -> None:
        self._runs: dict[Start, Run] = {}
        self._before: dict[Start, Run] = {}

    def look_again(self) -> None:
        """What is not asked for until the next time is forgotten."""
        self._before, self._runs = self._runs, {}

    def run(self, start: Start, above: Digest) -> Run:
        """The run that begins there; `above` is the digest of what leads to it."""
        found = self._runs.get(start) or self._before.get(start) or _grown(start, above)
        self._runs[start] = found
        return found


def walk(branches: Branches, above: Digest) -> Iterator[tuple[Start, list[Run]]]:
    """Every run with those that lead to it, parents before children, depth first."""
    waiting: list[tuple[Start, Digest, list[Run]]]
    waiting = [(start, above, []) for start in reversed([*branches])]
    while waiting:
        start, above, path = waiting.pop()
        run = _grown(start, above)
        here = [*path, run]
        yield start, here
        waiting += [(branch, run.digest, here) for branch in reversed([*run.branches])]


def _grown(start: Start, above: Digest) -> Run:
    run = Run(above, start.at)
    (in_memory, on_disk, at) = start
    while True:
        first = in_memory or on_disk
        assert first is not None
        end = min(each.end for each in (in_memory, on_disk) if each is not None)
        if in_memory is not None and on_disk is not None:
            one, other = (
                in_memory.tokens[at - in_memory.start :],
                on_disk.tokens[at - on_disk.start :],
            )
            end = at + common_length(one, other)
        run.tokens.append(first.tokens[at - first.start : end - first.start])
        run.digest = run.digest.read(run.tokens[-1])
        run.memory_bytes += _rows_bytes(in_memory, at, end)
        run.disk_bytes += _rows_bytes(on_disk, at, end)
        _add_part(run.parts, at, end, in_memory is not None, on_disk is not None)
        _add_place(run, end, in_memory, on_disk)
        branches = Branches(in_memory, on_disk, end)
        if len(branches) != 1:
            run.end, run.key, run.branches = end, run.digest.key, branches
            return run
        ((in_memory, on_disk, at),) = branches


def _ways(outline: Outline | None, at: int) -> Mapping[int, Outline]:
    if outline is None:
        return {}
    if outline.end == at:
        return outline.children
    return {int(outline.tokens[at - outline.start]): outline}


def _rows_bytes(outline: Outline | None, start: int, end: int) -> int:
    """The share of `[start, end)` in a node's rows. Shares add up to the whole."""
    if outline is None or start == end:
        return 0
    length, begin = outline.end - outline.start, outline.start
    before = outline.rows_bytes * (start - begin) // length
    return outline.rows_bytes * (end - begin) // length - before


def _add_part(
    parts: list[tuple[int, int, bool, bool]], start: int, end: int, in_memory: bool, on_disk: bool
) -> None:
    if parts and parts[-1][2:] == (in_memory, on_disk):
        parts[-1] = (parts[-1][0], end, in_memory, on_disk)
    else:
        parts.append((start, end, in_memory, on_disk))


def _add_place(run: Run, end: int, in_memory: Outline | None, on_disk: Outline | None) -> None:
    """Where a node ends, if something stands there, is pinned, or nothing follows."""
    here = in_memory if in_memory is not None and in_memory.end == end else None
    there = on_disk if on_disk is not None and on_disk.end == end else None
    standing = [
        each
        for each in (here, there)
        if each is not None
        and (each.checkpoint_bytes is not None or each.is_pinned or not each.children)
    ]
    if not standing:
        return
    held = here.checkpoint_bytes if here in standing and here else None
    filed = there.checkpoint_bytes if there in standing and there else None
    run.memory_bytes += held or 0
    run.disk_bytes += filed or 0
    run.places.append(
        Place(
            position=end,
            key=run.digest.key,
            memory_bytes=held,
            disk_bytes=filed,
            is_pinned=any(each.is_pinned for each in standing),
            used_at=max((each.used_at or 0.0 for each in standing), default=0.0) or None,
            soft_until=max((each.soft_until or 0.0 for each in standing), default=0.0) or None,
        )
    )
