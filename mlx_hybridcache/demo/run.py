"""The demo: each call once without the cache and once through it, timed and compared bit for bit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import GenerationResponse, stream_generate
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..cache import HybridPromptCache
from ..report import CacheReport
from .workloads import Call, calls, default_text

REPLY_TOKENS = 12


@dataclass(frozen=True)
class Reply:
    """Tokens, their log-probabilities and the seconds to the first of them."""

    tokens: list[int]
    logprobs: list[mx.array]
    first_token_seconds: float

    def difference(self, other: Reply) -> float:
        """0.0 when all bits agree, else the largest difference; infinite when tokens differ."""
        if self.tokens != other.tokens:
            return float("inf")
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        return max(float(np.abs(np.array(a - b)).max()) for a, b in pairs)


@dataclass(frozen=True)
class Outcome:
    """One call's account."""

    name: str
    report: CacheReport
    cold_seconds: float
    hot_seconds: float
    difference: float


def listen(responses: Iterator[GenerationResponse]) -> Reply:
    """Read a reply to its end."""
    began = time.perf_counter()
    tokens, logprobs, first = [], [], 0.0
    for response in responses:
        first = first or time.perf_counter() - began
        tokens.append(response.token)
        logprobs.append(response.logprobs)
    return Reply(tokens, logprobs, first)


def outcomes(
    model: Any, tokenizer: Any, asked: list[Call], cache: HybridPromptCache
) -> Iterator[Outcome]:
    """Each call in turn: plain mlx-lm, which reads all of it, then through `cache`."""
    step = cache.engine.grid.step
    for call in asked:
        cold = listen(
            stream_generate(model, tokenizer, call.prompt, REPLY_TOKENS, prefill_step_size=step)
        )
        generation = cache.stream_generate(call.prompt, REPLY_TOKENS)
        hot = listen(generation)
        report = generation.report
        assert report is not None
        yield Outcome(
            call.name,
            report,
            cold.first_token_seconds,
            hot.first_token_seconds,
            cold.difference(hot),
        )


def run(
    model: Any,
    tokenizer: Any,
    *,
    file: Path | None = None,
    tokens: int = 4096,
    memory_budget: str | None = None,
    console: Console | None = None,
) -> list[Outcome]:
    """Run every call with a progress bar, print the table, and return what was seen.

    Raises `PromptError` when the text is too short for the document asked for.
    """
    console = console or wide_console()
    text = file.read_text(encoding="utf-8", errors="replace") if file else default_text()
    asked = calls(tokenizer, text, tokens)
    seen: list[Outcome] = []
    with (
        HybridPromptCache(model, tokenizer, memory_budget=memory_budget) as cache,
        Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        ) as progress,
    ):
        bar = progress.add_task(asked[0].name, total=len(asked))
        for outcome in outcomes(model, tokenizer, asked, cache):
            seen.append(outcome)
            following = asked[min(len(seen), len(asked) - 1)].name
            progress.update(bar, advance=1, description=following)
    console.print(_table(seen))
    equal = sum(one.difference == 0 for one in seen)
    console.print(
        f"{equal} of {len(seen)} replies through the cache equal the reply without it, bit for bit.",
        highlight=False,
    )
    return seen


def wide_console() -> Console:
    """The terminal, or wide enough for the table where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=110)


def _table(seen: list[Outcome]) -> Table:
    table = Table(
        title="Time to first token, without the cache (cold) and through it (hot)",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("call", no_wrap=True)
    for name in ("prompt", "matched", "restored", "replayed", "cold ms", "hot ms", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("equal", no_wrap=True)
    for one in seen:
        report = one.report
        table.add_row(
            one.name,
            f"{report.prompt_tokens:,}",
            f"{report.matched_tokens:,}",
            f"{report.restored_tokens:,}",
            f"{report.replayed_tokens:,}",
            f"{one.cold_seconds * 1000:,.0f}",
            f"{one.hot_seconds * 1000:,.0f}",
            f"{one.cold_seconds / one.hot_seconds:.1f} x",
            "yes" if one.difference == 0 else f"by {one.difference:.2g}",
        )
    return table
