"""What a cache directory costs those who do not need it: the same requests with and without one.

Two caches of one model in one process, one of them with a directory, asked the same new prompts in
turns. What it writes behind a request falls into that request; the next one waits until all is written.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_lm.sample_utils import make_logits_processors
from rich.console import Console

from mlx_hybridcache import HybridPromptCache

from ..kit.tables import Figure, Spread, show
from ..kit.text import prompt_of

OFF, ON = "off", "on"
COLD, AGAIN = "cold", "again"
FLUSH_SECONDS = 300.0
WARM_UP = 1


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. `generated_per_second` counts from the first token on."""

    way: str
    size: int
    step: str
    pair: int
    first_seconds: float
    generated_per_second: float
    tokens: tuple[int, ...]
    restored_tokens: int


@dataclass(frozen=True, slots=True)
class OnAndOff:
    """All requests, in pairs."""

    asked: tuple[Asked, ...]
    unwritten: int

    def figures(self) -> list[Figure]:
        """The promised ones: no promise is made about time."""
        pairs = self._pairs()
        differ = sum(on.tokens != off.tokens for off, on in pairs)
        less = sum(on.restored_tokens != off.restored_tokens for off, on in pairs)
        return [
            Figure("replies that differ with a directory", differ, f"of {len(pairs)}", 0, True),
            Figure("requests that restore another position", less, f"of {len(pairs)}", 0, True),
            Figure("times that not all was written", self.unwritten, "", 0, True),
        ]

    def _pairs(self) -> list[tuple[Asked, Asked]]:
        off = {(each.size, each.step, each.pair): each for each in self.asked if each.way == OFF}
        return [
            (off[each.size, each.step, each.pair], each) for each in self.asked if each.way == ON
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the replies."""
        requests = []
        for each in self.asked:
            request = asdict(each)
            del request["tokens"]
            requests.append(request)
        return {"requests": requests, "unwritten": self.unwritten}

    def show(self, console: Console) -> None:
        """Print it."""
        rows = []
        for size, step in dict.fromkeys((each.size, each.step) for each in self.asked):
            pairs = [pair for pair in self._pairs() if (pair[0].size, pair[0].step) == (size, step)]
            first = [(off.first_seconds, on.first_seconds) for off, on in pairs]
            rate = [(off.generated_per_second, on.generated_per_second) for off, on in pairs]
            rows.append((f"TTFT ms, {size:,} tokens, {step}", *_cells(first, 1000)))
            rows.append((f"tokens/s, after {size:,} tokens, {step}", *_cells(rate, 1)))
        show(
            console,
            f"With a cache directory and without, {len(pairs)} pairs",
            ("", "off", "on", "on / off"),
            rows,
        )


def _cells(pairs: Sequence[tuple[float, float]], scale: float) -> tuple[str, str, str]:
    off, on = (Spread.of([pair[which] for pair in pairs]) for which in (0, 1))
    ratio = Spread.of([on / off for off, on in pairs])
    return off.text(".0f", scale), on.text(".0f", scale), ratio.text(".3f")


def measure_on_and_off(
    model: Any, tokenizer: Any, sizes: Sequence[int], *, reply_tokens: int, pairs: int
) -> OnAndOff:
    """Each size cold and again, `pairs` times after one unmeasured pair, in turns."""
    asked: list[Asked] = []
    unwritten = 0
    with (
        tempfile.TemporaryDirectory() as directory,
        HybridPromptCache(model, tokenizer, memory_budget="8GiB") as off,
        HybridPromptCache(model, tokenizer, memory_budget="8GiB", cache_dir=directory) as on,
    ):
        ways = [(OFF, off), (ON, on)]
        for pair in range(-WARM_UP, pairs):
            for size in sizes:
                prompt = _prompt(tokenizer, size, f"{pair + WARM_UP} of {size}")
                for step in (COLD, AGAIN):
                    for way, cache in ways if pair % 2 == 0 else reversed(ways):
                        found = _ask(cache, way, step, pair, prompt, reply_tokens)
                        unwritten += not cache.flush(FLUSH_SECONDS)
                        if pair >= 0:
                            asked.append(found)
    return OnAndOff(tuple(asked), unwritten)


def _prompt(tokenizer: Any, size: int, nonce_text: str) -> list[int]:
    """Text that no other prompt begins with."""
    nonce = tokenizer.encode(f"{nonce_text}. ", add_special_tokens=False)
    return [int(token) for token in nonce] + prompt_of(tokenizer, size - len(nonce))


def _ask(
    cache: HybridPromptCache, way: str, step: str, pair: int, prompt: list[int], reply_tokens: int
) -> Asked:
    ends = dict.fromkeys(cache.engine.tokenizer.eos_token_ids, -100.0)
    processors = make_logits_processors(ends)
    tokens: list[int] = []
    began = time.perf_counter()
    first = began
    made = cache.stream_generate(prompt, max_tokens=reply_tokens, logits_processors=processors)
    for response in made:
        tokens.append(response.token)
        if len(tokens) == 1:
            first = time.perf_counter()
    seconds = time.perf_counter() - first
    report = made.report
    assert report is not None
    return Asked(
        way=way,
        size=len(prompt),
        step=step,
        pair=pair,
        first_seconds=first - began,
        generated_per_second=(len(tokens) - 1) / seconds if len(tokens) > 1 else 0.0,
        tokens=tuple(tokens),
        restored_tokens=report.restored_tokens,
    )
