"""What computes drafts holds caches of its own, which go where a request needs their room."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from ..worker.turns import Pause


class Holder(Protocol):
    """A drafter of one reply that holds caches."""

    def give_up(self) -> None:
        """No more drafts: what it holds goes, now or with its next turn."""
        ...


@dataclass(eq=False)
class AtWork:
    """`running` are the drafters that hold caches. While it `is_busy` one of them is at work."""

    running: list[Holder] = field(default_factory=list, init=False)
    is_busy: bool = field(default=False, init=False)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While one of its drafters is: what it holds is not let go of for its own needs."""
        was_busy, self.is_busy = self.is_busy, True
        try:
            yield
        finally:
            self.is_busy = was_busy

    def turns(
        self, steps: Generator[Pause, None, None], is_over: Callable[[], bool]
    ) -> Iterator[Pause]:
        """Those of `steps`, at work in each, until nobody wants them any more."""
        with closing(steps):
            while (pause := self._next(steps, is_over)) is not None:
                yield pause

    def _next(
        self, steps: Generator[Pause, None, None], is_over: Callable[[], bool]
    ) -> Pause | None:
        with self.at_work():
            return None if is_over() else next(steps, None)

    def let_go(self) -> None:
        """What its drafters hold goes, because a request needs it: then they draft no more."""
        if not self.is_busy:
            for each in [*self.running]:
                each.give_up()
