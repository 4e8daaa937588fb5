"""The disk tier of a rank: each has a directory of its own, and a prompt goes on where the files of all of them lead.

What is written when, what goes for want of room and what a crash left behind is each rank's own matter. Where something is
to be restored they tell each other what they have, and whether it could be read, before anything depends on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..caches.layout import Layout
from ..caches.memory import MemoryFound
from ..disk.parts import FileEnd, FileFound, FileRows, FileState
from ..disk.thread import Transfer
from ..disk.tier.arrays import RestoreBuffers
from ..disk.tier.tier import WORTH, DiskTier, OpenDirectory
from ..engine import Engine
from ..errors import GroupError, SettingError
from ..store.budget import Claim
from ..store.match import Found
from ..store.tree import Match
from ..tokens import Namespace, Tokens
from ..worker.turns import PAUSE, Job, Pause
from .acts import Acts, Hearing, Telling
from .engine import RankEngine
from .group import Group

log = logging.getLogger("mlx_hybridcache")


def opened_on_each(group: Group, root: Path, budget_bytes: int | None) -> OpenDirectory:
    """This rank's own directory below `root`. Raises `GroupError` where one rank cannot use its."""
    opened, why = None, None
    try:
        opened = OpenDirectory.at(root / f"rank-{group.rank}-of-{group.size}", budget_bytes)
    except SettingError as error:
        why = str(error)
    for rank, each in enumerate(group.agree(why)):
        if each is not None:
            raise GroupError(f"Rank {rank}: {each}")
    assert opened is not None
    return opened


def acts_of(engine: Engine) -> Acts:
    """What the engine of a rank tells or hears."""
    assert isinstance(engine, RankEngine)
    return engine.acts


@dataclass(frozen=True, slots=True)
class Places:
    """How far the files of a rank agree with a prompt, whether they go on behind that otherwise, and at which positions
    they restore it: None for any as far as they agree.
    """

    matched: int
    is_inside: bool
    positions: Sequence[int] | None

    @classmethod
    def of(cls, found: FileFound, limit: int) -> Places:
        """Those of what was found, at most at `limit`."""
        ends = [
            node.end
            for node in found.match.path
            if isinstance(node.checkpoint, FileState) and node.end <= limit
        ]
        needs_none = found.node is None and found.position > 0
        return cls(found.match.matched, found.is_inside, None if needs_none else ends)

    def restores(self, position: int) -> bool:
        """Whether one of them is there."""
        return self.matched >= position if self.positions is None else position in self.positions


@dataclass(frozen=True, slots=True)
class AgreedFound(Found[FileRows, FileState | FileEnd]):
    """The same as far as every rank has it, so that all go on alike."""

    goes_on: bool = False

    @property
    def is_inside(self) -> bool:
        return self.goes_on


def agreed(places: Sequence[Places], limit: int) -> tuple[int, int, bool]:
    """Where all restore, how far all agree, and whether all go on behind that."""
    matched = min(each.matched for each in places)
    listed = [set(each.positions) for each in places if each.positions is not None]
    common = set.intersection(*listed) if listed else {min(matched, limit)}
    return max(common, default=0), matched, all(each.is_inside for each in places)


def as_far(found: FileFound, position: int, matched: int, *, is_inside: bool) -> AgreedFound:
    """What a rank found, cut to what all of them have."""
    path = tuple(node for node in found.nodes() if node.end <= matched)
    behind = found.nodes()[len(path) :]
    is_cut = matched > (path[-1].end if path else 0)
    match = Match(matched, path, behind[0] if is_cut else None, found.match.contradicted)
    stands = (
        node for node in path if node.end == position and isinstance(node.checkpoint, FileState)
    )
    return AgreedFound(match, position, next(stands, None), goes_on=is_inside)


