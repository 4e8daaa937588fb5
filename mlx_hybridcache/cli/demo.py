"""The command `mlx-hybridcache demo`: a server is started and asked, without its cache and with it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..demo import BUNDLED_MODEL
from ..errors import SettingError
from ..sizes import parse_bytes
from .console import wide_console
from .flags import Parser, tokens


def main(argv: Sequence[str], prog: str) -> int:
    """0: every reply is the same through the cache; 1: one is not, and it is the cache that did it."""
    options = _parser(prog).parse_args(argv)
    if options.memory_budget is not None:
        try:
            parse_bytes(options.memory_budget)
        except SettingError as error:
            raise SettingError(f"--memory-budget {error}") from error

    from ..demo.run import run

    seen = run(
        options.model,
        wide_console(),
        file=options.file,
        tokens=options.tokens,
        memory_budget=options.memory_budget,
    )
    if all(one.difference == 0 for one in seen):
        return 0
    return _status_of_a_difference(options.model)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add("--model", default=str(BUNDLED_MODEL), help="directory, or owner/name")
    add("--file", type=Path, help="the text to read (default: Python's reference)")
    add("--tokens", type=tokens(), default=4096, help="length of the document (4096)")
    add("--memory-budget", help="bytes, or 16GB (default: a share of free memory)")
    return parser


def _status_of_a_difference(path: str) -> int:
    """0 when this device changes replies without any cache, and says so; else 1."""
    from .. import models
    from ..demo.workloads import default_text
    from ..verify import probe

    model, tokenizer = models.load(path)
    measured = probe(model, tokenizer.encode(default_text()[:4000]), step=512)
    if measured == 0:
        return 1
    print(
        f"On this device the way a prompt is sliced changes logits by {measured:.2g} with or without "
        "a cache. `mlx-hybridcache verify --exact` shows the mode in which every bit agrees."
    )
    return 0
