"""`bench ttft`: the time to first token of the servers people use, beside this one, and a report."""

from __future__ import annotations

import argparse
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from ..kit.machine import machine, one_line
from ..kit.tables import Figure, show, show_figures, size_text, write_json
from ..kit.text import tokenizer_of
from ..report.beside import figures
from ..report.charts import charts
from ..report.markdown import markdown
from ..report.page import report
from ..report.results import MEASURED, Results
from ..report.summary import notes, servers_sheet, sheets
from ..report.verdict import verdicts
from .conduct import conduct
from .options import add_arguments, contenders_of, fields_of, plan_of
from .plan import BenchPlan

__all__ = ["add_arguments", "run", "write"]

INTERRUPTED = 130


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, print, write. 1 when a server could not be measured in full, or a counted figure
    misses its target; 130 when interrupted.
    """
    status = Console(stderr=True) if args.markdown else console
    plan = plan_of(args)
    earlier = [Results.read(path) for path in args.add]
    contenders = contenders_of(args, plan)
    tokenizer = tokenizer_of(args.model) if args.model else None
    results = Results(
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        machine={**machine(), "mlx_hybridcache": version("mlx-hybridcache")},
        settings=_settings(plan, args) if contenders else earlier[0].settings,
    )
    for each in reversed(earlier):
        results.join(each)
    folder = args.out or Path(f"ttft-{datetime.now():%Y-%m-%d-%H%M%S}")
    folder.mkdir(parents=True, exist_ok=True)
    status.print(one_line(results.machine), highlight=False)
    interrupted = bool(contenders) and conduct(contenders, plan, tokenizer, results, folder, status)
    promised = figures(results)
    results.figures = [figure.as_json() for figure in promised]
    write(results, folder)
    write_json(args.json, results.as_json())
    if args.markdown:
        print(markdown(results), end="")
    else:
        _show(results, promised, console)
    status.print(f"Written to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    return INTERRUPTED if interrupted else int(not _is_well(results, promised))


def _is_well(results: Results, promised: list[Figure]) -> bool:
    """Whether every server was measured in full, and every counted figure keeps its target."""
    whole = all(each.status == MEASURED for each in results.servers)
    return whole and all(figure.kept for figure in promised if figure.counted)


def _settings(plan: BenchPlan, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "quick": args.quick,
        "sizes": list(plan.sizes),
        "repeats": plan.repeats,
        "scenarios": list(plan.names),
        "clients": plan.clients,
        "timeout_seconds": plan.timeout_seconds,
        "warm_up_tokens": plan.warm_up_tokens,
        "cold_checks": plan.cold_checks,
        "extra": fields_of(args.extra),
    }


def write(results: Results, folder: Path) -> None:
    """Every file of the folder."""
    write_json(folder / "results.json", results.as_json())
    (folder / "report.html").write_text(report(results), encoding="utf-8")
    (folder / "report.md").write_text(markdown(results), encoding="utf-8")
    for chart in charts(results):
        chart.png(folder)


def _show(results: Results, promised: list[Figure], console: Console) -> None:
    sizes = ", ".join(size_text(each) for each in results.settings["sizes"])
    for verdict in verdicts(results):
        console.print(verdict, style="bold", highlight=False, markup=False)
    console.print(f"Prompts of {sizes} tokens. Median (smallest-largest).", highlight=False)
    for sheet in (servers_sheet(results), *sheets(results)):
        show(console, sheet.title, sheet.columns, sheet.rows)
    for note in notes(results):
        console.print(note, highlight=False, markup=False)
    if promised:
        show_figures(console, promised)
