"""The demo: each call twice over HTTP, without the cache and through it, timed and compared."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from ..backend import import_transformers
from ..errors import HybridCacheError
from ..sizes import parse_bytes
from .process import running
from .workloads import Call, calls, default_text

if TYPE_CHECKING:
    from .client import Client, Reply


@dataclass(frozen=True)
class Outcome:
    """One call's account."""

    name: str
    cold: Reply
    hot: Reply
    matched_tokens: int
    reason: str

    @property
    def difference(self) -> float:
        """0.0 when the reply through the cache is the reply without it."""
        return self.cold.difference(self.hot)


def run(
    model: str,
    console: Console,
    *,
    file: Path | None = None,
    tokens: int = 4096,
    memory_budget: str | None = None,
) -> list[Outcome]:
    """Start a server, ask it every call, print the table, and return what was seen.

    Raises `HybridCacheError` when the server cannot serve that, and `PromptError` when the text is
    too short for the document asked for.
    """
    if find_spec("openai") is None:
        raise HybridCacheError(
            'The demo asks its server through OpenAI\'s client: pip install "mlx-hybridcache[demo]"'
        )
    text = file.read_text(encoding="utf-8", errors="replace") if file else default_text()
    flags = ["--model", model]
    if memory_budget is not None:
        flags += ["--prompt-cache-bytes", str(parse_bytes(memory_budget))]
    with _progress(console) as progress, running(flags) as server:
        bar = progress.add_task("starting a server", total=None)
        from .client import Client  # while the server loads its model

        with Client(server.wait_until_ready()) as client:
            asked = calls(_tokenizer(model), text, tokens)
            progress.update(bar, total=2 * len(asked))
            seen = [_outcome(client, call, progress, bar) for call in asked]
    console.print(_table(seen))
    equal = sum(one.difference == 0 for one in seen)
    console.print(
        f"{equal} of {len(seen)} replies through the cache equal those without it, to the last bit.",
        highlight=False,
    )
    return seen


def _outcome(client: Client, call: Call, progress: Progress, bar: TaskID) -> Outcome:
    """Read by mlx-lm alone, which reads all of it, then through the cache."""
    progress.update(bar, description=call.name)
    cold = client.ask(call, through_cache=False)
    progress.advance(bar)
    hot = client.ask(call, through_cache=True)
    progress.advance(bar)
    report = client.last_report()
    return Outcome(call.name, cold, hot, report["matched_tokens"], report["reason"])


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _tokenizer(model: str) -> Any:
    """The tokenizer alone, once the server has shown that there is such a model."""
    import_transformers()
    from transformers import AutoTokenizer

    path = Path(model).expanduser()
    return AutoTokenizer.from_pretrained(str(path) if path.is_dir() else model)


def _table(seen: list[Outcome]) -> Table:
    table = Table(
        title="Time to first token over HTTP, without the cache (cold) and through it (hot)",
        box=box.SIMPLE_HEAD,
        padding=0,  # so that it fits 80 columns
        show_edge=False,
    )
    table.add_column("call", no_wrap=True)
    for name in ("prompt", "matched", "restored", "cold ms", "hot ms", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("equal", "reason"):
        table.add_column(name, no_wrap=True)
    for one in seen:
        cold, hot = one.cold.first_token_seconds, one.hot.first_token_seconds
        table.add_row(
            one.name,
            f"{one.hot.prompt_tokens:,}",
            f"{one.matched_tokens:,}",
            f"{one.hot.cached_tokens:,}",
            f"{cold * 1000:,.0f}",
            f"{hot * 1000:,.0f}",
            f"{cold / hot:.1f}x",
            _verdict(one.difference),
            one.reason,
        )
    return table


def _verdict(difference: float) -> str:
    if difference == 0:
        return "yes"
    return "no" if difference == float("inf") else f"by {difference:.2g}"
