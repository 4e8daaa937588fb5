"""What a reply is made of while it is written: pieces, log-probabilities, progress, and counts."""

from __future__ import annotations

from dataclasses import dataclass

from ..calls.parts import Part


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """So many of the prompt's tokens are read."""

    read: int
    total: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log-probability and the most likely ones in its place, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token brought. `finish` is None until the last, `stop` the stop text that ended it, if one did."""

    token: int
    parts: tuple[Part, ...]
    is_reasoning: bool
    logprob: TokenLogprob | None
    finish: str | None
    stop: str | None = None


@dataclass(slots=True)
class Count:
    """Tokens of one choice."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
