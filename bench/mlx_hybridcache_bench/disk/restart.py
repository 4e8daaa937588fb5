"""A server with a cache directory, asked before and after it went: by SIGTERM, and by kill -9.

Each run has a directory and a prompt of its own. The process that is asked again is a new one, and
both have answered one short question before: its model, kernels and connection are warm, nothing else.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import httpx2
from rich.console import Console

from ..kit.tables import Figure, Spread, show
from ..kit.text import tokenizer_of
from ..serving.client import Client, Reply
from ..serving.scenarios import Material, repeat
from ..serving.servers import OURS, Launch, ServerError, ServerProcess

STRIDE = 2048
"""The server's own prefill step, in tokens: what a restart may read again."""

SPEEDUP = 15
SPARE_TOKENS = 4_000
WARM_UP_TOKENS = 200

STOP_SECONDS = 60.0
"""How long a server may take to write what it holds before it ends."""

WRITE_SECONDS = 60.0
POLL_SECONDS = 0.05

STOPPED, KILLED = "stopped", "killed"
WAYS = STOPPED, KILLED


@dataclass(frozen=True, slots=True)
class Restart:
    """One prompt before and after. `ready_seconds` is from the start until it answers.

    `write_seconds` is how long the server went on writing: until it had ended, or until everything
    was on disk.
    """

    way: str
    prompt_tokens: int
    cold_seconds: float
    cold_cached_tokens: int
    write_seconds: float
    ready_seconds: float
    hot_seconds: float
    cached_tokens: int
    same_reply: bool

    @property
    def replayed_tokens(self) -> int:
        """Tokens that were read again, the last one included."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def ratio(self) -> float:
        """TTFT after the restart over the cold one."""
        return self.hot_seconds / self.cold_seconds


@dataclass(frozen=True, slots=True)
class Restarts:
    """All runs, ways in turns."""

    runs: tuple[Restart, ...]

    def figures(self) -> list[Figure]:
        """The promised ones."""
        found: list[Figure] = []
        for way in WAYS:
            runs = self._of(way)
            most = max(run.replayed_tokens for run in runs)
            found.append(Figure(f"tokens read again, {way}, at most", most, "", STRIDE, True))
        differ = sum(not run.same_reply for run in self.runs)
        found.append(Figure("replies that differ from the cold ones", differ, "", 0, True))
        for way in WAYS:
            ratio = Spread.of([run.ratio for run in self._of(way)]).median
            found.append(
                Figure(f"TTFT, {way} and asked again / cold", ratio, "x", 1 / SPEEDUP, False)
            )
        return found

    def _of(self, way: str) -> list[Restart]:
        return [run for run in self.runs if run.way == way]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "runs": [
                {**asdict(run), "replayed_tokens": run.replayed_tokens, "ratio": run.ratio}
                for run in self.runs
            ]
        }

    def show(self, console: Console) -> None:
        """Print it."""
        rows = []
        for way in WAYS:
            runs = self._of(way)
            rows.append(
                (
                    {STOPPED: "SIGTERM", KILLED: "kill -9 once all is written"}[way],
                    Spread.of([run.prompt_tokens for run in runs]).text(),
                    Spread.of([run.cached_tokens for run in runs]).text(),
                    Spread.of([run.cold_seconds for run in runs]).text(".2f"),
                    Spread.of([run.hot_seconds for run in runs]).text(".0f", 1000),
                    Spread.of([1 / run.ratio for run in runs]).text(".0f"),
                    Spread.of([run.write_seconds for run in runs]).text(".2f"),
                    Spread.of([run.ready_seconds for run in runs]).text(".1f"),
                )
            )
        show(
            console,
            f"The same prompt after a restart of the server, {len(self._of(STOPPED))} runs",
            (
                *("", "prompt", "cached", "cold\nTTFT s", "after\nTTFT ms", "times\nfaster"),
                *("written\nin s", "ready\nin s"),
            ),
            rows,
        )


def measure_restarts(model: str, *, tokens: int, repeats: int) -> Restarts:
    """Each way `repeats` times, in turns. Raises `ServerError` and `RequestFailed`."""
    material = Material(tokenizer_of(model), tokens + SPARE_TOKENS)
    runs = []
    for number in range(repeats):
        for way in WAYS if number % 2 == 0 else reversed(WAYS):
            with tempfile.TemporaryDirectory() as directory:
                launch = Launch.of(OURS, model, ("--cache-dir", directory))
                with ServerProcess(launch) as server:
                    runs.append(_restarted(server, material, way, f"Restart {number}.", tokens))
    return Restarts(tuple(runs))


def _restarted(
    server: ServerProcess, material: Material, way: str, nonce: str, tokens: int
) -> Restart:
    server.wait_ready()
    cold = _asked(server, material, nonce, tokens)
    began = time.perf_counter()
    if way == KILLED:
        _wait_until_written(server)
        write_seconds = time.perf_counter() - began
        server.kill()
    else:
        server.stop(STOP_SECONDS)
        write_seconds = time.perf_counter() - began
    began = time.perf_counter()
    server.start()
    server.wait_ready()
    ready_seconds = time.perf_counter() - began
    hot = _asked(server, material, nonce, tokens)
    assert hot.prompt_tokens is not None, "our server counts"
    assert hot.cached_tokens is not None, "our server counts"
    assert cold.cached_tokens is not None, "our server counts"
    return Restart(
        way=way,
        prompt_tokens=hot.prompt_tokens,
        cold_seconds=cold.first_seconds,
        cold_cached_tokens=cold.cached_tokens,
        write_seconds=write_seconds,
        ready_seconds=ready_seconds,
        hot_seconds=hot.first_seconds,
        cached_tokens=hot.cached_tokens,
        same_reply=hot.same_as(cold),
    )


def _asked(server: ServerProcess, material: Material, nonce: str, tokens: int) -> Reply:
    """The reply to the prompt, after that to a short one of another beginning."""
    short = next(repeat(material, f"Before {nonce} {time.time_ns()}", WARM_UP_TOKENS))
    step = next(repeat(material, nonce, tokens))
    with Client(server.url) as client:
        client.ask(short.path, short.body)
        return client.ask(step.path, step.body)


def _wait_until_written(server: ServerProcess) -> None:
    """Return when everything that the server holds is on disk, as it says itself."""
    until = time.monotonic() + WRITE_SECONDS
    while True:
        said = httpx2.get(f"{server.url}/v1/cache", timeout=30, trust_env=False).json()
        disk = said.get("disk")
        if disk is None:
            raise ServerError(f"{server.name} has no cache directory to write to.")
        if disk["queued_bytes"] == 0 and disk["unwritten"] == 0 and disk["checkpoints"]:
            return
        if time.monotonic() > until:
            raise ServerError(f"{server.name} did not write everything in {WRITE_SECONDS:.0f} s.")
        time.sleep(POLL_SECONDS)
