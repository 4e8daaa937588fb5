"""`bench decode`: tokens per second with the KV cache and by reading everything again for each token.

Both ways must choose the same tokens; that they do is checked on every context measured.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console

from mlx_hybridcache import HybridPromptCache, models
from mlx_hybridcache.cli.flags import tokens
from mlx_hybridcache.demo import BUNDLED_MODEL

from .kit.machine import machine, one_line
from .kit.models import VOCABULARY, random_qwen3, random_qwen3_moe
from .kit.tables import Figure, show, show_figures, write_json
from .kit.text import prompt_of

LARGEST_PRIME = 2039
"""Below the random models' vocabulary; real ids modulo it keep the text's repetitions."""


@dataclass(frozen=True, slots=True)
class Context:
    """One model at one length. `cached_tps` and `recomputed_tps` are tokens per second."""

    model: str
    context_tokens: int
    cached_tps: float
    recomputed_tps: float
    same_tokens: bool
    max_logit_difference: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench decode`."""
    parser.add_argument("--model", help="directory, or owner/name (default: the bundled model)")
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[64, 128, 256, 512, 1024],
        help="prompt lengths in tokens (64 128 256 512 1024)",
    )
    parser.add_argument("--new-tokens", type=tokens(), default=8, help="tokens decoded at each (8)")
    parser.add_argument("--plot", type=Path, default=Path("decode.png"), help="PNG (decode.png)")


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, print, plot. 1 when the two ways chose different tokens anywhere."""
    found = machine()
    console.print(one_line(found), highlight=False)
    model, tokenizer = models.load(args.model)
    longest = max(args.contexts)
    prompt = prompt_of(tokenizer, longest)
    small = [token % LARGEST_PRIME for token in prompt]
    assert LARGEST_PRIME <= VOCABULARY
    named = [
        ("Qwen3-MoE, random", random_qwen3_moe(), small),
        ("Qwen3 dense, random", random_qwen3(), small),
        (_name(args.model), model, prompt),
    ]
    seen: list[Context] = []
    for name, each, ids in named:
        with console.status(f"measuring {name}"):
            seen += [
                measure_context(name, each, ids[:context], args.new_tokens)
                for context in sorted(args.contexts)
            ]
    _show(console, seen, args.new_tokens)
    differing = sum(not one.same_tokens for one in seen)
    figures = [Figure("contexts with other tokens than re-prefill", differing, "", 0, True)]
    show_figures(console, figures)
    write_json(
        args.json,
        {
            "command": "decode",
            "machine": found,
            "new_tokens": args.new_tokens,
            "figures": [figure.as_json() for figure in figures],
            "contexts": [one.as_json() for one in seen],
            "plot": str(args.plot) if _plot(console, seen, args.plot) else None,
        },
    )
    return int(differing > 0)


def _name(model: str) -> str:
    return "the bundled Qwen3-Next" if model == str(BUNDLED_MODEL) else Path(model).name


def measure_context(name: str, model: Any, prompt: list[int], new_tokens: int) -> Context:
    """Decode `new_tokens` greedily behind `prompt`, both ways, token by token in turns.

    The cached way goes on from caches that `HybridPromptCache` restored.
    """
    with HybridPromptCache(model, memory_budget="4GiB") as cache:
        cache.prefill(prompt, max_tokens=new_tokens + 1).release()
        ready = cache.prefill(prompt, max_tokens=new_tokens + 1)  # restored, not read
        caches, feed = ready.prompt_cache, ready.rest
        read = list(prompt)
        cached_seconds = recomputed_seconds = worst = 0.0
        same = True
        for step in range(new_tokens + 1):
            began = time.perf_counter()
            cached = _last_logits(model, feed, caches)
            between = time.perf_counter()
            recomputed = _last_logits(model, read, None)
            ended = time.perf_counter()
            if step > 0:  # the first of each is the warm-up
                cached_seconds += between - began
                recomputed_seconds += ended - between
            worst = max(worst, _item(mx.abs(cached - recomputed).max()))
            token = int(_item(cached.argmax()))
            same = same and token == int(_item(recomputed.argmax()))
            feed = [token]
            read.append(token)
        ready.release()
    return Context(
        model=name,
        context_tokens=len(prompt),
        cached_tps=new_tokens / cached_seconds,
        recomputed_tps=new_tokens / recomputed_seconds,
        same_tokens=same,
        max_logit_difference=worst,
    )


def _item(x: mx.array) -> float:
    value: Any = x.item()
    return float(value)


def _last_logits(model: Any, tokens: list[int], caches: list[Any] | None) -> mx.array:
    logits: mx.array = model(mx.array(tokens)[None], cache=caches)[0, -1].astype(mx.float32)
    mx.eval(logits, [] if caches is None else [layer.state for layer in caches])
    return logits


def _show(console: Console, seen: list[Context], new_tokens: int) -> None:
    show(
        console,
        f"Tokens per second, greedy, {new_tokens} tokens at each length",
        ("model", "context", "with cache", "without", "ratio", "same tokens", "max |logit|"),
        [
            (
                one.model,
                f"{one.context_tokens:,}",
                f"{one.cached_tps:.1f}",
                f"{one.recomputed_tps:.2f}",
                f"{one.cached_tps / one.recomputed_tps:.1f}",
                "yes" if one.same_tokens else "NO",
                f"{one.max_logit_difference:.2g}",
            )
            for one in seen
        ],
    )


def _plot(console: Console, seen: list[Context], path: Path) -> bool:
    try:
        from .kit.plot import plot_lines
    except ModuleNotFoundError as error:
        console.print(f"no plot: {error.name} is missing; pip install 'mlx-hybridcache[bench]'")
        return False
    lines = {
        f"{name}, {way}": [
            (one.context_tokens, getattr(one, field)) for one in seen if one.model == name
        ]
        for name in dict.fromkeys(one.model for one in seen)
        for way, field in (("with cache", "cached_tps"), ("without", "recomputed_tps"))
    }
    plot_lines(path, "Decoding, with the KV cache and without", lines)
    console.print(f"plot: {path}", highlight=False)
    return True
