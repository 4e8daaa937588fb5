"""`bench ttft`: the time to first token of the servers people use, beside this one, and a report."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from mlx_hybridcache import PromptError

from ..kit.machine import machine, one_line
from ..kit.tables import show, size_text, write_json
from ..kit.text import tokenizer_of
from ..report.charts import charts
from ..report.markdown import markdown
from ..report.page import report
from ..report.results import MEASURED, PARTIAL, Results
from ..report.summary import notes, servers_sheet, sheets
from ..report.verdict import verdicts
from ..serving.crowd import AT_ONCE
from ..serving.load import LoadWatch
from ..serving.scenarios import LONGER
from ..serving.servers import OURS, THEIRS, ServerError
from .contenders import LLAMA, Contender, compared, flags_of
from .measure import Measurement
from .pace import Pace, duration_text
from .plan import NAMES, USUAL, Plan, sizes_of
from .remote import at_url
from .turns import fit_together, measure_in_turns

SIZES, QUICK_SIZES = ("12K", "30K", "60K", "120K"), ("1050",)
REPEATS = 3
QUICK_WARM_UP = 400
TIMEOUT_SECONDS = 1_200.0
START_SECONDS = 900.0
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench ttft`."""
    who = parser.add_argument_group("what is measured")
    who.add_argument(
        "--compare",
        metavar="NAMES",
        help=f"start these and {OURS}, and ask them in turns: {THEIRS},{LLAMA} ({THEIRS})",
    )
    who.add_argument("--alone", action="store_true", help=f"leave {OURS} out of --compare")
    who.add_argument(
        "--url",
        action="append",
        default=[],
        metavar="[NAME=]URL",
        help="a server that runs already, such as LM Studio or Ollama; may be repeated",
    )
    who.add_argument("--model", help="directory, or owner/name (default: the bundled model)")
    who.add_argument("--gguf", type=Path, metavar="FILE", help="the same model for llama-server")
    who.add_argument("--served-model", metavar="NAME", help="what requests to --url name as model")
    who.add_argument(
        "--api-key-env", metavar="VARIABLE", help="where the key for --url is, as bearer token"
    )
    who.add_argument("--extra", metavar="JSON", help="fields for every request, as an object")
    who.add_argument(
        "--flags",
        action="append",
        default=[],
        metavar="NAME=FLAGS",
        help='for a started server: "llama-server=--ctx-checkpoints 128"; may be repeated',
    )
    how = parser.add_argument_group("how")
    how.add_argument("--quick", action="store_true", help="small prompts, for a try")
    how.add_argument("--sizes", nargs="+", metavar="TOKENS", help=f"{' '.join(SIZES)}; quick 1050")
    how.add_argument("--repeats", type=int, help=f"runs of each scenario ({REPEATS})")
    how.add_argument("--scenarios", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    how.add_argument("--clients", type=int, default=AT_ONCE, help=f"at once ({AT_ONCE})")
    how.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"until a request counts as hung ({TIMEOUT_SECONDS:.0f})",
    )
    how.add_argument(
        "--no-cold-checks",
        action="store_true",
        help="do not ask a newly started server for cold replies to compare with",
    )
    told = parser.add_argument_group("what comes out")
    told.add_argument("--out", type=Path, metavar="DIR", help="a folder for all files (ttft-DATE)")
    told.add_argument("--markdown", action="store_true", help="print Markdown for an issue instead")
    told.add_argument(
        "--add",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="results.json of an earlier run here, to join the report; alone, nothing is measured",
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, print, write. 1 when a server could not be measured in full; 130 when interrupted."""
    status = Console(stderr=True) if args.markdown else console
    plan = _plan(args)
    earlier = [Results.read(path) for path in args.add]
    contenders = _contenders(args, plan)
    tokenizer = tokenizer_of(args.model) if args.model else None
    results = Results(
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        machine={**machine(), "mlx_hybridcache": version("mlx-hybridcache")},
        settings=(
            _settings(plan, quick=args.quick, extra=args.extra)
            if contenders
            else earlier[0].settings
        ),
    )
    for each in reversed(earlier):
        results.join(each)
    folder = args.out or Path(f"ttft-{datetime.now():%Y-%m-%d-%H%M%S}")
    folder.mkdir(parents=True, exist_ok=True)
    status.print(one_line(results.machine), highlight=False)
    interrupted = False
    if contenders:
        interrupted = _measure(contenders, plan, tokenizer, results, folder, status)
    write(results, folder)
    write_json(args.json, results.as_json())
    if args.markdown:
        print(markdown(results), end="")
    else:
        _show(results, console)
    status.print(f"Written to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    whole = all(each.status == MEASURED for each in results.servers)
    return INTERRUPTED if interrupted else int(not whole)


def _measure(
    contenders: list[Contender],
    plan: Plan,
    tokenizer: object | None,
    results: Results,
    folder: Path,
    status: Console,
) -> bool:
    """Lead all through everything; whether somebody interrupted it."""
    pace, together = Pace(), fit_together(contenders)
    results.settings["in_turns"] = together
    how = "in turns" if together else "one after the other, as memory does not hold all at once"
    status.print(f"{len(contenders)} servers, {how}. They are warmed up first.", highlight=False)

    def promised(seconds: float) -> None:
        results.settings["expected_seconds"] = round(seconds, 1)
        ends = datetime.now() + timedelta(seconds=seconds)
        said = f"This takes {duration_text(seconds)} at most, until {ends:%H:%M}, at the speed of the warm-up."
        status.print(said, highlight=False)

    with LoadWatch() as load, _progress(status) as begin:
        measurements = []
        for each in contenders:
            advance = begin(each, plan.work(process=each.launch is not None))
            measurements.append(Measurement(each, plan, tokenizer, advance, pace))
        results.servers += [each.found for each in measurements]

        def written() -> None:
            # Again and again: hours of measuring are not lost with what comes next.
            results.load = load.found()
            write_json(folder / "results.json", results.as_json())

        try:
            measure_in_turns(
                measurements, pace, together=together, promised=promised, written=written
            )
        except KeyboardInterrupt:
            for stopped in measurements:
                if stopped.is_under_way:
                    stopped.found.status, stopped.found.reason = PARTIAL, "interrupted"
            return True
        finally:
            results.load = load.found()
            results.settings["runs_left_out"] = pace.left_out
    return False


def _plan(args: argparse.Namespace) -> Plan:
    try:
        sizes = sizes_of(args.sizes or (QUICK_SIZES if args.quick else SIZES))
    except ValueError as error:
        raise PromptError(f"--sizes takes numbers of tokens, as 12000 or 12K: {error}") from error
    if min(sizes) <= LONGER:
        raise PromptError(f"A size must exceed {LONGER} tokens, by which raw text is shortened.")
    if args.clients < 1 or (args.repeats is not None and args.repeats < 1) or args.timeout <= 0:
        raise PromptError("--clients, --repeats and --timeout take numbers above 0.")
    return Plan(
        sizes=sizes,
        repeats=args.repeats or REPEATS,
        names=tuple(args.scenarios or USUAL),
        clients=args.clients,
        timeout_seconds=args.timeout,
        start_seconds=START_SECONDS,
        warm_up_tokens=QUICK_WARM_UP if args.quick else sizes[0],
        cold_checks=not args.no_cold_checks,
    )


def _contenders(args: argparse.Namespace, plan: Plan) -> list[Contender]:
    """Everything is looked up before anything is started: mistakes cost no waiting."""
    fields = _fields(args.extra)
    api_key = None
    if args.api_key_env:
        api_key = os.environ.get(args.api_key_env)
        if not api_key:
            raise ServerError(f"There is no key in ${args.api_key_env}.")
    names = [each.strip() for each in (args.compare or "").split(",") if each.strip()]
    if not (names or args.url or args.add):
        names = [THEIRS]
    if names and OURS not in names and not args.alone:
        names.append(OURS)
    remote = [
        at_url(each, model=args.served_model, fields=fields, api_key=api_key) for each in args.url
    ]
    started = compared(
        names,
        model=args.model,
        gguf=args.gguf,
        flags=flags_of(args.flags),
        fields=fields,
        context_tokens=plan.context_tokens,
    )
    return [*remote, *started]


def _fields(extra: str | None) -> dict[str, Any]:
    try:
        fields = json.loads(extra or "{}")
    except ValueError as error:
        raise ServerError(f"--extra is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ServerError(f'--extra takes an object, as {{"top_k": 1}}, not {extra}.')
    return fields


def _settings(plan: Plan, *, quick: bool, extra: str | None) -> dict[str, Any]:
    return {
        "quick": quick,
        "sizes": list(plan.sizes),
        "repeats": plan.repeats,
        "scenarios": list(plan.names),
        "clients": plan.clients,
        "timeout_seconds": plan.timeout_seconds,
        "warm_up_tokens": plan.warm_up_tokens,
        "cold_checks": plan.cold_checks,
        "extra": _fields(extra),
    }


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[Contender, int], Callable[[str, int], None]]]:
    """A bar for each server; where there is no terminal, a line for each thing begun with."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[said]}", style="dim"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:

        def begin(contender: Contender, work: int) -> Callable[[str, int], None]:
            if not console.is_terminal:
                console.print(f"measuring {contender.name}", highlight=False)
            task = progress.add_task(contender.name, total=work, said="starting, warming up")

            seen: set[str] = set()

            def advance(said: str, tokens: int) -> None:
                progress.update(task, advance=tokens, said=said)
                scenario = said.partition(":")[0]
                if not console.is_terminal and scenario not in seen:
                    seen.add(scenario)
                    console.print(f"  {scenario}", highlight=False)

            return advance

        yield begin


def write(results: Results, folder: Path) -> None:
    """Every file of the folder."""
    write_json(folder / "results.json", results.as_json())
    (folder / "report.html").write_text(report(results), encoding="utf-8")
    (folder / "report.md").write_text(markdown(results), encoding="utf-8")
    for chart in charts(results):
        chart.png(folder)


def _show(results: Results, console: Console) -> None:
    sizes = ", ".join(size_text(each) for each in results.settings["sizes"])
    for verdict in verdicts(results):
        console.print(verdict, style="bold", highlight=False, markup=False)
    console.print(f"Prompts of {sizes} tokens. Median (smallest-largest).", highlight=False)
    for sheet in (servers_sheet(results), *sheets(results)):
        show(console, sheet.title, sheet.columns, sheet.rows)
    for note in notes(results):
        console.print(note, highlight=False, markup=False)
