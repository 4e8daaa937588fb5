"""How many tokens to draft: as many as pay for themselves, by how often drafts were right so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

WORTH = 0.3
"""A token is drafted while it is right, with all before it, at least so often."""

MEMORY = 0.7
"""What the estimate keeps of itself with each forward."""

FIRST_REST, LONGEST_REST = 8, 128
"""Tokens that are decoded plainly once drafts do not pay, at first, and when they still do not."""


@dataclass(slots=True)
class Pace:
    """Follows `rate`, the running estimate of how often a drafted token is right.

    Where not even one token is worth it nothing is drafted for a while, which doubles each time.
    """

    most: int
    rate: float = 0.8
    _resting: int = 0
    _rest: int = FIRST_REST

    def width(self) -> int:
        """How many tokens to draft for the next forward."""
        if self._resting:
            self._resting -= 1
            return 0
        if self.rate >= 1:
            return self.most
        fitting = math.log(WORTH) / math.log(max(self.rate, WORTH))
        return max(1, min(self.most, int(fitting)))

    def note(self, drafted: int, accepted: int) -> None:
        """How the last forward went."""
        seen = accepted / min(drafted, accepted + 1)  # nobody knows of what follows a wrong one
        self.rate = MEMORY * self.rate + (1 - MEMORY) * seen
        if accepted:
            self._rest = FIRST_REST
        elif self.rate < WORTH:
            self._resting, self._rest = self._rest, min(2 * self._rest, LONGEST_REST)
            self.rate = WORTH