@dataclass(eq=False)
class RankDisk(DiskTier):
    """One rank's. `acts` are what it tells or hears; all ranks ask each other the same at the same places.

    What is read for requests is numbered in the order in which it begins, which is one on all ranks.
    """

    acts: Acts = field(kw_only=True)
    worker_post: Callable[[Callable[[], None]], None] = field(kw_only=True)
    _begun: int = field(default=0, init=False)
    _sleepers: dict[int, Job] = field(default_factory=dict, init=False)
    _read_by: dict[int, set[int]] = field(default_factory=dict, init=False)
    _told: set[int] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.acts, Telling):
            self.acts.read_by = lambda rank, number: self.worker_post(
                lambda: self._note_read(rank, number)
            )

    def find(self, namespace: Namespace, tokens: Tokens, beyond: int) -> FileFound | None:
        limit = len(tokens) - 1
        if limit < beyond + WORTH:
            return None
        own = self._look(namespace, tokens)
        mine = Places.of(own, limit)
        values = self.acts.gather([mine.matched, mine.is_inside, mine.positions])
        places = [Places(*each) for each in values]
        position, matched, is_inside = agreed(places, limit)
        self._say_who_lacks(places, own.position, position)
        if position < beyond + WORTH:
            return None
        return as_far(own, position, matched, is_inside=is_inside)

    def _say_who_lacks(self, places: Sequence[Places], own: int, position: int) -> None:
        """Once for each rank, on rank 0: what was kept here is of no use where another has lost its part."""
        if own < position + WORTH or self.acts.group.rank:
            return
        for rank, each in enumerate(places):
            if rank not in self._told and not each.restores(own):
                self._told.add(rank)
                log.warning(
                    "Rank %d has no files that restore a prompt at %d tokens, as rank 0 has: all go on at %d. "
                    "Its directory was emptied, holds less, was not written to the end, or another process writes it.",
                    rank,
                    own,
                    position,
                )

    def promote(
        self,
        layout: Layout,
        found: MemoryFound,
        deeper: FileFound,
        capacity: int,
        claim: Claim,
        job: Job,
    ) -> Generator[Pause, None, RestoreBuffers | None]:
        number, self._begun = self._begun, self._begun + 1
        self._sleepers[number] = job
        reading = super().promote(layout, found, deeper, capacity, claim, job)
        try:
            buffers = yield from self._behind_one_pause(reading, job)
        finally:
            del self._sleepers[number]
            self._read_by.pop(number, None)
        came = self.acts.gather(buffers is not None)
        return buffers if all(came) else None

    def _behind_one_pause(
        self, reading: Generator[Pause, None, RestoreBuffers | None], job: Job
    ) -> Generator[Pause, None, RestoreBuffers | None]:
        """What comes of it after exactly one turn, which all ranks give up alike, whether there is something to read or not.

        On rank 0 the request sleeps until all have read.
        """
        try:
            next(reading)
        except StopIteration as ended:
            job.asleep = True
            self._wake(job)
            yield PAUSE
            return _outcome(ended)
        try:
            yield PAUSE
            next(reading)
        except StopIteration as ended:
            return _outcome(ended)
        finally:
            reading.close()
        raise RuntimeError("Files were waited for twice.")

    def _wake(self, job: Job) -> None:
        """This rank has read what it has of it; rank 0 hears of that."""
        number = next((n for n, each in self._sleepers.items() if each is job), None)
        if number is None:
            return  # it went away
        if isinstance(self.acts, Hearing):
            job.asleep = False
            self.acts.has_read(number)
        else:
            self._note_read(0, number)

    def _note_read(self, rank: int, number: int) -> None:
        """On rank 0: a rank has read, perhaps before this one has begun to."""
        if number < self._begun and number not in self._sleepers:
            return
        found = self._read_by.setdefault(number, set())
        found.add(rank)
        if number in self._sleepers and len(found) == self.acts.group.size:
            self._sleepers[number].asleep = False

    def _left(self, transfer: Transfer, job: Job, claim: Claim, may_land: int) -> int:
        """When a file is read only this rank knows: none leaves bytes that the others do not count."""
        transfer.finished.wait()
        return 0

    def shared(self, namespace: Namespace, tokens: Tokens) -> tuple[int, int]:
        ends, begins = zip(*self.acts.gather(super().shared(namespace, tokens)), strict=True)
        return max(ends), max(begins)

    def pins(self, namespace: Namespace, tokens: Tokens, start: int) -> int:
        pinned: list[int] = self.acts.gather(super().pins(namespace, tokens, start))
        return max(pinned)

    def is_writing(self) -> bool:
        return any(self.acts.gather(super().is_writing()))

    def is_written(self) -> bool:
        return all(self.acts.gather(super().is_written()))


def _outcome(ended: StopIteration) -> RestoreBuffers | None:
    outcome: RestoreBuffers | None = ended.value
    return outcome
