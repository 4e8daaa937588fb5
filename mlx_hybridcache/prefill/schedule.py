"""Where checkpoints are taken: pure functions from numbers to an ascending list of positions.

Placement decides whether a cache is useful. A cut is a position where a checkpoint is taken while a
prompt is read: grid cuts (system prompts whose last line changes), turn cuts (the next turn, the
regenerated answer), end cuts (a changed ending is the commonest edit), and the branch cut (the next
request of this family resumes exactly where the family parts ways).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STEP = 2048
"""The longest slice, and the distance of grid cuts, in tokens, unless a cache is made with others."""

MIN_STEP = 512
"""The same for the first grid cut."""

TAILS = (64, 512)
"""Distances from the prompt's end, in tokens, at which a changed ending finds a checkpoint."""

TAIL_WORTH = 3
"""A tail cut is taken when at least this many times its distance is being read."""

FIRST_WORTH = 64
"""A checkpoint nearer to the beginning saves less replay than it is worth: every ChatML prompt
begins with the same opener, and one token is read in no time."""

PAUSES_COLD, PAUSES_HOT = 7, 3
"""Cuts off the slice grid that a replay without capture hook may pause for: one forward each."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The regular part of the schedule. All in tokens.

    `step` bounds a slice; `every` is the distance of grid cuts, a multiple of `step`; `first` are
    the denser cuts near the beginning; `alignment` is the block in which the model's layers are
    computed (1 where any position gives the same bits), honoured by all grid cuts.
    """

    step: int = STEP
    every: int = STEP
    min_step: int = MIN_STEP
    alignment: int = 1

    @property
    def first_worth(self) -> int:
        """Turn and branch cuts begin here."""
        return min(FIRST_WORTH, max(1, self.step // 4))

    @property
    def first(self) -> tuple[int, ...]:
        """The early cuts, a quarter and a half step: 512 and 1,024 at the default step."""
        early = (min(self.min_step, self.step // 4), self.step // 2)
        return tuple(sorted({_round_up(cut, self.alignment) for cut in early if cut > 0}))

    def cuts(self, start: int, end: int) -> list[int]:
        """Grid cuts in `(start, end)`, ascending."""
        every = _round_up(self.every, self.alignment)
        regular = range((start // every + 1) * every, end, every)
        early = [cut for cut in self.first if start < cut < min(end, every)]
        return [*early, *regular]

    @property
    def shared_step(self) -> int:
        """The longest slice while others wait: a quarter step, in whole blocks of the layers."""
        return min(self.step, _round_up(max(1, self.step // 4), self.alignment))


@dataclass(frozen=True, slots=True)
class Reading:
    """What is about to be read: `[start, end)`, and what is known about the tokens there.

    `turn_starts` are the positions just behind the tokens that open a turn, over the whole prompt,
    ascending; `branch` is the position up to which the prompt agrees with what is stored;
    `boundaries` were declared by the caller.
    """

    start: int
    end: int
    turn_starts: Sequence[int] = ()
    branch: int = 0
    boundaries: Sequence[int] = ()


def spaced(turn_cuts: Sequence[int], gap: int) -> list[int]:
    """Ascending turn cuts at least `gap` tokens apart, kept from left to right."""
    kept: list[int] = []
    for cut in turn_cuts:
        if not kept or cut - kept[-1] >= gap:
            kept.append(cut)
    return kept


def cuts_for(reading: Reading, grid: Grid) -> list[int]:
    """Every position in `(start, end]` worth a checkpoint, ascending.

    `end` itself is always one: it is the prompt's end less one, where an exact repeat resumes.
    """
    wanted = {*_off_grid(reading, grid), *grid.cuts(reading.start, reading.end)}
    wanted.update(spaced(_turns(reading, grid), max(1, grid.step // 4)))
    return _ending(reading, wanted)


def cuts_for_pausing(reading: Reading, grid: Grid) -> list[int]:
    """The same where every cut off the slice grid costs a forward: the most valuable few only."""
    on_slices = {cut for cut in grid.cuts(reading.start, reading.end) if cut % grid.step == 0}
    limit = PAUSES_COLD if reading.start == 0 else PAUSES_HOT
    turns = spaced(_turns(reading, grid), max(1, grid.step // 4))
    in_order = [*_off_grid(reading, grid), *grid.cuts(reading.start, reading.end), *reversed(turns)]
    pauses = [cut for cut in dict.fromkeys(in_order) if cut not in on_slices][:limit]
    return _ending(reading, {*on_slices, *pauses})


def cuts_for_exact(reading: Reading, grid: Grid) -> list[int]:
    """Slice boundaries of the grid only: states computed there have the same history in every run."""
    return [cut for cut in grid.cuts(reading.start, reading.end + 1) if cut % grid.step == 0]


def branch_points(reading: Reading, grid: Grid, *, is_inside: bool) -> frozenset[int]:
    """Of the cuts those at which prompts part ways.

    One does so now, where it leaves what is stored, if that `is_inside`. And behind the first turn, which
    is the system prompt where there is one, each conversation says something else.
    """
    found = {reading.branch} if is_inside else set()
    first = next((cut for cut in reading.turn_starts if cut >= grid.first_worth), None)
    return frozenset(found if first is None else {*found, first})


def lasting(cuts: Sequence[int], end: int, lifetimes: Iterable[int]) -> frozenset[int]:
    """Of the ascending cuts in the slice that ends at `end`, those that restore these positions of it."""
    reached = (bisect.bisect_right(cuts, each) for each in lifetimes if each <= end)
    return frozenset(cuts[at - 1] for at in reached if at)


def _off_grid(reading: Reading, grid: Grid) -> list[int]:
    """Cuts that follow from this prompt, the most valuable first."""
    turns = _turns(reading, grid)
    branch = [reading.branch] if reading.branch >= grid.first_worth else []
    length = reading.end - reading.start
    tails = [
        reading.end + 1 - tail for tail in TAILS if tail < grid.step and length >= TAIL_WORTH * tail
    ]
    return _within(
        reading,
        [*branch, *turns[-1:], *reading.boundaries, *tails[:1], *turns[-2:-1], *tails[1:]],
    )


def _turns(reading: Reading, grid: Grid) -> list[int]:
    return [cut for cut in _within(reading, reading.turn_starts) if cut >= grid.first_worth]


def _within(reading: Reading, cuts: Sequence[int]) -> list[int]:
    return [cut for cut in cuts if reading.start < cut < reading.end]


def _ending(reading: Reading, wanted: set[int]) -> list[int]:
    if reading.end > reading.start:
        wanted.add(reading.end)
    return sorted(wanted)


def slice_end(position: int, end: int, step: int, pauses: Iterable[int] = ()) -> int:
    """Where the slice that begins at `position` ends: at a multiple of `step`, a pause, the end."""
    whole = min(position + step - position % step, end)
    return min((cut for cut in pauses if position < cut < whole), default=whole)


def cuts_in(cuts: Sequence[int], a: int, b: int) -> list[int]:
    """The cuts in `(a, b]`, from an ascending list."""
    return list(cuts[bisect.bisect_right(cuts, a) : bisect.bisect_right(cuts, b)])


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
