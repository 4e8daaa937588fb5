"""What differs from mlx_lm.server on purpose: each with a probe that shows it on both servers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx2
from servers import (
    Server,
)


@dataclass(frozen=True)
class Difference:
    """A row of docs/mlx-lm-differences.md, and how to see on both servers that it is true."""

    about: str
    theirs: str
    ours: str
    probe: Callable[[Server, Server], None]
    flag: str = ""


DIFFERENCES: list[Difference] = []


def difference(about: str, *, theirs: str, ours: str, flag: str = "") -> Callable[..., Any]:
    """Register a probe with its row; `flag` names a default that differs."""

    def register(probe: Callable[[Server, Server], None]) -> Callable[[Server, Server], None]:
        DIFFERENCES.append(Difference(about, theirs, ours, probe, flag))
        return probe

    return register


def rows_of(module: str) -> list[Difference]:
    """Those that the file of that name registers."""
    return [row for row in DIFFERENCES if row.probe.__module__ == module]


def survives(server: Server, path: str, **body: Any) -> bool:
    """Whether the server answers the request at all, and is healthy afterwards."""
    try:
        answered = server.post(path, **body).status_code < 500
    except httpx2.TransportError:
        return False
    return answered and server.healthy
