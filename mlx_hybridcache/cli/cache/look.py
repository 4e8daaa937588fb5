"""Looking into a cache directory: `ls` and `stats`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ...disk.contents import SHORT, Collection, is_being_written, look, written_at
from ...sizes import format_bytes
from ...store.conversations import Place, Run, Start
from ..console import age, count, wide_console

if TYPE_CHECKING:
    from rich.tree import Tree

WIDTH = 200
"""Columns where no terminal says how wide it is: a conversation is a line."""


def ls(options: argparse.Namespace) -> int:
    """Show what is stored as trees."""
    root: Path = options.cache_dir
    found = look(root)
    times = written_at(root, (entry.segment for one in found for entry in one.entries))
    if options.json:
        _print_json(
            {
                "cache_dir": str(root),
                "namespaces": [
                    _facts(one) | {"runs": [_run_facts(*each) for each in one.runs(times)]}
                    for one in found
                ],
            }
        )
        return 0
    if not found:
        print(f"{root} holds nothing.")
        return 0
    console = wide_console(WIDTH)
    for one in found:
        console.print(_tree(one, one.runs(times), is_long=options.all), highlight=False)
    return 0


def _tree(one: Collection, runs: Iterable[tuple[Start, list[Run]]], *, is_long: bool) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    counted = one.catalogue.store.stats()
    about = f" {one.namespace[:8]}: {count(counted.conversations, 'conversation')}, "
    about += f"{count(one.catalogue.checkpoints, 'checkpoint')}, {format_bytes(one.nbytes())}"
    tree = Tree(Text(one.model or "a model", "bold") + Text(about, "not bold"))
    branches: dict[Run, Tree] = {}
    for start, (*above, run) in runs:
        parent = branches[above[-1]] if above else tree
        branches[run] = parent.add(Text(_line(one, start, run)))
        for place in _checkpoints(run) if is_long and one.has_states else ():
            words = [f"● {place.position:,}", format_bytes(place.disk_bytes or 0)]
            words += ["pinned"] * place.is_pinned
            branches[run].add(Text("  ".join([*words, place.key[:SHORT]])))
    return tree


def _checkpoints(run: Run) -> list[Place]:
    """Its places that prompts can be resumed at."""
    return [place for place in run.places if place.disk_bytes is not None]


def _line(one: Collection, start: Start, run: Run) -> str:
    """`[1,024, 3,000)  ● 6 checkpoints  3.1 MiB  3 min  disk  70658b181e03`.

    The id is that of the last checkpoint; its position is told where the run goes on behind it.
    """
    places = _checkpoints(run)
    last = places[-1] if places else None
    words = [f"[{run.start:,}, {run.end:,})"]
    if one.has_states and last is not None:
        words.append(f"● {count(len(places), 'checkpoint')}")
    words += [format_bytes(run.disk_bytes), age(_seconds(start)), "disk"]
    words += ["pinned"] * any(place.is_pinned for place in places)
    if last is not None:
        at = f" at {last.position:,}" * (last.position != run.end)
        words.append(last.key[:SHORT] + at)
    return "  ".join(words)


def _run_facts(start: Start, path: list[Run]) -> dict[str, object]:
    *above, run = path
    return {
        "id": run.key[:SHORT],
        "parent": above[-1].key[:SHORT] if above else "",
        "depth": len(above),
        "start": run.start,
        "end": run.end,
        "bytes": run.disk_bytes,
        "age_seconds": _seconds(start),
        "tier": "disk",
        "checkpoints": [
            {
                "id": place.key[:SHORT],
                "position": place.position,
                "bytes": place.disk_bytes,
                "pinned": place.is_pinned,
            }
            for place in _checkpoints(run)
        ],
    }


def stats(options: argparse.Namespace) -> int:
    """Show what is stored in figures."""
    root: Path = options.cache_dir
    found = look(root)
    counts = [_counts(one) for one in found]
    total = {name: sum(one[name] for one in counts) for name in _LABELS}
    is_written = is_being_written(root)
    if options.json:
        _print_json(
            {
                "cache_dir": str(root),
                "is_being_written": is_written,
                "namespaces": [_facts(one) for one in found],
                "total": total,
            }
        )
        return 0
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(str(root)))
    table.add_column("")
    for one in found:
        heading = Text(f"{one.model or 'a model'}\n{one.namespace[:8]}")
        table.add_column(heading, justify="right")
    table.add_column("total", justify="right")
    for name, label in _LABELS.items():
        show = format_bytes if "bytes" in name else "{:,}".format
        table.add_row(label, *(show(counted[name]) for counted in [*counts, total]))
    console = wide_console(WIDTH)
    console.print(table)
    console.print("A process is writing there." if is_written else "No process is writing there.")
    return 0


_LABELS = {
    "bytes": "bytes",
    "rows_bytes": "of rows",
    "states_bytes": "of states",
    "files": "files",
    "tokens": "tokens",
    "checkpoints": "checkpoints",
    "conversations": "conversations",
    "pinned": "pinned",
    "unreachable": "unreachable files",
}
"""What is counted of a namespace, for programs and for people."""


def _counts(one: Collection) -> dict[str, int]:
    stats = one.catalogue.store.stats()
    counted = (
        one.nbytes(),
        one.nbytes("rows"),
        one.nbytes("state"),
        len(one.entries),
        stats.tokens,
        one.catalogue.checkpoints,
        stats.conversations,
        stats.pinned,
        len(one.unreachable),
    )
    return dict(zip(_LABELS, counted, strict=True))


def _facts(one: Collection) -> dict[str, object]:
    return {"namespace": one.namespace, "model": one.model, **_counts(one)}


def _seconds(start: Start) -> int:
    """Since the newest file in a run or below it was written."""
    return max(0, int(time.time() - start.used[0]))


def _print_json(found: dict[str, object]) -> None:
    print(json.dumps(found, indent=2))
