"""Exact mode's replies, hot against cold: whatever was read before, in turns, side by side, across a restart."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hybridcache import HybridPromptCache

from .proofs import Found, control, stored_as, text_tokens

STEPS = (64, 128)
REPLY_TOKENS = 12

Logits = np.ndarray[Any, np.dtype[np.float32]]
Scenario = Callable[
    [Callable[..., HybridPromptCache], list[int]], Iterator[tuple[list[int], Logits]]
]
"""Given what makes a cache and some text, prompts with the log-probabilities of their replies, hot."""


def replies(how: str) -> Found:
    """Every scenario with every step: how many log-probabilities differ from those of an empty cache."""
    model, tokenizer = stored_as(how)
    ids = text_tokens(tokenizer, 1_200)
    if not control(model, ids).get("steady"):
        yield how, {"skipped": "plain mlx-lm gives no steady logits here: see bundled"}
        return
    for step in STEPS:

        def made(step: int = step, **settings: Any) -> HybridPromptCache:
            return HybridPromptCache(
                model,
                tokenizer,
                exact=True,
                prefill_step_size=step,
                checkpoint_every=step,
                **settings,
            )

        for name, scenario in SCENARIOS.items():
            compared, differing, count = 0, 0, 0
            for prompt, found in scenario(made, ids):
                with made() as empty:
                    cold = reply(empty, prompt)
                same_length = found.shape == cold.shape
                differing += int((found != cold).sum()) if same_length else found.size
                compared += found.size
                count += 1
            yield (
                f"{how}, slices of {step}, {name}",
                {
                    "replies": count,
                    "compared": compared,
                    "differing": differing,
                    "holds": compared > 0 and differing == 0,
                },
            )


def reply(cache: HybridPromptCache, prompt: list[int], *, tokens: int = REPLY_TOKENS) -> Logits:
    """Log-probabilities `(tokens, vocabulary)` of a greedy reply."""
    return np.stack([_row(piece) for piece in cache.stream_generate(prompt, max_tokens=tokens)])


def hot(cache: HybridPromptCache, prompt: list[int]) -> Logits:
    """The same where something must be restored first."""
    found = reply(cache, prompt)
    assert cache.last_report is not None
    assert cache.last_report.restored_tokens > 0
    return found


def _row(piece: Any) -> Logits:
    return np.array(piece.logprobs.astype(mx.float32))


def _in_other_slices(made: Callable[..., HybridPromptCache], ids: list[int]) -> Any:
    with made() as cache:
        reply(cache, ids[:500])
        for prompt in (ids[:500], ids[:437], ids[:400] + ids[700:760], ids[:620]):
            yield prompt, hot(cache, prompt)


def _in_turns(made: Callable[..., HybridPromptCache], ids: list[int]) -> Any:
    with made() as cache:
        prompt = ids[:300]
        for turn in range(3):
            pieces = list(cache.stream_generate(prompt, max_tokens=40))
            prompt = [*prompt, *(piece.token for piece in pieces), *ids[600 + 70 * turn :][:70]]
            yield prompt, hot(cache, prompt)


def _side_by_side(made: Callable[..., HybridPromptCache], ids: list[int]) -> Any:
    prompts = [ids[:300] + ids[600 + 50 * k :][: 90 + 37 * k] for k in range(4)]
    with made() as cache:
        running = [cache.stream_generate(each, max_tokens=REPLY_TOKENS) for each in prompts]
        rows: list[list[Logits]] = [[] for _ in prompts]
        for pieces in zip_longest(*running):
            for row, piece in zip(rows, pieces, strict=True):
                if piece is not None:
                    row.append(_row(piece))
    for prompt, row in zip(prompts, rows, strict=True):
        yield prompt, np.stack(row)


def _after_a_restart(made: Callable[..., HybridPromptCache], ids: list[int]) -> Any:
    with tempfile.TemporaryDirectory(prefix="on-a-gpu-") as folder:
        with made(cache_dir=folder) as before:
            reply(before, ids[:500])
        with made(cache_dir=folder) as cache:
            for prompt in (ids[:500], ids[:400] + ids[700:760]):
                yield prompt, hot(cache, prompt)


SCENARIOS: dict[str, Scenario] = {
    "read before in other lengths": _in_other_slices,
    "turn behind turn": _in_turns,
    "four side by side": _side_by_side,
    "after a restart": _after_a_restart,
}
