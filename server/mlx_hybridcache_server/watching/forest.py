"""Both tiers' trees as one: runs that nothing branches from, grown only where somebody looks.

A run is mostly one conversation, or what several share. It is in memory, on disk or both, here one and
there the other. Works on outlines, on any thread, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import nlargest
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from mlx_hybridcache.cache import Outlines
from mlx_hybridcache.disk.catalogue import digest
from mlx_hybridcache.disk.segment import PrefixDigest
from mlx_hybridcache.store.outline import Outline
from mlx_hybridcache.store.tree import common_length
from mlx_hybridcache.tokens import Namespace, Tokens

NOTHING: frozenset[int] = frozenset()


class Start(NamedTuple):
    """Where a run begins, at position `at`: in each tier the node it lies in, None where it is not."""

    memory: Outline | None
    disk: Outline | None
    at: int

    @property
    def used(self) -> tuple[float, int]:
        """When it or anything below was last used. The later, the greater."""
        return max(each.below.used for each in (self.memory, self.disk) if each is not None)

    @property
    def nbytes(self) -> int:
        """What it and everything below weigh in both tiers."""
        return self.weight(self.memory) + self.weight(self.disk)

    @property
    def token(self) -> int:
        """Its first."""
        first = self.memory or self.disk
        assert first is not None
        return int(first.tokens[self.at - first.start])

    def differs_within(self, least: int) -> bool:
        """Whether what the tiers hold of it is not the same for that many tokens."""
        assert self.memory is not None
        assert self.disk is not None
        one, other = (
            each.tokens[self.at - each.start :][:least] for each in (self.memory, self.disk)
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

    def __init__(self, memory: Outline | None, disk: Outline | None, at: int):
        self._memory, self._disk, self._at = _ways(memory, at), _ways(disk, at), at

    def __len__(self) -> int:
        if not self._memory or not self._disk:
            return len(self._memory) + len(self._disk)
        return len(self._memory.keys() | self._disk.keys())

    def __iter__(self) -> Iterator[Start]:
        return map(self._start, {**self._memory, **self._disk})

    def first(self, most: int, order: str, without: frozenset[int] = NOTHING) -> list[Start]:
        """The latest used (`recent`) or the heaviest (`size`), at most `most`, but for some tokens."""
        if without:
            found = self.first(most + len(without), order)
            return [start for start in found if start.token not in without][:most]
        if len(self) == 1:
            return [*self][:most]
        if order == "size":
            return nlargest(most, self, key=_NBYTES)
        if not self._memory or not self._disk:
            # The newest are mostly the last ones, and a heap that meets the greatest first is done soonest.
            newest_first = reversed([*(self._memory or self._disk).values()])
            tokens = [
                int(each.tokens[self._at - each.start])
                for each in nlargest(most, newest_first, key=_USED)
            ]
        else:
            tokens = nlargest(most, self._memory.keys() | self._disk.keys(), key=self._used)
        return list(map(self._start, tokens))

    def forks_within(self, least: int, early: Early) -> list[Start]:
        """Those that part ways again before they have `least` tokens."""
        found = {
            int(each.tokens[self._at - each.start])
            for ways in (self._memory, self._disk)
            for each in ways.values()
            if each.end - self._at < least and early.parts(each, self._at, least)
        }
        if self._memory and self._disk:
            found |= {
                token
                for token in self._memory.keys() & self._disk.keys()
                if self._start(token).differs_within(least)
            }
        return [self._start(token) for token in sorted(found)]

    def _start(self, token: int) -> Start:
        return Start(self._memory.get(token), self._disk.get(token), self._at)

    def _used(self, token: int) -> tuple[float, int]:
        memory, disk = self._memory.get(token), self._disk.get(token)
        if memory is None or disk is None:
            alone = memory or disk
            assert alone is not None
            return alone.below.used
        return max(memory.below.used, disk.below.used)


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


@dataclass(eq=False, slots=True)
class Run:
    """Positions `[start, end)`; `key` is that of the prefix `[0, end)`, as `mlx-hybridcache cache` shows it.

    `parts` are ranges with the tiers that hold them. Bytes are the run's own, rows and checkpoints.
    """

    digest: PrefixDigest
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


@dataclass(frozen=True, slots=True)
class Shelf:
    """All that one namespace holds. Without `salt` it is known by files only: of another model or salt."""

    key: str
    salt: str | None
    nbytes: int
    branches: Branches
    start: Start


class Forest:
    """Runs as they are looked at. What did not change since the last look is the same object."""

    def __init__(self) -> None:
        self._runs: dict[Start, Run] = {}
        self._before: dict[Start, Run] = {}

    def shelves(self, outlines: Outlines, own: Namespace) -> list[Shelf]:
        """A new look: the model's own shelf first, then those with salts, then those of others."""
        self._before, self._runs = self._runs, {}
        salts = {digest(name): name.salt for name in (own, *outlines.memory)}
        memory = {digest(name): each for name, each in outlines.memory.items()}
        on_disk = {name.settings: each for name, each in outlines.disk.items()}
        shelves = []
        for key in dict.fromkeys([*memory, *on_disk]):
            top = Start(memory.get(key), on_disk.get(key), 0)
            shelves.append(Shelf(key, salts.get(key), top.nbytes, Branches(*top), top))
        return sorted(shelves, key=lambda shelf: (shelf.salt != own.salt, shelf.salt is None))

    def run(self, start: Start, above: PrefixDigest) -> Run:
        """The run that begins there; `above` is the digest of what leads to it."""
        found = self._runs.get(start) or self._before.get(start) or _grown(start, above)
        self._runs[start] = found
        return found


