"""`bench quantized`: what quantized keys and values weigh, and what they cost a request that is hot.

Beside full precision in bfloat16, and beside mlx-lm's own quantized cache, which has the same kernels: what is
slower than full precision there too is theirs, the rest would be ours. In turns, by a random model with heads of
64 or by the one that is named.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import mlx.core as mx
from rich.console import Console

from mlx_hybridcache import HybridPromptCache, models
from mlx_hybridcache.caches.layout import Layout
from mlx_hybridcache.caches.quantizing.precision import Precision
from mlx_hybridcache.cli.flags import tokens
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.verify import Reader

from .kit.machine import machine, one_line
from .kit.models import VOCABULARY, wide_qwen3
from .kit.paired import Paired, measure
from .kit.tables import Figure, show_figures, write_json

BYTES = {4: 0.30, 8: 0.55}
"""The most that a stored token may weigh, in parts of what it weighs in bfloat16."""

SLOWER = 1.05
"""The same for the time of a hot request and of a token of its reply."""


@dataclass(frozen=True, slots=True)
class Times:
    """A hot request to its first token, and following tokens of its reply, beside a reference: in pairs."""

    first: Paired
    following: Paired

    def figures(self, bits: int, reference: str) -> list[Figure]:
        """Processor time, in parts of the reference's."""
        named = (("hot request", self.first), ("a token", self.following))
        return [
            Figure(f"{bits} bits / {reference}: {name}", each.cpu_ratio, "x", SLOWER, False)
            for name, each in named
        ]


@dataclass(frozen=True, slots=True)
class Beside:
    """Quantized rows beside full ones and beside mlx-lm's quantized ones. `theirs`: those two, a token."""

    bits: int
    bytes_ratio: float
    full: Times
    own: Times
    theirs: Paired

    def figures(self) -> list[Figure]:
        """What was promised of each."""
        bits, most = self.bits, BYTES[self.bits]
        weight = Figure(f"{bits} bits: bytes of a stored token", self.bytes_ratio, "x", most, True)
        return [
            weight,
            *self.own.figures(bits, "mlx-lm's own"),
            *self.full.figures(bits, "full precision"),
        ]

    @property
    def sentence(self) -> str:
        """What is MLX's, and what a hot request takes beside a copy of what mlx-lm itself stored."""
        own, ours = (
            [each.cpu_seconds for each in way] for way in (self.own.first.a, self.own.first.b)
        )
        return (
            f"{self.bits} bits: a token takes {self.theirs.cpu_ratio:.2f} x of full precision's in mlx-lm "
            f"itself, by MLX's kernels; a hot request {median(ours) * 1e3:.1f} ms, {median(own) * 1e3:.1f} there."
        )


class Mlxlm:
    """mlx-lm's own caches that have read a prompt but for its last token, in full precision or quantized."""

    def __init__(self, model: Any, prompt: list[int], bits: int | None = None):
        precision = Precision.of(bits, 64, 0)
        layout = Layout.of(model, precision=precision)
        layout.release()
        self.model, self.prompt = model, prompt
        self.stored = Reader(model, 2048, layout.precision, layout.quantized).cold(prompt[:-1])

    def first_token(self) -> None:
        """As `mlx_lm.server` takes what it stored: a copy, whose buffers the first write makes anew."""
        _read(self.model, self.prompt[-1:], copy.deepcopy(self.stored))


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
    each = [beside(model, prompt, bits, args.new_tokens, args.pairs) for bits in BYTES]
    figures = [figure for one in each for figure in one.figures()]
    show_figures(console, figures)
    for one in each:
        console.print(one.sentence, highlight=False)
    write_json(
        args.json,
        {
            "command": "quantized",
            "machine": found,
            "context": args.context,
            "figures": [figure.as_json() for figure in figures],
            "theirs": {str(one.bits): one.theirs.cpu_ratio for one in each},
        },
    )
    return int(any(figure.counted and not figure.kept for figure in figures))


def beside(model: Any, prompt: list[int], bits: int, new_tokens: int, pairs: int) -> Beside:
    """One model with full rows and with rows of `bits` bits from the first token on."""
    theirs = [Mlxlm(model, prompt, each) for each in (None, bits)]
    with (
        HybridPromptCache(model, memory_budget="4GiB") as full,
        HybridPromptCache(model, memory_budget="4GiB", kv_bits=bits) as quantized,
    ):
        for cache in (full, quantized):
            cache.prefill(prompt, max_tokens=1).release()
        weights = [cache.stats().rows_bytes for cache in (full, quantized)]
        hot = [_first_token(cache, model, prompt) for cache in (full, quantized)]
        firsts = [measure(one, hot[1], pairs=pairs) for one in (hot[0], theirs[1].first_token)]
        ready = [
            cache.prefill(prompt, max_tokens=3 * (pairs + 1) * new_tokens)
            for cache in (full, quantized)
        ]
        caches = (*(each.prompt_cache for each in ready), *(each.stored for each in theirs))
        writing = [_writing(model, prompt, list(each), new_tokens) for each in caches]
        # In this order the two of each pair have read as much.
        beside_full, kernels, beside_own = (
            measure(writing[a], writing[b], pairs=pairs) for a, b in ((0, 1), (2, 3), (3, 1))
        )
        for each in ready:
            each.release()
    ours, own = Times(firsts[0], beside_full), Times(firsts[1], beside_own)
    return Beside(bits, weights[1] / weights[0], ours, own, kernels)


def _first_token(cache: HybridPromptCache, model: Any, prompt: list[int]) -> Callable[[], None]:
    def ask() -> None:
        ready = cache.prefill(prompt, max_tokens=64)
        _read(model, ready.rest, ready.prompt_cache)
        ready.release()

    return ask


def _writing(
    model: Any, prompt: list[int], caches: list[Any], new_tokens: int
) -> Callable[[], None]:
    def write() -> None:
        for _ in range(new_tokens):
            _read(model, prompt[-1:], caches)

    return write


def _read(model: Any, ids: list[int], caches: list[Any]) -> None:
    mx.eval(model(mx.array([ids]), cache=caches), [cache.state for cache in caches])
