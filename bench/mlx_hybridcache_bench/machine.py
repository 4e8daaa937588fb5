"""What a measurement was made on: no figure means anything without it."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import mlx.core as mx

GIB = 1024**3


def machine() -> dict[str, Any]:
    """The machine, its software and the day. Memory in bytes."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "device": _device(),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }


def _device() -> str:
    device = str(mx.default_device()).removeprefix("Device(").removesuffix(")").split(",")[0]
    name = mx.device_info().get("device_name", "") if mx.metal.is_available() else ""
    return f"{device} {name}".strip()


def one_line(found: dict[str, Any]) -> str:
    """The same for the head of a table."""
    return (
        f"{found['cores']} cores, {found['memory_bytes'] / GIB:.0f} GiB, {found['system']} "
        f"{found['architecture']}, MLX {found['mlx']} on {found['device']}, "
        f"mlx-lm {found['mlx_lm']}, Python {found['python']}, {found['date']}"
    )
