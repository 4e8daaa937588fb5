"""Calibration tokens: the bundled texts or a file, cut into rows of one length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROWS = 32
"""Rows of calibration tokens; every second one is held out."""

ROW_TOKENS = 256


def calibration_tokens(
    tokenizer: Any,
    file: Path | None = None,
    *,
    rows: int = ROWS,
    row_tokens: int = ROW_TOKENS,
) -> list[list[int]]:
    """`rows` lists of `row_tokens` token ids each, from `file` or the bundled texts.

    Raises `RouterError` for a file that cannot be read or is too short for two rows.
    """
    raise NotImplementedError
