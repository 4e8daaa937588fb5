"""What is stored as people look at it: rows, of which each is a conversation or what several share.

Every prompt that a template rendered begins with the same tokens, and many questions with the same
word. Nobody looks for a fork there: runs that part ways again within `SHORTEST` tokens are folded. Their
branches stand in their place, each with the folded tokens before its own, and what they
weigh is the own of the row above. So a row is its own bytes and those of the rows below it, always.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import nlargest

import numpy as np

from mlx_hybridcache.disk.segment import PrefixDigest
from mlx_hybridcache.store.conversations import NOTHING, Branches, Digest, Early, Run, Runs, Start
from mlx_hybridcache.store.tree import common_length
from mlx_hybridcache.tokens import Tokens, TurnMarks

from .namespaces import NamespaceTree

SHORTEST = 8
"""Tokens of what several share. An opener of a turn has fewer, and so have words shared by chance."""

FEWEST_KNOWN = 1_000
"""Counts that are kept at least; else twice as many as are in use."""


@dataclass(frozen=True, slots=True)
class Row:
    """A run as it is shown: from where the row above ends, `begins`, over folded tokens.

    `turns` are the first and the last of the conversation's turns that it has a part in, counted
    from 1; None in raw text.
    """

    run: Run
    start: Start
    begins: int
    folded: tuple[Tokens, ...]
    turns: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class _Group:
    """Branches of one position, but those that are folded."""

    branches: Branches
    without: frozenset[int]
    above: Digest
    folded: tuple[Tokens, ...] = ()
    turns: int = 0  # that open before


@dataclass(eq=False, slots=True)
class Fork:
    """The rows below a row, or a namespace's. The bytes are those of the runs that are folded into it."""

    begins: int
    turns: int  # that open before
    memory_bytes: int = 0
    disk_bytes: int = 0
    groups: list[_Group] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(each.branches) - len(each.without) for each in self.groups)


class Rows:
    """Rows as they are looked at. `marks` say where turns open."""

    def __init__(self, marks: TurnMarks) -> None:
        self.runs = Runs()
        self._openers = marks.openers
        self._least = max(SHORTEST, len(marks.user_opener) + 1)
        self._early = Early()
        self._forks: dict[Run, Fork] = {}
        self._known: dict[Start, int] = {}
        self._most_known: int | None = None

    def look_again(self) -> None:
        """A new look. What is not asked for until the next time is forgotten."""
        if self._most_known is not None and len(self._known) > self._most_known:
            self._known.clear()
            self._most_known = None
        self._early.look_again()
        self.runs.look_again()

    def keep(self, runs: Iterable[Run]) -> None:
        """The look is over: forget the forks of all other runs, and in time what was counted."""
        self._forks = {run: self._forks[run] for run in runs if run in self._forks}
        if self._most_known is None:
            self._most_known = max(FEWEST_KNOWN, 2 * len(self._known))

    def top(self, tree: NamespaceTree) -> Fork:
        """What stands in a namespace."""
        return self._fork(Fork(0, 0), tree.branches, PrefixDigest(tree.key))

    def below(self, row: Row) -> Fork:
        """What goes on behind a row."""
        run = row.run
        if run not in self._forks:
            turns = row.turns[1] if row.turns else 0
            self._forks[run] = self._fork(Fork(run.end, turns), run.branches, run.digest)
        return self._forks[run]

    def first(self, fork: Fork, most: int, order: str) -> list[Row]:
        """The latest used (`recent`) or the heaviest (`size`), at most `most`."""
        found = [
            (start, group)
            for group in fork.groups
            for start in group.branches.first(most, order, group.without)
        ]
        if len(fork.groups) > 1:
            by_size = order == "size"
            found = nlargest(most, found, key=lambda it: it[0].nbytes if by_size else it[0].used)
        return [self._row(fork, start, group) for start, group in found]

    def _fork(self, fork: Fork, branches: Branches, above: Digest) -> Fork:
        waiting: list[tuple[Branches, Digest, tuple[Tokens, ...], int]]
        waiting = [(branches, above, (), fork.turns)]
        while waiting:
            branches, above, folded, turns = waiting.pop()
            without = set()
            for start in branches.forks_within(self._least, self._early):
                run = self.run(start, above)
                if self._is_shown(run):
                    continue
                without.add(start.token)
                fork.memory_bytes += run.memory_bytes
                fork.disk_bytes += run.disk_bytes
                before = (*folded, *run.tokens)
                waiting.append((run.branches, run.digest, before, turns + (run.turns or 0)))
            if len(branches) > len(without):
                left_out = frozenset(without) if without else NOTHING
                fork.groups.append(_Group(branches, left_out, above, folded, turns))
        return fork

    def _is_shown(self, run: Run) -> bool:
        is_pinned = any(place.is_pinned for place in run.places)
        return run.end - run.start >= self._least or len(run.branches) == 0 or is_pinned

    def run(self, start: Start, above: Digest) -> Run:
        """The run that begins there, with its turns counted."""
        run = self.runs.run(start, above)
        if run.turns is None:
            run.turns = sum(
                int(np.count_nonzero(part == opener))
                for part in run.tokens
                for opener in self._openers
            )
        return run

    def _row(self, fork: Fork, start: Start, group: _Group) -> Row:
        run = self.run(start, group.above)
        last = group.turns + (run.turns or 0)
        opens = int((group.folded or run.tokens)[0][0]) in self._openers
        first = fork.turns + 1 if opens or not fork.turns else fork.turns
        return Row(run, start, fork.begins, group.folded, (first, last) if last else None)

    # How many conversations

    def conversations(self, start: Start) -> int:
        """Leaves below it, of both tiers as one tree: as many as its rows have together."""
        if start.in_memory is None or start.on_disk is None:
            return _leaves(start)
        waiting = [start]
        while waiting:
            here = waiting[-1]
            if here in self._known:
                waiting.pop()
                continue
            below = [*_behind(here)]
            unknown = [
                each
                for each in below
                if each.in_memory is not None
                and each.on_disk is not None
                and each not in self._known
            ]
            if unknown:
                waiting += unknown
                continue
            leaves = [self._known[each] if each in self._known else _leaves(each) for each in below]
            self._known[here] = sum(leaves) or 1
        return self._known[start]


def _leaves(start: Start) -> int:
    """Where one tier holds all of it."""
    outline = start.in_memory or start.on_disk
    assert outline is not None
    return outline.below.leaves


def _behind(start: Start) -> Branches:
    """Where the tiers part ways, or the first of them ends."""
    in_memory, on_disk, at = start
    assert in_memory is not None
    assert on_disk is not None
    one, other = in_memory.tokens[at - in_memory.start :], on_disk.tokens[at - on_disk.start :]
    return Branches(in_memory, on_disk, at + common_length(one, other))
