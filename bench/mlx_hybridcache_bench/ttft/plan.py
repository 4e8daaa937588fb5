"""What a run of the bench asks, in tokens and times; and how much of it there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..serving.crowd import IDENTICAL, MIXED, SHORT_BEHIND_LONG, Sizes
from ..serving.mixture import CLIENTS
from ..serving.mixture import ROOM as MIXED_ROOM
from ..serving.scenarios import AT_EVERY_SIZE, RESTART, SCENARIOS, steps_of

USUAL = (
    *("repeat", "chat", "changed-ending", "system-prompt", "volatile-line", "tool-loop"),
    *("branch-and-back", "completions", RESTART, IDENTICAL, SHORT_BEHIND_LONG),
)
"""What is measured unless `--scenarios` chooses: what servers differ in most."""

SITUATIONS = (IDENTICAL, SHORT_BEHIND_LONG, MIXED)
NAMES = (*SCENARIOS, RESTART, *SITUATIONS)

SPARE_TOKENS = 4_000
"""Text beyond the largest prompt, so that conversations can start at different places."""

MIXED_TOKENS = 1_000
"""At most so long are the prompts that mixed clients begin with."""

MIXED_REQUESTS = 8
"""Of each mixed client."""

LONG_TOKENS = 4_500
"""At least so long is the prompt that a short question comes behind: two slices and more."""

ROOM = 1.25
"""Prompts may have more tokens than their text: templates, tools, replies, another tokenizer."""


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """Sizes in tokens; how often; what; how many clients at once; patience with one request."""

    sizes: tuple[int, ...]
    repeats: int
    names: tuple[str, ...]
    clients: int
    timeout_seconds: float
    start_seconds: float
    warm_up_tokens: int
    cold_checks: bool
    mixed_requests: int = MIXED_REQUESTS

    @property
    def scripts(self) -> list[str]:
        """The scenarios that lead one client through requests in a row."""
        return [name for name in self.names if name in SCENARIOS]

    @property
    def situations(self) -> list[str]:
        """Those of several clients at once."""
        return [name for name in self.names if name in SITUATIONS]

    @property
    def restarts(self) -> bool:
        """Whether servers are stopped and started in between."""
        return RESTART in self.names

    @property
    def text_tokens(self) -> int:
        """As much text as the prompts are cut from."""
        mixed = MIXED_ROOM * self.crowd.mixed if MIXED in self.names else 0
        return max(*self.sizes, self.long, mixed) + SPARE_TOKENS

    @property
    def long(self) -> int:
        """Tokens of the prompt that a short question comes behind."""
        return max(self.sizes[0], LONG_TOKENS)

    @property
    def crowd(self) -> Sizes:
        """What several clients ask at once."""
        mixed = min(self.sizes[0] // 4, MIXED_TOKENS)
        return Sizes(self.sizes[0], self.long, mixed, self.mixed_requests, self.clients)

    @property
    def context_tokens(self) -> int:
        """Room that a server needs for all that is in it at one time."""
        together = self.clients * self.sizes[0] if IDENTICAL in self.names else 0
        return int(ROOM * max(*self.sizes, together, 2 * self.long)) + SPARE_TOKENS

    def work(self, *, process: bool) -> int:
        """The tokens of all prompts that one server is sent, roughly: what a progress bar counts."""
        first = self.sizes[0]
        tokens = sum(
            size * len(steps_of(name))
            for name in self.scripts
            for size in (self.sizes if name in AT_EVERY_SIZE else (first,))
        )
        tokens += sum(self.situation_tokens(name) for name in self.situations)
        tokens *= self.repeats
        if process and self.restarts:
            tokens += 2 * first * self.repeats
        if process and self.cold_checks:
            tokens += first * len(self.scripts)
        return tokens

    def requests(self, *, process: bool) -> int:
        """How many requests one server is sent, roughly."""
        steps = sum(
            len(steps_of(name)) * (len(self.sizes) if name in AT_EVERY_SIZE else 1)
            for name in self.scripts
        )
        steps += sum(1 + self.clients for _ in self.situations)
        return self.repeats * (steps + 2 * (process and self.restarts)) + len(self.scripts)

    def situation_tokens(self, name: str) -> int:
        """Of all prompts that a situation sends, but for short ones."""
        crowd = self.crowd
        if name == MIXED:
            return len(CLIENTS) * crowd.requests * crowd.mixed
        return (1 + self.clients) * self.sizes[0] if name == IDENTICAL else self.long


def sizes_of(given: Sequence[str]) -> tuple[int, ...]:
    """`12000`, `12K` and `12k` are one size. Raises `ValueError`."""
    found = (float(each[:-1]) * 1000 if each[-1:] in ("k", "K") else float(each) for each in given)
    return tuple(sorted({int(each) for each in found}))
