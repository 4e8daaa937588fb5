"""All servers of a run led through everything, with what is told and written meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ..kit.tables import write_json
from ..report.beside import different_replies
from ..report.results import PARTIAL, Results
from ..serving.servers import OURS, THEIRS
from ..serving.side import Nonces
from ..serving.watch import LoadWatch
from .contenders import Contender
from .measure import Measurement
from .pace import Pace, duration_text
from .plan import BenchPlan
from .turns import fit_together, measure_in_turns


def conduct(
    contenders: Sequence[Contender],
    plan: BenchPlan,
    tokenizer: object | None,
    results: Results,
    folder: Path,
    console: Console,
) -> bool:
    """Measure all of them; whether somebody interrupted it. `results` are true at any moment."""
    pace, together = Pace(), fit_together(contenders)
    results.settings["in_turns"] = together
    how = "in turns" if together else "one after the other, as memory does not hold all at once"
    console.print(f"{len(contenders)} servers, {how}. They are warmed up first.", highlight=False)

    def promised(seconds: float) -> None:
        results.settings["expected_seconds"] = round(seconds, 1)
        console.print(_promise(seconds), highlight=False)

    with LoadWatch() as load, _progress(console) as begin:
        measurements = _measurements(contenders, plan, tokenizer, pace, begin)
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
            _interrupt(measurements)
            return True
        finally:
            results.load = load.found()
            results.settings["runs_left_out"] = pace.left_out
            results.replies = _compared(measurements)
    return False


def _interrupt(measurements: Sequence[Measurement]) -> None:
    for each in measurements:
        if each.is_under_way:
            each.found.status, each.found.reason = PARTIAL, "interrupted"


def _promise(seconds: float) -> str:
    ends = datetime.now() + timedelta(seconds=seconds)
    return f"This takes {duration_text(seconds)} at most, until {ends:%H:%M}, at the speed of the warm-up."


def _measurements(
    contenders: Sequence[Contender],
    plan: BenchPlan,
    tokenizer: object | None,
    pace: Pace,
    begin: Callable[[Contender, int], Callable[[str, int], None]],
) -> list[Measurement]:
    """Servers that are started here are asked the very same; two URLs may lead to one server."""
    nonces = Nonces()
    found = []
    for each in contenders:
        advance = begin(each, plan.work(process=each.launch is not None))
        shared = nonces if each.launch is not None else Nonces()
        found.append(Measurement(each, plan, tokenizer, advance, pace, nonces=shared))
    return found


def _compared(measurements: Sequence[Measurement]) -> dict[str, object]:
    """Of our server's replies and those of mlx_lm.server; empty where one was not started here."""
    started = {each.found.name: each for each in measurements if each.contender.launch is not None}
    if not {OURS, THEIRS} <= set(started):
        return {}
    mine, theirs = started[OURS], started[THEIRS]
    compared, different = different_replies(
        mine.found, theirs.found, (mine.replies, theirs.replies)
    )
    return {"compared": compared, "different": different}


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
