"""The command line: `mlx-hybridcache serve | demo | verify | plan | canonicalize | cache | bench`."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..demo import BUNDLED_MODEL
from ..errors import HybridCacheError, SettingError
from ..flags import read_text, refusal, tokens
from ..sizes import parse_bytes
from .versions import versions


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0: done; 1: a comparison did not hold; 2: the request could not be served."""
    parser = _parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help()
        return 0
    options, rest = parser.parse_known_args(argv)
    if rest and options.command not in ("bench", "cache", "canonicalize", "plan", "serve"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(options.run(options, rest))
    except (HybridCacheError, OSError) as error:
        said = refusal(error) if isinstance(error, OSError) else error
        print(f"mlx-hybridcache {options.command}: {said}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx-hybridcache", description=__doc__)
    parser.add_argument("--version", action="version", version=versions())
    commands = parser.add_subparsers(dest="command", required=True)

    serve = commands.add_parser("serve", help="answer over HTTP as OpenAI does", add_help=False)
    serve.set_defaults(run=_serve)

    demo = commands.add_parser("demo", help="read a long text, cold and through the cache")
    demo.add_argument("--model", default=str(BUNDLED_MODEL), help="directory, or owner/name")
    demo.add_argument("--file", type=Path, help="the text to read (default: Python's reference)")
    demo.add_argument("--tokens", type=tokens(), default=4096, help="length of the document (4096)")
    demo.add_argument("--memory-budget", help="bytes, or 16GB (default: a share of free memory)")
    demo.set_defaults(run=_demo)

    verify = commands.add_parser("verify", help="prove hot == cold for a model on this device")
    verify.add_argument("--model", default=str(BUNDLED_MODEL), help="directory, or owner/name")
    verify.add_argument("--file", type=Path, help="the text to read (default: Python's reference)")
    verify.add_argument(
        "--tokens", type=tokens(64), default=1400, help="length of the prompts (1400)"
    )
    verify.add_argument("--prefill-step-size", type=tokens(), default=512, help="tokens (512)")
    verify.add_argument("--exact", action="store_true", help="prove exact mode: no tolerance")
    verify.add_argument("--tolerance", type=float, help="largest allowed logit difference")
    verify.set_defaults(run=_verify)

    plan = commands.add_parser(
        "plan", help="memory for a model, by its config.json alone", add_help=False
    )
    plan.set_defaults(run=_plan)

    canonicalize = commands.add_parser(
        "canonicalize",
        help="find experts that are one and give them one router row; `canonicalize -h` lists how",
        add_help=False,
    )
    canonicalize.set_defaults(run=_canonicalize)

    cache = commands.add_parser(
        "cache",
        help="look into a cache directory and keep it; `cache -h` lists how",
        add_help=False,
    )
    cache.set_defaults(run=_cache)

    bench = commands.add_parser("bench", help="measure; `bench -h` lists what", add_help=False)
    bench.set_defaults(run=_bench)
    return parser


def _serve(options: argparse.Namespace, rest: list[str]) -> int:
    from ..server import main as serve

    return serve(rest, prog="mlx-hybridcache serve")


def _demo(options: argparse.Namespace, rest: list[str]) -> int:
    from ..demo.run import run

    if options.memory_budget is not None:
        try:
            parse_bytes(options.memory_budget)
        except SettingError as error:
            raise SettingError(f"--memory-budget {error}") from error
    try:
        seen = run(
            options.model,
            file=options.file,
            tokens=options.tokens,
            memory_budget=options.memory_budget,
        )
    except KeyboardInterrupt:
        return 130
    if all(one.difference == 0 for one in seen):
        return 0
    return _excuse(options.model)


def _excuse(path: str) -> int:
    """0 when this device changes replies without any cache, and says so; else 1."""
    from .. import models
    from ..demo.workloads import default_text
    from ..verify import probe

    model, tokenizer = models.load(path)
    measured = probe(model, tokenizer.encode(default_text()[:4000]), step=512)
    if measured == 0:
        return 1
    print(
        f"On this device the way a prompt is sliced changes logits by {measured:.2g} with or without "
        "a cache. `mlx-hybridcache verify --exact` shows the mode in which every bit agrees."
    )
    return 0


def _verify(options: argparse.Namespace, rest: list[str]) -> int:
    from rich.progress import Progress
    from rich.table import Table

    from .. import models
    from ..demo.run import wide_console
    from ..demo.workloads import LONGEST_TOKEN, default_text
    from ..verify import verify

    console = wide_console()
    model, tokenizer = models.load(options.model)
    text = read_text("--file", options.file) if options.file else default_text()
    wanted = 2 * options.tokens
    head = text[: wanted * LONGEST_TOKEN]
    ids = list(tokenizer.encode(head, add_special_tokens=False))[:wanted]
    if len(ids) < 64:
        raise SettingError(f"--file {options.file} has {len(ids)} tokens; 64 are needed.")
    long, other = ids[: options.tokens], ids[options.tokens :] or ids[:32]
    prompts = [long, long[: 2 * len(long) // 3] + other[: len(long) // 3]]
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("restore points", total=None)
        verdict = verify(
            model,
            prompts,
            step=options.prefill_step_size,
            exact=options.exact,
            tolerance=options.tolerance,
            on_point=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    table = Table(title=f"Hot against cold at every restore point, {options.model}")
    for name in ("position", "restored", "prompt", "max |logit|", "KL (nats)", "first other token"):
        table.add_column(name, justify="right")
    for point in verdict.points:
        found = point.difference
        table.add_row(
            f"{point.position:,}",
            f"{point.restored:,}",
            f"{point.prompt_tokens:,}",
            f"{found.max_abs:.3g}",
            f"{found.kl:.3g}",
            "none" if found.first_differing_token is None else str(found.first_differing_token),
        )
    console.print(table)
    for line in _machine():
        console.print(line, highlight=False)
    console.print(
        f"probe: cold runs sliced differently differ by at most {verdict.probe:.3g}\n"
        f"allowed {verdict.allowed:.3g}, worst restore {verdict.worst:.3g}: "
        + ("it holds" if verdict.holds else "IT DOES NOT HOLD"),
        highlight=False,
    )
    return 0 if verdict.holds else 1


def _machine() -> list[str]:
    import mlx.core as mx

    return [
        f"{versions()}, Python {platform.python_version()}",
        f"{platform.platform()}, {mx.default_device()}",
    ]


def _plan(options: argparse.Namespace, rest: list[str]) -> int:
    from .plan import main as plan

    return plan(rest)


def _canonicalize(options: argparse.Namespace, rest: list[str]) -> int:
    from .canonicalize import main as canonicalize

    try:
        return canonicalize(rest)
    except KeyboardInterrupt:
        return 130


def _cache(options: argparse.Namespace, rest: list[str]) -> int:
    from .cache import main as cache

    try:
        return cache(rest)
    except KeyboardInterrupt:
        return 130


def _bench(options: argparse.Namespace, rest: list[str]) -> int:
    try:
        from mlx_hybridcache_bench.cli import main as bench
    except ModuleNotFoundError as error:
        raise HybridCacheError(
            f"bench needs {error.name}: pip install 'mlx-hybridcache[bench]'"
        ) from error
    run: Any = bench
    return int(run(rest))