def find(shelves: list[Shelf], key: str) -> tuple[Shelf, Tokens] | None:
    """The tokens of the prefix that `key` names, and the shelf it lies on. Looks at everything."""
    for shelf in shelves:
        for path in _paths(shelf):
            run = path[-1]
            place = next((each for each in run.places if each.key == key), None)
            if run.key == key or place is not None:
                tokens = np.concatenate([part for each in path for part in each.tokens])
                return shelf, tokens[: run.end if place is None else place.position]
    return None


def _paths(shelf: Shelf) -> Iterator[list[Run]]:
    """Every run of a shelf with those above it."""
    top = PrefixDigest(shelf.key)
    waiting: list[tuple[Start, PrefixDigest, list[Run]]]
    waiting = [(start, top, []) for start in shelf.branches]
    while waiting:
        start, above, path = waiting.pop()
        run = _grown(start, above)
        here = [*path, run]
        yield here
        waiting += [(branch, run.digest, here) for branch in run.branches]


def _grown(start: Start, above: PrefixDigest) -> Run:
    run = Run(above, start.at)
    (memory, disk, at) = start
    while True:
        first = memory or disk
        assert first is not None
        end = min(each.end for each in (memory, disk) if each is not None)
        if memory is not None and disk is not None:
            one, other = memory.tokens[at - memory.start :], disk.tokens[at - disk.start :]
            end = at + common_length(one, other)
        run.tokens.append(first.tokens[at - first.start : end - first.start])
        run.digest = run.digest.read(run.tokens[-1])
        run.memory_bytes += _rows_bytes(memory, at, end)
        run.disk_bytes += _rows_bytes(disk, at, end)
        _add_part(run.parts, at, end, memory is not None, disk is not None)
        _add_place(run, end, memory, disk)
        branches = Branches(memory, disk, end)
        if len(branches) != 1:
            run.end, run.key, run.branches = end, run.digest.key, branches
            return run
        ((memory, disk, at),) = branches


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
    parts: list[tuple[int, int, bool, bool]], start: int, end: int, memory: bool, disk: bool
) -> None:
    if parts and parts[-1][2:] == (memory, disk):
        parts[-1] = (parts[-1][0], end, memory, disk)
    else:
        parts.append((start, end, memory, disk))


def _add_place(run: Run, end: int, memory: Outline | None, disk: Outline | None) -> None:
    """Where a node ends, if something stands there, is pinned, or nothing follows."""
    here = memory if memory is not None and memory.end == end else None
    there = disk if disk is not None and disk.end == end else None
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
        )
    )
