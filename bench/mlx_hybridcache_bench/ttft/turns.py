"""All servers of a run in turns, request by request: a minute in which the machine is busy is everybody's.

They run at the same time, and one is asked while the others wait; where memory does not hold the
weights of all, each has the machine to itself, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack

import psutil

from .contenders import Contender
from .measure import Measurement
from .pace import Pace

Portions = Generator[None, None, None]

ROOM = 1.5
"""Of a model's weights: what a server takes beside them while it reads a long prompt."""


def fit_together(contenders: Sequence[Contender]) -> bool:
    """Whether memory holds all that are started here at once. Where weights are not told, it does."""
    weights = [int(each.model.get("bytes") or 0) for each in contenders if each.launch]
    return ROOM * sum(weights) <= psutil.virtual_memory().available


def measure_in_turns(
    measurements: Sequence[Measurement],
    pace: Pace,
    *,
    together: bool,
    promised: Callable[[float], object],
    written: Callable[[], object],
) -> None:
    """Measure all. `promised` is told the expected seconds when it is known, `written` that there is more.

    Raises `KeyboardInterrupt` with everything stopped.
    """
    with ExitStack() as stack:
        portions = {each: each.portions() for each in measurements}
        for more in portions.values():
            stack.callback(more.close)
        if not together:
            _one_after_the_other(portions, pace, promised, written)
            return
        waiting = [each for each in measurements if _has_more(portions[each])]
        seconds = sum(each.expected_seconds() for each in waiting)
        if waiting:
            pace.promise(seconds)
            promised(seconds)
        turn = 0
        while waiting:
            # a b, then b a: neither always comes behind the other's work.
            for each in waiting if turn % 2 == 0 else waiting[::-1]:
                if not _has_more(portions[each]):
                    waiting = [other for other in waiting if other is not each]
                written()
            turn += 1


def _one_after_the_other(
    portions: dict[Measurement, Portions],
    pace: Pace,
    promised: Callable[[float], object],
    written: Callable[[], object],
) -> None:
    for number, (each, more) in enumerate(portions.items()):
        if _has_more(more) and number == 0:
            # The others are not warm yet; as slow as the first one they may be.
            promised(each.expected_seconds() * len(portions))
        while _has_more(more):
            written()
        written()


def _has_more(portions: Portions) -> bool:
    try:
        next(portions)
    except StopIteration:
        return False
    return True
