"""What `mlx-hybridcache canonicalize` does: find a patch, try it, write it, and say what came of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .. import models
from ..errors import RouterError, SettingError
from ..router import (
    Discovery,
    LayerFindings,
    apply,
    calibration_tokens,
    check_output,
    discover,
    largest_difference,
    moe_layers,
    write_checkpoint,
)
from ..router.checkpoint.report import patch_report
from ..router.defaults import ROW_TOKENS
from ..router.trial.tables import markdown, sentences, tables
from ..router.trial.trial import (
    Trial,
    fresh_texts,
    trial,
)
from ..sizes import format_bytes

TABLE_WIDTH = 110
"""Columns that the widest table takes, also where no terminal says how wide it is."""

PROVING_ROWS = 2
"""Rows of calibration tokens on which logits inside groups are compared afterwards."""


def canonicalize(options: argparse.Namespace) -> int:
    """0: done; 1: there is nothing to patch. Raises `HybridCacheError` and `OSError`."""
    rows = _checked_rows(options)
    console = Console(soft_wrap=True)
    model, tokenizer = models.load(options.model)
    moe_layers(model)  # a dense model is told before a text is read
    tokens = calibration_tokens(tokenizer, options.calibration, rows=rows)
    texts = (
        fresh_texts(tokenizer, options.calibration, after=rows, count=options.texts)
        if options.measure
        else []
    )
    found = _discovered(console, model, tokens, options)
    _say(console, found)
    extra: dict[str, Any] = {"model": options.model}
    card = ""
    if texts:
        tried = _tried(console, model, found, texts, rounder=not options.no_quantized_copy)
        extra["measured"], card = tried.as_json(), markdown(tried)
    if found.patch.groups:
        extra["largest_logit_difference"] = _proven(console, model, found, tokens)
    if options.report is not None:
        told = patch_report(found.patch, found, extra=extra)
        options.report.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if not found.patch.groups:
        console.print("No two experts are alike within the threshold: there is nothing to patch.")
        return 1
    _write(console, options, found, extra, card)
    return 0


def _checked_rows(options: argparse.Namespace) -> int:
    """How many rows of calibration tokens are wanted, once it is sure that files can be written."""
    if options.output is not None:
        check_output(options.output)
    for flag in ("patch", "report"):
        _check_new_file(flag, getattr(options, flag))
    rows: int = options.tokens // ROW_TOKENS
    if rows < 2:
        raise SettingError(f"--tokens {options.tokens}: at least {2 * ROW_TOKENS} are needed.")
    return rows


def _proven(console: Console, model: Any, found: Discovery, tokens: list[list[int]]) -> float:
    """The largest difference of logits inside groups, once `model` is patched."""
    changed = apply(model, found.patch, tie_safe=False)
    largest = largest_difference(model, found.patch, tokens[:PROVING_ROWS])
    console.print(
        f"{changed:,} router rows change; afterwards logits inside groups differ by at most "
        f"{largest:.3g}.",
        highlight=False,
    )
    return largest


def _write(
    console: Console,
    options: argparse.Namespace,
    found: Discovery,
    extra: dict[str, Any],
    card: str,
) -> None:
    """The patch and the patched checkpoint, where they are wanted."""
    if options.patch is not None:
        found.patch.save(options.patch)
        console.print(f"{options.patch}: the patch.", highlight=False)
    if options.output is not None:
        source = models.directory(options.model)
        written = write_checkpoint(
            source, options.output, found.patch, found, extra=extra, card_extra=card
        )
        console.print(
            f"{options.output}: {written.files} files, {format_bytes(written.size_bytes)}; "
            f"{written.rows:,} rows in {written.tensors} tensors differ from {options.model}.",
            highlight=False,
        )


def _tried(
    console: Console, model: Any, found: Discovery, texts: list[list[int]], *, rounder: bool
) -> Trial:
    """The trial, its figures shown; `model` is left as it was."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("texts", total=len(texts))
        tried = trial(
            model,
            found.patch,
            texts,
            coverages=(found.coverage, found.null_coverage),
            rounder=rounder,
            on_text=lambda done, total: progress.update(bar, completed=done),
        )
    for title, columns, rows in tables(tried):
        table = Table(title=title, title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table, width=max(console.width, TABLE_WIDTH), crop=False)
    for sentence in sentences(tried):
        console.print(sentence, highlight=False, markup=False)
    return tried


def _check_new_file(flag: str, file: Path | None) -> None:
    if file is None:
        return
    if file.exists():
        raise RouterError(f"--{flag} {file} exists already. Name a file that does not.")
    if not file.parent.is_dir():
        raise RouterError(f"--{flag} {file}: there is no directory {file.parent} to put it in.")


def _discovered(
    console: Console, model: Any, tokens: list[list[int]], options: argparse.Namespace
) -> Discovery:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("layers", total=None)

        def on_layer(layer: LayerFindings, total: int) -> None:
            progress.update(bar, advance=1, total=total)

        return discover(
            model,
            tokens,
            method=options.method,
            threshold=options.threshold,
            min_tokens=options.min_tokens,
            seed=options.seed,
            on_layer=on_layer,
        )


def _say(console: Console, found: Discovery) -> None:
    patch = found.patch
    console.print(
        f"{len(patch.layers)} MoE layers with {patch.experts:,} experts; {found.tokens:,} tokens, "
        f"{found.held_out_tokens:,} of them held out; {found.seconds:.1f} s.\n"
        f"{patch.groups:,} groups hold {patch.members:,} experts ({found.coverage:.1%}); the same "
        f"procedure groups {found.null_coverage:.1%} of random, independent ones.\n"
        f"{found.unseen:,} experts were left alone: fewer than {found.min_tokens} held-out tokens "
        "were routed to them.",
        highlight=False,
    )
    if 0 < found.coverage <= found.null_coverage:
        console.print("So these groups are no evidence that any two experts are alike.")
