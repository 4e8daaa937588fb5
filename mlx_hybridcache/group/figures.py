"""What each rank tells of itself every second: for people who look whether all machines do well."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..engine import Engine


@dataclass(frozen=True, slots=True)
class RankFigures:
    """One rank. Bytes: `mlx_bytes` are what MLX has allocated, `spare_bytes` what its system has left beside the reserve,
    `disk_bytes` what its directory holds, None without one. `layers` are what it has of the caches' layers.
    """

    rank: int
    machine: str
    layers: int
    mlx_bytes: int
    spare_bytes: int
    disk_bytes: int | None

    @classmethod
    def of(cls, rank: int, engine: Engine, spare_bytes: int) -> RankFigures:
        """This process's, at this moment. Any thread may ask."""
        kept = engine.tiers.disk.summary
        return cls(
            rank=rank,
            machine=platform.node(),
            layers=len(engine.layout.kinds),
            mlx_bytes=mx.get_active_memory(),
            spare_bytes=spare_bytes,
            disk_bytes=None if kept is None else kept.held_bytes,
        )

    @classmethod
    def told(cls, message: dict[str, Any]) -> RankFigures:
        """Those that came in a message."""
        return cls(**{name: message[name] for name in cls.__slots__})
