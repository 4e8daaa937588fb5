"""What was measured, as figures beside their targets and as tables."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from rich.console import Console

from ..kit.tables import Figure, Spread, show, size_text
from ..serving.scenarios import COLD
from ..serving.servers import OURS
from .asked import Request
from .chats import CHANGED, HOT, REPEAT
from .floor import Floor, cpu_median

LONG = 100_000
"""Tokens from which on the server's share of a hot request is to be at most a quarter, below it half."""

COLD_RATIO, FLOOR_RATIO = 1.0, 1.5

Of = Callable[[Request], float | None]


def cpu_of(asked: Request) -> float | None:
    """Seconds of the server's processor time."""
    return asked.cpu_seconds


def ttft_of(asked: Request) -> float | None:
    """Seconds by the client's clock."""
    return asked.ttft_seconds


def values(requests: Sequence[Request], server: str, size: int, name: str, of: Of) -> list[float]:
    """Of one server's requests of that name, in order; empty where one is not known."""
    found = [
        of(each) for each in requests if (each.server, each.size, each.name) == (server, size, name)
    ]
    known = [each for each in found if each is not None]
    return known if len(known) == len(found) else []


def ratio(requests: Sequence[Request], other: str, size: int, name: str, of: Of) -> Spread | None:
    """Ours over the other server's, request by request; None where one is not known."""
    pair = (values(requests, server, size, name, of) for server in (OURS, other))
    ratios = [a / b for a, b in zip(*pair, strict=False) if b]
    return Spread.of(ratios) if ratios else None


def figures(requests: Sequence[Request], floors: Sequence[Floor]) -> list[Figure]:
    """The promised ones."""
    found = []
    for other in others(requests):
        for size in sizes(requests):
            for name in (COLD, *HOT):
                measured = ratio(requests, other, size, name, cpu_of)
                if measured is not None and name != CHANGED:
                    target = COLD_RATIO if name == COLD else (0.25 if size >= LONG else 0.5)
                    title = f"{size_text(size)} {name}, processor time, / {other}"
                    found.append(Figure(title, measured.median, "x", target, False))
    for floor in floors[-1:]:
        title = f"{size_text(floor.size)} {REPEAT} in the library, / its floor"
        found.append(Figure(title, multiple(floor), "x", FLOOR_RATIO, False))
    return found


def others(requests: Sequence[Request]) -> list[str]:
    """The servers beside ours, in their order."""
    return [each for each in dict.fromkeys(each.server for each in requests) if each != OURS]


def sizes(requests: Sequence[Request]) -> list[int]:
    """Ascending."""
    return sorted({each.size for each in requests})


def multiple(floor: Floor) -> float:
    """An exact repeat by ids over its floor: processor time, or on a GPU the clock."""
    on_gpu = mx.default_device() == mx.gpu
    return floor.by_ids.ratio if on_gpu else floor.by_ids.cpu_ratio


def show_requests(console: Console, requests: Sequence[Request]) -> None:
    """A table of the processor time and one of the time to the first token."""
    for title, of in (("server's processor time, ms", cpu_of), ("TTFT by the clock, ms", ttft_of)):
        show(
            console,
            f"{title}: median (smallest-largest), and ours / theirs",
            ("", OURS, *(each for other in others(requests) for each in (other, "ratio"))),
            [_row(requests, size, name, of) for size in sizes(requests) for name in (COLD, *HOT)],
        )


def _row(requests: Sequence[Request], size: int, name: str, of: Of) -> tuple[str, ...]:
    def text(server: str) -> str:
        found = values(requests, server, size, name, of)
        return Spread.of(found).text(".1f", 1e3) if found else "?"

    cells = [f"{size_text(size)} {name}", text(OURS)]
    for other in others(requests):
        beside = ratio(requests, other, size, name, of)
        cells += [text(other), beside.text(".2f") if beside else ""]
    return tuple(cells)


def show_floors(console: Console, floors: Sequence[Floor], requests: Sequence[Request]) -> None:
    """What an exact repeat takes as a multiple of what it must."""
    show(
        console,
        "An exact repeat over its floor (forwards x decode step + one copy of the rows), ms: processor time (clock)",
        (
            "",
            "decode step",
            "forwards",
            "copy",
            "floor",
            "library, ids",
            "x",
            "text",
            "x",
            "HTTP",
            "x",
        ),
        [_floor_row(floor, requests) for floor in floors],
    )


def _floor_row(floor: Floor, requests: Sequence[Request]) -> tuple[str, ...]:
    cells = [
        size_text(floor.size),
        _ms(cpu_median(floor.parts.a), floor.parts.a_seconds),
        str(floor.forwards),
        _ms(cpu_median(floor.parts.b), floor.parts.b_seconds),
        _ms(floor.cpu_seconds, floor.wall_seconds),
    ]
    for paired in (floor.by_ids, floor.by_text):
        cells += [
            _ms(cpu_median(paired.b), paired.b_seconds),
            f"{paired.cpu_ratio:.2f} ({paired.ratio:.2f})",
        ]
    return (*cells, *_over_http(floor, requests))


def _over_http(floor: Floor, requests: Sequence[Request]) -> tuple[str, str]:
    asked = [values(requests, OURS, floor.size, REPEAT, of) for of in (cpu_of, ttft_of)]
    if not all(asked):
        return "?", ""
    cpu, wall = map(statistics.median, asked)
    return _ms(cpu, wall), f"{cpu / floor.cpu_seconds:.2f} ({wall / floor.wall_seconds:.2f})"


def _ms(cpu_seconds: float, wall_seconds: float) -> str:
    return f"{1e3 * cpu_seconds:.1f} ({1e3 * wall_seconds:.1f})"


def as_json(requests: Sequence[Request], floors: Sequence[Floor]) -> dict[str, Any]:
    """Every request, every pair, and of each server's what ours took beside it."""
    ratios: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for other in others(requests):
        for size in sizes(requests):
            for name in (COLD, *HOT):
                cpu, wall = (ratio(requests, other, size, name, of) for of in (cpu_of, ttft_of))
                ratios[other].append(
                    {
                        "size": size,
                        "name": name,
                        "cpu": cpu and cpu.as_json(),
                        "ttft": wall and wall.as_json(),
                    }
                )
    return {
        "requests": [each.as_json() for each in requests],
        "ratios": dict(ratios),
        "floors": [each.as_json() for each in floors],
    }
