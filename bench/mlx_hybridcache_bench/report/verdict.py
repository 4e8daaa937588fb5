"""One sentence: who is faster to the first token, where, from what time to what, and where it is equal.

A time that contradicts a count is no verdict. A server that restored as much is not "slower" because the
machine was busy, and one that restored nothing owes no speed to a cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median

from ..kit.tables import Spread, size_text
from ..serving.servers import OURS
from .results import Measured, Results
from .sheet import seconds_text, sizes_in
from .summary import hot_steps

LEAST = 1.25
"""Times faster, or it is equal."""

SHARE = 0.05
"""Of the prompt, by which restored tokens must differ to be more or less."""

FASTER, EQUAL, SLOWER, UNDECIDED = "faster", "equal", "slower", "undecided"


@dataclass(frozen=True, slots=True)
class Side:
    """What one server made of the hot requests of a scenario; tokens are medians, None when not told."""

    times: Spread
    restored: float | None
    prompt: float | None


@dataclass(frozen=True, slots=True)
class Duel:
    """One scenario on two servers, from the first one's view."""

    name: str
    mine: Side
    theirs: Side

    @property
    def ratio(self) -> float:
        """How many times faster the first is."""
        return self.theirs.times.median / self.mine.times.median

    @property
    def outcome(self) -> str:
        """By the times, unless the spreads meet; undecided where the counts say the opposite."""
        mine, theirs = self.mine.times, self.theirs.times
        ratio = self.ratio
        if (mine.low <= theirs.high and theirs.low <= mine.high) or 1 / LEAST < ratio < LEAST:
            return EQUAL
        winner, loser = (self.mine, self.theirs) if ratio > 1 else (self.theirs, self.mine)
        if _contradicted(winner, loser):
            return UNDECIDED
        return FASTER if ratio > 1 else SLOWER


def _contradicted(winner: Side, loser: Side) -> bool:
    """Whether the one that was faster restored nothing, or less than the other."""
    if winner.restored is None:
        return False
    least = SHARE * (winner.prompt or 0.0)
    if winner.restored <= least:
        return True
    return loser.restored is not None and loser.restored > winner.restored + least


def duels(mine: Measured, theirs: Measured) -> Iterator[Duel]:
    """Each scenario and size that both were measured in."""
    sizes = sizes_in(mine.requests)
    for name in dict.fromkeys(each.scenario for each in mine.requests):
        for size in sizes_in([each for each in mine.requests if each.scenario == name]):
            a, b = (_side(server, name, size) for server in (mine, theirs))
            if a and b:
                yield Duel(name if len(sizes) == 1 else f"{name} at {size_text(size)}", a, b)


def verdicts(results: Results) -> list[str]:
    """A sentence for each server beside ours; beside the first where ours was not measured."""
    servers = [each for each in results.servers if each.requests]
    mine = next((each for each in servers if each.name == OURS), servers[0] if servers else None)
    if mine is None:
        return []
    fought = {each.name: list(duels(mine, each)) for each in servers if each is not mine}
    return [_sentence(mine.name, theirs, found) for theirs, found in fought.items() if found]


def _sentence(mine: str, theirs: str, fought: list[Duel]) -> str:
    by = {
        outcome: [each for each in fought if each.outcome == outcome]
        for outcome in (FASTER, EQUAL, SLOWER, UNDECIDED)
    }
    among = f"of {len(fought)} scenarios"
    said = []
    if won := by[FASTER]:
        said.append(
            f"{mine} is {_times([each.ratio for each in won])} faster to the first token than "
            f"{theirs} in {len(won)} {among} ({_shown(won)})"
        )
    else:
        said.append(f"{mine} is faster to the first token than {theirs} in none {among}")
    if lost := by[SLOWER]:
        said.append(
            f"{_times([1 / each.ratio for each in lost])} slower in {len(lost)} ({_shown(lost)})"
        )
    if by[EQUAL]:
        said.append(f"equal in {_names(by[EQUAL])}")
    if by[UNDECIDED]:
        said.append(
            f"undecided in {_names(by[UNDECIDED])}, where times and restored tokens contradict "
            "each other"
        )
    return "; ".join(said) + "."


def _shown(found: list[Duel]) -> str:
    """The widest and the narrowest, in absolute times."""
    ordered = sorted(found, key=lambda each: abs(each.ratio - 1), reverse=True)
    chosen = dict.fromkeys((ordered[0], ordered[-1]))
    return ", ".join(
        f"{each.name}: {_median(each.mine)} instead of {_median(each.theirs)}" for each in chosen
    )


def _median(side: Side) -> str:
    at = side.times.median
    return seconds_text(Spread(at, at, at))


def _times(ratios: list[float]) -> str:
    low, high = (
        f"{each:.1f}" if each < 10 else f"{each:.0f}" for each in (min(ratios), max(ratios))
    )
    return f"{low} times" if low == high else f"{low} to {high} times"


def _names(found: list[Duel]) -> str:
    return ", ".join(each.name for each in found)


def _side(server: Measured, name: str, size: int) -> Side | None:
    hot = [
        each
        for each in server.requests
        if (each.scenario, each.size) == (name, size) and each.step in hot_steps(name)
    ]
    runs: dict[int, list[float]] = {}
    for each in hot:
        if each.ttft_seconds is not None:
            runs.setdefault(each.run, []).append(each.ttft_seconds)
    if not runs:
        return None
    # Steps differ among themselves; runs of the same steps should not.
    times = Spread.of([median(each) for each in runs.values()])
    return Side(
        times,
        _median_of(each.cached_tokens for each in hot),
        _median_of(each.prompt_tokens for each in hot),
    )


def _median_of(counts: Iterable[int | None]) -> float | None:
    known = [each for each in counts if each is not None]
    return median(known) if known else None
