"""`mlx_hybridcache.server`, and `python -m mlx_hybridcache.server`: a drop-in for `mlx_lm.server`."""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None, prog: str = "mlx_hybridcache.server") -> int:
    """Serve until a signal comes. 0: stopped; 2: could not start."""
    from mlx_hybridcache_server.main import main as serve

    return serve(argv, prog)


if __name__ == "__main__":
    sys.exit(main())
