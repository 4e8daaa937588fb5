"""The command that makes one of experts that compute the same: `mlx-hybridcache canonicalize`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..router.defaults import (
    MIN_TOKENS,
    RELATIVE_ERROR,
    ROW_TOKENS,
    ROWS,
    SIMILARITY,
    TEXTS,
)
from .flags import Parser
from .flags import tokens as tokens_flag


def main(argv: Sequence[str], prog: str) -> int:
    """Run the command. 0: done; 1: no two experts are alike, so nothing was written; 2: it cannot be done.

    Raises `HybridCacheError` and `OSError`, whose words say why.
    """
    options = _parser(prog).parse_args(argv)

    from .canonicalizing import canonicalize

    return canonicalize(options)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="directory, or owner/name")
    add("--output", type=_path, help="new directory for the patched checkpoint")
    add(
        "--patch",
        type=_path,
        help="new file for the patch alone; `serve --canonicalize-router` reads it",
    )
    add("--report", type=_path, help="new file for the report in JSON")
    add("--calibration", type=_path, metavar="FILE", help="text (default: Python's own, bundled)")
    add(
        "--tokens",
        type=tokens_flag(),
        default=ROWS * ROW_TOKENS,
        help="of calibration (%(default)s)",
    )
    add("--method", choices=["outputs", "scores"], default="outputs", help="(%(default)s)")
    add(
        "--threshold",
        type=float,
        help=f"outputs: largest relative error ({RELATIVE_ERROR}); scores: smallest cosine ({SIMILARITY})",
    )
    add(
        "--min-tokens",
        type=int,
        default=MIN_TOKENS,
        help="held-out tokens that an expert must have, or it is left alone (%(default)s)",
    )
    add("--seed", type=int, default=0, help="of projections and the null model (%(default)s)")
    _add_measuring(parser)
    return parser


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--measure",
        action="store_true",
        help="try the patch on texts that calibration did not read, beside three other arms, and judge it",
    )
    add("--texts", type=int, default=TEXTS, help="to measure on, 2 at least (%(default)s)")
    add(
        "--no-quantized-copy",
        action="store_true",
        help="measure without the copy with 8-bit weights, which takes half of a bfloat16 model's memory again",
    )


def _path(text: str) -> Path:
    return Path(text).expanduser()
