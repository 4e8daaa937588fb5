"""JSON that every reader takes. Python's own writes NaN, and text that is not Unicode."""

from __future__ import annotations

import json
import re
from typing import Any

HALF = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair, which is no character. Texts have some where a client cut them."""

COMPACT = (",", ":")


def strict(value: Any, separators: tuple[str, str] = (", ", ": ")) -> str:
    """`value` as JSON. Raises `ValueError` for NaN and infinities."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=separators)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair: as an escape it is JSON
        text = json.dumps(value, allow_nan=False, separators=separators)
    return text


def check(text: str) -> None:
    """Raises `ValueError` for text that is not JSON."""
    json.loads(text, parse_constant=_refused)


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def without_halves(value: Any) -> Any:
    """`value` with U+FFFD for every half of a character, as a decoder of text would write it."""
    if isinstance(value, str):
        return HALF.sub("\ufffd", value)
    if isinstance(value, list):
        return [without_halves(each) for each in value]
    if isinstance(value, dict):
        return {without_halves(key): without_halves(each) for key, each in value.items()}
    return value
