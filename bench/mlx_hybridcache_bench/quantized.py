"""`bench quantized`: what quantized keys and values weigh, and what they cost a request that is hot.

Beside full precision in bfloat16, in turns, by a random model with heads of 64 or by the one that is named.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from rich.console import Console

from mlx_hybridcache import HybridPromptCache, models
from mlx_hybridcache.cli.flags import tokens
from mlx_hybridcache.demo import BUNDLED_MODEL

from .kit.machine import machine, one_line
from .kit.models import VOCABULARY, wide_qwen3
from .kit.paired import Paired, measure
from .kit.tables import Figure, show_figures, write_json

BYTES = {4: 0.30, 8: 0.55}
"""The most that a stored token may weigh, in parts of what it weighs in bfloat16."""

SLOWER = 1.05
"""The same for the time of a hot request and of a token of its reply."""


@dataclass(frozen=True, slots=True)
class Beside:
    """Quantized rows beside full ones: bytes, and processor time in pairs."""

    bits: int
    bytes_ratio: float
    first: Paired
    following: Paired

    def figures(self) -> list[Figure]:
        """What was promised of each."""
        bits = f"{self.bits} bits"
        return [
            Figure(
                f"{bits}: bytes of a stored token", self.bytes_ratio, "x", BYTES[self.bits], True
            ),
            Figure(
                f"{bits}: hot request to its first token", self.first.cpu_ratio, "x", SLOWER, False
            ),
            Figure(f"{bits}: a token of its reply", self.following.cpu_ratio, "x", SLOWER, False),
        ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench quantized`."""
    parser.add_argument("--model", help="directory, or owner/name (default: random, heads of 64)")
    parser.add_argument("--context", type=tokens(), default=512, help="tokens of the prompt (512)")
    parser.add_argument("--new-tokens", type=tokens(), default=4, help="tokens in a pair (4)")
    parser.add_argument("--pairs", type=tokens(), default=9, help="of each measurement (9)")


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure and print. 1 when a token weighs more than it may."""
    found = machine()
    console.print(one_line(found), highlight=False)
    is_random = args.model == str(BUNDLED_MODEL)
    model = wide_qwen3() if is_random else models.load(args.model)[0]
    prompt = [(7 + 13 * i * i) % VOCABULARY for i in range(args.context)]
    figures = [
        figure
        for bits in BYTES
        for figure in beside(model, prompt, bits, args.new_tokens, args.pairs).figures()
    ]
    show_figures(console, figures)
    write_json(
        args.json,
        {
            "command": "quantized",
            "machine": found,
            "context": args.context,
            "figures": [figure.as_json() for figure in figures],
        },
    )
    return int(any(figure.counted and not figure.kept for figure in figures))


def beside(model: Any, prompt: list[int], bits: int, new_tokens: int, pairs: int) -> Beside:
    """One model with full rows and with rows of `bits` bits from the first token on."""
    with (
        HybridPromptCache(model, memory_budget="4GiB") as full,
        HybridPromptCache(model, memory_budget="4GiB", kv_bits=bits) as quantized,
    ):
        for cache in (full, quantized):
            cache.prefill(prompt, max_tokens=1).release()
        weights = [cache.stats().rows_bytes for cache in (full, quantized)]
        first = measure(
            lambda: _first_token(full, model, prompt),
            lambda: _first_token(quantized, model, prompt),
            pairs=pairs,
        )
        following = _following(model, prompt, (full, quantized), new_tokens, pairs)
    return Beside(bits, weights[1] / weights[0], first, following)


def _first_token(cache: HybridPromptCache, model: Any, prompt: list[int]) -> None:
    ready = cache.prefill(prompt, max_tokens=64)
    _read(model, ready.rest, ready.prompt_cache)
    ready.release()


def _following(
    model: Any,
    prompt: list[int],
    caches: tuple[HybridPromptCache, HybridPromptCache],
    new_tokens: int,
    pairs: int,
) -> Paired:
    ready = [cache.prefill(prompt, max_tokens=(pairs + 2) * new_tokens) for cache in caches]

    def writing(which: int) -> Callable[[], None]:
        def write() -> None:
            for _ in range(new_tokens):
                _read(model, prompt[-1:], ready[which].prompt_cache)

        return write

    measured = measure(writing(0), writing(1), pairs=pairs)
    for each in ready:
        each.release()
    return measured


def _read(model: Any, ids: list[int], caches: list[Any]) -> None:
    mx.eval(model(mx.array([ids]), cache=caches), [cache.state for cache in caches])
