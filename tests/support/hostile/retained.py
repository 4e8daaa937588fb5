"""Rounds of linear conversations, whose turns go on in the buffers of the turns before, among all that is hostile."""

from __future__ import annotations

import oracle

from hostile import rounds as hostile
from hostile.families import FAMILIES

WITH_ROWS = [name for name in FAMILIES if name not in {"mamba", "mamba2", "rwkv7", "deepseek_v41"}]
"""Families whose layers keep a row a token, which alone are retained."""

TURNS = (8, 10, 12)
"""Requests of a round."""


class RetainedRound(hostile.Round):
    """Mostly one request after another, each the next turn of the last one's conversation, or the same again."""

    def __init__(self, name: str, seed: int):
        super().__init__(name, seed)
        self.to_come = self.chance.choice(TURNS)

    def event(self) -> None:
        if not self.readers or self.chance.random() < 0.1:
            super().event()

    def question(self) -> tuple[list[int], str]:
        how = self.chance.random()
        if not self.asked or how < 0.2:
            return super().question()
        last = self.asked[-1] if how < 0.8 else self.chance.choice(self.asked)
        if self.chance.random() < 0.3:
            return last.tokens, last.salt
        kept = last.history
        if self.chance.random() < 0.2:
            kept = kept[: -self.chance.randint(1, 4)]
        fresh = oracle.prompt(self.chance.choice((1, 5, 9)), seed=self.chance.randint(0, 3))
        whole = [*kept, *fresh]
        return (whole, last.salt) if len(whole) <= hostile.LONGEST else super().question()
