"""Calibration tokens: the bundled texts or a file, cut into rows of one length."""

from __future__ import annotations

import pydoc_data.topics
import sysconfig
from pathlib import Path
from typing import Any

from ...errors import RouterError, refusal
from ..defaults import ROW_TOKENS, ROWS

LONGEST_TOKEN = 24
"""Characters: so much text is tokenized for each token wanted, and no more of a whole book."""

PIECE = 2000
"""Characters of prose and of code by turns, so that every row has both."""

SOURCES = ("argparse", "ast", "datetime", "decimal", "difflib", "json/decoder", "statistics")
"""Modules of the standard library whose source is the code."""


def calibration_tokens(
    tokenizer: Any,
    file: Path | None = None,
    *,
    rows: int = ROWS,
    row_tokens: int = ROW_TOKENS,
) -> list[list[int]]:
    """At most `rows` lists of `row_tokens` token ids each, from `file` or the bundled texts.

    The bundled texts are those that come with Python, its language reference and sources. Texts like
    those that the model will serve tell more about it.

    Raises `RouterError` for a file that cannot be read or is too short for two rows.
    """
    wanted = rows * row_tokens
    if file is None:
        text, source = bundled_text(), "the bundled text"
    else:
        source = str(file)
        try:
            with file.open(encoding="utf-8") as opened:
                text = opened.read(wanted * LONGEST_TOKEN)
        except (OSError, UnicodeDecodeError) as error:
            why = refusal(error) if isinstance(error, OSError) else f"{error.reason}."
            raise RouterError(f"--calibration {file} cannot be read as text: {why}") from error
    ids = [int(i) for i in tokenizer.encode(text[: wanted * LONGEST_TOKEN])]
    found = [ids[at : at + row_tokens] for at in range(0, wanted, row_tokens)]
    whole = [row for row in found if len(row) == row_tokens]
    if len(whole) < 2:
        raise RouterError(
            f"{source} has {len(ids):,} tokens; calibration needs at least {2 * row_tokens:,}, and "
            f"{wanted:,} were asked for. Give it a longer text."
        )
    return whole


def bundled_text() -> str:
    """Prose and code by turns, about a megabyte of it, the same for one version of Python."""
    topics: dict[str, str] = pydoc_data.topics.topics
    prose = "\n\n".join(topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    code = "\n\n".join((library / f"{name}.py").read_text(encoding="utf-8") for name in SOURCES)
    pieces = [
        text[at : at + PIECE]
        for at in range(0, max(len(prose), len(code)), PIECE)
        for text in (prose, code)
    ]
    return "\n\n".join(piece for piece in pieces if piece)
