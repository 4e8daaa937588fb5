"""`bench traces`: write the generated workloads as files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from ..kit.tables import show, write_json
from .traces import summary, write_trace
from .workloads import WORKLOADS, workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench traces`."""
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where to write them"
    )
    parser.add_argument("--seed", type=int, default=3, help="of the random numbers (3)")
    parser.add_argument("--only", action="append", metavar="NAME", help="write this workload alone")
    parser.set_defaults(model=None)


def run(args: argparse.Namespace, console: Console) -> int:
    """Write each workload as `NAME-SEED.jsonl`."""
    names = args.only or list(WORKLOADS)
    args.out.mkdir(parents=True, exist_ok=True)
    written: dict[str, dict[str, Any]] = {}
    for name in names:
        trace = workload(name, args.seed)
        file = args.out / f"{name}-{args.seed}.jsonl"
        write_trace(file, trace)
        written[name] = {"file": str(file), **summary(trace)}
    show(
        console,
        f"Traces of seed {args.seed}",
        ("workload", "requests", "conversations", "prompt tokens", "longest", "file"),
        [
            (
                name,
                str(each["requests"]),
                str(each["conversations"]),
                f"{each['prompt_tokens']:,}",
                f"{each['longest_tokens']:,}",
                each["file"],
            )
            for name, each in written.items()
        ],
    )
    write_json(args.json, {"command": "traces", "seed": args.seed, "traces": written})
    return 0
