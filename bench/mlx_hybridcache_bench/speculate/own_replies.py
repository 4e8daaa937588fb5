"""`bench speculate`, its second part: a model's own replies, drafted by a smaller one or by the model's own head.

The requests are calls of functions, as agents make them; both arms read the same prompts, greedy, and nothing of
one is stored for the other. Once they are asked for a second time, when all of the prompt is restored.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.demo.functions import FUNCTIONS, values
from mlx_hybridcache.report import CacheReport

from ..kit.tables import Figure, show

BUNDLED_DRAFT = Path(__file__).parent / "draft"
"""A draft of the bundled model, under 1 MB: `tools/bundled_model/distil.py` of the sources made it."""

PROMPTS = 24
DECLARED = 3
"""Functions that each prompt declares."""

LONGEST = 200
"""Tokens of a reply, which mostly ends by itself."""

FORWARDS = {"a draft model": 1 / 1.5, "its head": 1.0}
"""Of the model's forwards without drafts, at most. A head is the model's own: how often it is right is its makers' matter."""


@dataclass(frozen=True, slots=True)
class OwnReplies:
    """What the same replies took: all counts are sums, and seconds of the CPU those of one round.

    `drafted_again` and `accepted_again` are of replies to prompts that were restored.
    """

    tokens: int
    forwards: int
    drafted: int
    accepted: int
    draft_forwards: int
    drafted_again: int
    accepted_again: int
    same: bool
    plain_seconds: list[float]
    seconds: list[float]

    @property
    def forwards_per_token(self) -> float:
        """The model's; without drafts it is one, and one more for each prompt."""
        return self.forwards / self.tokens

    @property
    def ratio(self) -> float:
        """Of the seconds with drafts to those without, the median of all rounds."""
        pairs = zip(self.seconds, self.plain_seconds, strict=True)
        return statistics.median(one / other for one, other in pairs)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        own = {"forwards_per_token": self.forwards_per_token, "ratio": self.ratio}
        return {**asdict(self), **own}


def prompts(tokenizer: Any, seed: int) -> list[list[int]]:
    """Questions whose answers are calls, the same for the same seed."""
    generator = random.Random(f"drafted {seed}")
    found = []
    for _ in range(PROMPTS):
        declared = generator.sample(FUNCTIONS, DECLARED)
        wanted = generator.choice(declared)
        asked = generator.choice(wanted.requests).format(**values(wanted.arguments, generator))
        found.append(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": asked}],
                tools=[each.declaration() for each in declared],
                add_generation_prompt=True,
            )
        )
    return found


def measure(
    model: Any, tokenizer: Any, drafts_by: Mapping[str, Any], *, most: int, rounds: int, seed: int
) -> OwnReplies:
    """Both arms in turns, each round in a salt of its own; the first is the warm-up. `drafts_by` is an option."""
    asked = prompts(tokenizer, seed)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    said: dict[bool, list[list[int]]] = {}
    reports: list[CacheReport] = []
    with HybridPromptCache(model, tokenizer, memory_budget="4GiB") as cache:
        for at in range(rounds + 1):
            for drafts in (False, True):
                options = {**drafts_by, "num_draft_tokens": most} if drafts else {}
                spent, said[drafts], reports = _round(cache, asked, f"{drafts} {at}", options)
                seconds[drafts].append(spent)
        _, told, again = _round(cache, asked, f"True {rounds}", options)
    return OwnReplies(
        tokens=sum(map(len, said[True])),
        forwards=sum(each.reply_forwards for each in reports),
        drafted=sum(each.drafted_tokens for each in reports),
        accepted=sum(each.accepted_tokens for each in reports),
        draft_forwards=sum(each.draft_forwards for each in reports),
        drafted_again=sum(each.drafted_tokens for each in again),
        accepted_again=sum(each.accepted_tokens for each in again),
        same=said[True] == said[False] == told,
        plain_seconds=seconds[False][1:],
        seconds=seconds[True][1:],
    )


def _round(
    cache: HybridPromptCache, asked: list[list[int]], salt: str, options: dict[str, Any]
) -> tuple[float, list[list[int]], list[CacheReport]]:
    began, said, reports = time.process_time(), [], []
    for prompt in asked:
        reply = cache.stream_generate(prompt, LONGEST, cache_salt=salt, **options)
        said.append([response.token for response in reply])
        assert reply.report is not None
        reports.append(reply.report)
    return time.process_time() - began, said, reports


def figures(own: OwnReplies, by: str) -> Iterator[Figure]:
    """What is promised of them."""
    name = f"forwards for a token: its own replies, by {by}"
    yield Figure(name, own.forwards_per_token, "", FORWARDS[by], True)
    yield Figure(f"replies that {by} changes", int(not own.same), "", 0, True)


def show_own(console: Console, own: OwnReplies, by: str) -> None:
    """A table of one line."""
    heads = (
        "tokens",
        "forwards",
        "drafted",
        "right",
        f"of {by}",
        "restored: drafted",
        "right",
        "x the tokens/s",
        "same",
    )
    row = (
        f"{own.tokens:,}",
        f"{own.forwards:,}",
        f"{own.drafted:,}",
        f"{own.accepted:,}",
        f"{own.draft_forwards:,}",
        f"{own.drafted_again:,}",
        f"{own.accepted_again:,}",
        f"{1 / own.ratio:.2f}",
        "yes" if own.same else "NO",
    )
    show(console, f"Its own replies, by {by}", heads, [row])
