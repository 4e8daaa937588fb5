"""What a run found out, as it is written to `results.json` and read back from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from mlx_hybridcache import HybridCacheError

from ..kit.tables import Spread
from ..serving.client import Reply
from ..serving.side import Trouble
from ..serving.watch import Memory

SCHEMA = "mlx-hybridcache-ttft/1"
MEASURED, PARTIAL, FAILED, MISSING = "measured", "partial", "failed", "missing"


class ResultsError(HybridCacheError):
    """A file is no result of this bench, or of one that cannot stand beside another."""


@dataclass(frozen=True, slots=True)
class Request:
    """One measured request. Seconds since it was sent; counts as the server told them, else None.

    `size` is the length asked for in tokens, `run` counts from 0, `error` is None for a reply.
    `notes` say what is odd about it; `ttft_cpu_seconds` is the processor time that the server's
    process spent on it, where it is known.
    """

    scenario: str
    size: int
    step: str
    run: int
    ttft_seconds: float | None = None
    total_seconds: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    notes: list[str] = field(default_factory=list)
    ttft_cpu_seconds: float | None = None

    @classmethod
    def of(cls, scenario: str, size: int, step: str, run: int, reply: Reply | str) -> Self:
        """From a reply, or from the sentence that says why there is none."""
        if isinstance(reply, str):
            return cls(scenario, size, step, run, error=reply)
        return cls(
            scenario,
            size,
            step,
            run,
            ttft_seconds=reply.first_seconds,
            total_seconds=reply.last_seconds,
            prompt_tokens=reply.prompt_tokens,
            cached_tokens=reply.cached_tokens,
            completion_tokens=reply.completion_tokens,
            finish_reason=reply.finish_reason,
            notes=list(reply.notes),
            ttft_cpu_seconds=reply.first_cpu_seconds,
        )

    @property
    def read_tokens(self) -> int | None:
        """Tokens of the prompt that the server had to read."""
        if self.prompt_tokens is None or self.cached_tokens is None:
            return None
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True, slots=True)
class Situation:
    """Several clients at once, or a new start, once: named values in seconds and tokens."""

    situation: str
    size: int
    run: int
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Equality:
    """Whether a reply through the cache equals the one `against` which it was held.

    That is the same request earlier in the run, or to a server that was newly started.
    """

    scenario: str
    size: int
    step: str
    against: str
    same: bool


@dataclass(slots=True)
class Measured:
    """One server: what it is, what it was asked, and what it made of it.

    `status` is `measured`, `partial` (`reason` says where it ended), `failed` (it did not answer
    at all) or `missing` (there is none to start).
    """

    name: str
    kind: str  # process, or url
    status: str = MEASURED
    reason: str = ""
    version: str = ""
    flags: list[str] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    ready_seconds: float | None = None
    requests: list[Request] = field(default_factory=list)
    situations: list[Situation] = field(default_factory=list)
    equalities: list[Equality] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    memory: Memory | None = None
    notes: list[str] = field(default_factory=list)

    def spread(
        self,
        value: Callable[[Request], float | None],
        *,
        scenario: str,
        size: int,
        steps: frozenset[str],
    ) -> Spread | None:
        """Of `value` over the replies to these steps; None when there is none."""
        chosen = (r for r in self.requests if (r.scenario, r.size) == (scenario, size))
        values = [value(each) for each in chosen if each.step in steps]
        known = [each for each in values if each is not None]
        return Spread.of(known) if known else None

    def situation(self, name: str, value: str) -> Spread | None:
        """Of one value over the runs of a situation; None when it was not measured."""
        runs = (each for each in self.situations if each.situation == name)
        values = [run.values[value] for run in runs if value in run.values]
        return Spread.of(values) if values else None


@dataclass(slots=True)
class Results:
    """One run of the bench: the machine, the settings, and each server in the order of measuring.

    `load` is what other programs did meanwhile, by `LoadWatch`. `figures` are the promised ones;
    `replies` says how many replies of two servers were compared, and which differ.
    """

    created: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    servers: list[Measured] = field(default_factory=list)
    load: dict[str, Any] = field(default_factory=dict)
    figures: list[dict[str, Any]] = field(default_factory=list)
    replies: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values, by `results.schema.json`."""
        return {"schema": SCHEMA, "command": "ttft", **asdict(self)}

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `as_json` gave, from a file. Raises `ResultsError`."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.pop("schema") != SCHEMA:
                raise ResultsError(f"{path} was not written by this version of bench ttft.")
            found.pop("command")
            servers = [_measured(each) for each in found.pop("servers")]
            return cls(**found, servers=servers)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ResultsError(f"{path} is no results.json of bench ttft: {error!r}") from error

    def join(self, other: Results) -> None:
        """Take the servers of an earlier run to the front. Raises `ResultsError`.

        Figures of another machine would stand beside these as if they compared.
        """
        for name in ("chip", "cores", "memory_bytes"):
            mine, others = self.machine.get(name), other.machine.get(name)
            if mine != others:
                raise ResultsError(
                    f"The earlier results are of another machine: its {name} is {others}, "
                    f"here it is {mine}. Make a report on each."
                )
        taken = {each.name for each in other.servers}
        for mine in self.servers:
            while mine.name in taken:
                mine.name += "'"
        self.servers[:0] = other.servers


def _measured(found: dict[str, Any]) -> Measured:
    memory = found.pop("memory")
    return Measured(
        requests=[Request(**each) for each in found.pop("requests")],
        situations=[Situation(**each) for each in found.pop("situations")],
        equalities=[Equality(**each) for each in found.pop("equalities")],
        troubles=[Trouble(**each) for each in found.pop("troubles")],
        memory=Memory(**memory) if memory else None,
        **found,
    )
