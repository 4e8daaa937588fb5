"""What a measurement was made on: no figure means anything without it."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

GIB = 1024**3


def machine() -> dict[str, Any]:
    """The machine, its software and the day. Memory in bytes."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "system": platform.system(),
        "os": _operating_system(),
        "architecture": platform.machine(),
        "model": _sysctl("hw.model"),
        "chip": _chip(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "device": _device(),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }


def _device() -> str:
    device = str(mx.default_device()).removeprefix("Device(").removesuffix(")").split(",")[0]
    name = mx.device_info().get("device_name", "") if device == "gpu" else ""
    return f"{device} {name}".strip()


def _operating_system() -> str:
    """Its name and version as its users know it."""
    if version_of_macos := platform.mac_ver()[0]:
        return f"macOS {version_of_macos}"
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform()


def _chip() -> str:
    """The processor's name, as `Apple M4 Ultra`; empty where the system does not tell."""
    if told := _sysctl("machdep.cpu.brand_string"):
        return told
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")


def _sysctl(name: str) -> str:
    """What macOS says of itself; empty elsewhere."""
    try:
        said = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.stdout.strip()


def one_line(found: dict[str, Any]) -> str:
    """The same for the head of a table."""
    return (
        f"{found['cores']} cores, {found['memory_bytes'] / GIB:.0f} GiB, {found['system']} "
        f"{found['architecture']}, MLX {found['mlx']} on {found['device']}, "
        f"mlx-lm {found['mlx_lm']}, Python {found['python']}, {found['date']}"
    )
