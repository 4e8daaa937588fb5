"""JSON that every reader takes. Python's own writes NaN, and text that is not Unicode."""

from __future__ import annotations

import json
from typing import Any

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
