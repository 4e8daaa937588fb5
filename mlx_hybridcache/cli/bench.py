"""The command `mlx-hybridcache bench`, whose measurements come with an extra of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import HybridCacheError


def main(argv: Sequence[str], prog: str) -> int:
    """Run one measurement. Raises `HybridCacheError` where what it measures with is missing."""
    try:
        from mlx_hybridcache_bench.cli import main as measure
    except ModuleNotFoundError as error:
        raise HybridCacheError(
            f"bench needs {error.name}: pip install 'mlx-hybridcache[bench]'"
        ) from error
    run: Any = measure
    return int(run(argv))
