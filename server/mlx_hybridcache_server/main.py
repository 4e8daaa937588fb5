"""From the command line to a server that listens, and back."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_hybridcache.backend import explaining, import_transformers
from mlx_hybridcache.errors import HybridCacheError, refusal

from .log import say_once
from .settings import build_parser, read_settings


def main(argv: list[str] | None, prog: str) -> int:
    """Serve until a signal comes. 0: stopped; 2: could not start, with one line that says why."""
    parser = build_parser(prog)
    try:
        settings = read_settings(parser, argv)
        logging.basicConfig(
            level=settings.log_level, format="%(asctime)s - %(levelname)s - %(message)s", force=True
        )
        for chatty in ("httpx", "httpx2", "httpcore", "asyncio", "urllib3", "filelock"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        say_once()
        with _without_collecting(), explaining():
            import_transformers()
            from .service import serve  # so `--help` and mistakes need neither MLX nor FastAPI
        serve(settings, argv or sys.argv[1:])
    except (HybridCacheError, OSError) as error:
        said = refusal(error) if isinstance(error, OSError) else str(error)
        print(f"{prog}: {' '.join(said.split())}", file=sys.stderr)  # one line
        return 2
    except KeyboardInterrupt:  # before there was a server to stop
        return 130
    return 0


@contextmanager
def _without_collecting() -> Iterator[None]:
    """No garbage is looked for while modules are imported, nor in them later: they all stay.

    There is no garbage among them, and many passes over them. The model is loaded behind it, as what is
    frozen here is never let go of.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
