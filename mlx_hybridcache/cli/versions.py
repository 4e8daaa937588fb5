"""Which versions are at work, for `--version` and for reports."""

from __future__ import annotations

from importlib.metadata import version

PACKAGES = ("mlx-hybridcache", "mlx", "mlx-lm")


def versions() -> str:
    """`mlx-hybridcache 0.1.0, mlx 0.32.0, mlx-lm 0.32.2`."""
    return ", ".join(f"{name} {version(name)}" for name in PACKAGES)
