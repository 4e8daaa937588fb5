"""What a drafter is: anything that has an idea how a text goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .pace import Pace


@runtime_checkable
class Foreseeing(Protocol):
    """A logits processor that can say beforehand what it would let through."""

    def may_follow(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, one behind the other, may follow the last one that it was shown."""
        ...


class Drafter(Protocol):
    """Drafts for one reply. What it says is verified, so it may be wrong, and costs time only."""

    def propose(self, history: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `history`: the prompt, and the reply so far.

        It is the same list each time, and has grown: nothing that was shown once is taken back. What was
        proposed and is not in it was wrong, or nobody looked.
        """
        ...

    def accepted(self, drafted: int, accepted: int) -> None:
        """Of the `drafted` tokens that were proposed last the first `accepted` were right."""
        ...

    def end(self, history: Sequence[int] | None) -> None:
        """No more drafts: what it holds goes. `history` is all that was written, None where it is of no use."""
        ...


@dataclass(frozen=True, slots=True)
class Paced:
    """A drafter with the pace of its own drafts. Some look for them in what is stored."""

    drafter: Drafter
    pace: Pace
    from_stored: bool = False
