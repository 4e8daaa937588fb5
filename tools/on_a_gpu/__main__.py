"""Run the parts, those that only compare beside each other and those that take time alone, and report."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from mlx_hybridcache_bench.cli import COMMANDS
from mlx_hybridcache_bench.kit.machine import machine

from .part import PARTS
from .report import failures, readable

Part = dict[str, Any]

BENCHES = {
    "bench router": ["--quick", "--only", "cloned", "--texts", "6"],
    "bench hotpath": ["--quick"],
    "bench ttft": ["--quick", "--repeats", "1"],
}
"""Choices that change with the patch and without; what a hit costs; the first token beside `mlx_lm.server`'s."""

TIMED = ("recurrence", "bench hotpath", "bench ttft")
COMPARED = (*(name for name in PARTS if name not in TIMED), "bench router")
"""Each in a process of its own, side by side where there is a GPU: the first kernels of each are compiled
on the CPU, which takes most of the time."""

SHARE_FOR_COMPARING = 0.5
"""Of the time, so that what is timed comes to its turn."""

TOLD_CHARACTERS = 6_000


def main() -> int:
    """0: all that must hold does, as far as it ran."""
    parser = argparse.ArgumentParser(prog="on_a_gpu", description=__doc__)
    parser.add_argument("folder", type=Path, help="report.json and report.md go there")
    parser.add_argument("--seconds", type=float, default=360, help="for everything (360)")
    parser.add_argument("--only", action="append", help="this part; may be repeated")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine(), "parts": {}}
    for name, part in _parts(options.only, options.seconds):
        found["parts"][name] = part
        found["failed"] = failures(found["parts"])
        _write(found, options.folder)  # after each: whatever happens, what was found is kept
        print(f"{name}: {part['seconds']:.0f} s, {part['ended']}", flush=True)
    print((options.folder / "report.md").read_text())
    return int(bool(found["failed"]))


def _parts(only: list[str] | None, seconds: float) -> Iterable[tuple[str, Part]]:
    now = time.monotonic()
    middle, end = now + SHARE_FOR_COMPARING * seconds, now + seconds
    there = {*PARTS, *(f"bench {name}" for name in COMMANDS)}

    def wanted(names: Iterable[str]) -> list[str]:
        return [name for name in names if name in there and (only is None or name in only)]

    beside = len(COMPARED) if machine()["device"].startswith("gpu") else 1
    with ThreadPoolExecutor(beside) as pool:
        names = wanted(COMPARED)
        yield from zip(names, pool.map(partial(_run, end=middle), names), strict=True)
    for name in wanted(TIMED):
        yield name, _run(name, end=end)


def _run(name: str, *, end: float) -> Part:
    return _bench(name, end=end) if name in BENCHES else _compare(name, end=end)


def _compare(name: str, *, end: float) -> Part:
    """One part in a process of its own. What it found before it was stopped counts."""
    with tempfile.TemporaryDirectory(prefix="on-a-gpu-") as scratch:
        lines = Path(scratch, "found.jsonl")
        part = _timed([sys.executable, "-m", "on_a_gpu.part", name, str(lines)], end)
        text = lines.read_text() if lines.exists() else ""
        part["found"] = dict(json.loads(line) for line in text.splitlines())
    return part


def _bench(name: str, *, end: float) -> Part:
    with tempfile.TemporaryDirectory(prefix="on-a-gpu-") as scratch:
        file = Path(scratch, "result.json")
        command = [sys.executable, "-m", "mlx_hybridcache.cli", *name.split(), *BENCHES[name]]
        if name == "bench ttft":
            command += ["--out", str(Path(scratch, "ttft"))]
        if name == "bench router":
            command += ["--plot", str(Path(scratch, "router.png"))]
        part = _timed([*command, "--json", str(file)], end)
        part["result"] = json.loads(file.read_text()) if file.exists() else None
    return part


def _timed(command: list[str], end: float) -> Part:
    """Its seconds, how it ended, and the end of what it said."""
    start = time.monotonic()
    if end - start < 1:
        return {"seconds": 0.0, "ended": "left out: no time was left", "said": ""}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=end - start,
            env={**os.environ, "COLUMNS": "160"},
            check=False,
        )
        ended, said = f"status {done.returncode}", done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired as stopped:
        ended, said = "stopped: no time was left", (stopped.output or b"").decode(errors="replace")
    return {"seconds": time.monotonic() - start, "ended": ended, "said": said[-TOLD_CHARACTERS:]}


def _write(found: dict[str, Any], folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(readable(found), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
