"""What is told of one prompt or two: what changed, where, what it costs, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from mlx_hybridcache import CacheReport

from .comparison import Cause, Comparison

BEST_CASE, STORE = "best_case", "store"
"""Where checkpoints are taken to lie: wherever prompts part, or where the server has some."""

ASSUMED = {
    BEST_CASE: "A checkpoint is taken to lie where the prompts part, which is the best case: the first one "
    "was not compared with what a server has stored.",
    STORE: "Checkpoints lie where the server's cache has them now.",
}

MOST_ALSO = 8


@dataclass(frozen=True, slots=True)
class Cost:
    """Tokens of a prompt: what of it is restored, and what of the rest was read before.

    `read_tokens` are all that are not restored; `again_tokens` of them were read for the first prompt
    too, and `new_tokens` are behind that.
    """

    prompt_tokens: int
    common_tokens: int
    restored_tokens: int
    read_tokens: int
    again_tokens: int
    new_tokens: int

    @classmethod
    def of(cls, prompt: int, common: int, restored: int, known: int) -> Cost:
        """Of a prompt of which `known` tokens are not new. The last one is always read."""
        restored = min(restored, prompt - 1)
        again = max(0, known - restored)
        read = prompt - restored
        return cls(prompt, common, restored, read, again, read - again)


def speed(reports: Iterable[CacheReport]) -> float | None:
    """Prompt tokens a second, over all of them; None where nothing was measured."""
    read = [
        (each.replayed_tokens, each.prefill_seconds) for each in reports if each.prefill_seconds
    ]
    tokens, seconds = (sum(each) for each in zip(*read, strict=True)) if read else (0, 0.0)
    return tokens / seconds if tokens else None


def of_two(
    compared: Comparison,
    model: str,
    restored: int | None = None,
    tokens_per_second: float | None = None,
) -> dict[str, Any]:
    """The second of two prompts, of which a server would restore so many tokens; None in the best case."""
    at = compared.common if restored is None else restored
    cost = Cost.of(len(compared.second), compared.common, at, compared.carried)
    return {
        **_told(compared.cause, model, cost, tokens_per_second),
        "first_tokens": len(compared.first),
        "checkpoints": BEST_CASE if restored is None else STORE,
        "assumed": ASSUMED[BEST_CASE if restored is None else STORE],
        "text": compared.text,
    }


def of_one(
    cause: Cause | None,
    model: str,
    report: CacheReport,
    text: dict[str, str | None],
    tokens_per_second: float | None,
) -> dict[str, Any]:
    """A prompt and what is stored that it has most in common with. No `cause` where that is nothing."""
    common = report.matched_tokens
    cost = Cost.of(report.prompt_tokens, common, report.restored_tokens, common)
    return {
        **_told(cause, model, cost, tokens_per_second),
        "first_tokens": None,
        "checkpoints": STORE,
        "assumed": ASSUMED[STORE],
        "text": text,
        "reason": report.reason.value,
        "tier": report.tier,
    }


def _told(
    cause: Cause | None, model: str, cost: Cost, tokens_per_second: float | None
) -> dict[str, Any]:
    kind = cause.kind if cause else None
    where = cause.where if cause else None
    return {
        "object": "cache.explanation",
        "model": model,
        "change": kind,
        "is_hot": kind is not None and kind.is_hot,
        "sentence": kind.sentence if kind else "Nothing is stored that begins like this prompt.",
        "advice": kind.advice
        if kind
        else "Nothing: its first request reads all of it, and the next one finds it.",
        "where": where and str(where),
        "also": [
            {"change": each.kind, "where": str(each.where)}
            for each in (cause.also if cause else ())[:MOST_ALSO]
        ],
        **asdict(cost),
        "tokens_per_second": tokens_per_second and round(tokens_per_second, 1),
        "read_seconds": tokens_per_second and round(cost.read_tokens / tokens_per_second, 3),
        "again_seconds": tokens_per_second and round(cost.again_tokens / tokens_per_second, 3),
        "reason": None,
        "tier": None,
    }
