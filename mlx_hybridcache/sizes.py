"""Sizes in bytes and lengths in tokens, as people write them; shown in binary units throughout.

Our own, as no well-kept library has these rules: humanfriendly has seen no release since 2021, humanize only
writes, pint takes longer to import than `cache ls` takes in all, and pydantic's `ByteSize` reads 16Gbit too;
and none of them reads tokens.
"""

from __future__ import annotations

import math
import re

from .errors import SettingError

_UNITS = {"": 1} | {
    letter + suffix: factor**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, factor in (("", 1000), ("b", 1000), ("ib", 1024))
}
_UNITS["b"] = 1


def parse_bytes(size: int | str) -> int:
    """Bytes from a number or from text: "16GB" or "16G" (decimal), "16GiB" (binary), "4096".

    Raises `SettingError` for anything else, and for negative sizes.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size).lower())
    bytes_ = float(found[1]) * _UNITS.get(found[2], math.nan) if found is not None else math.nan
    if not math.isfinite(bytes_):
        raise SettingError(
            f"{size!r} is not a size; write bytes or a unit, such as 16GB or 512MiB."
        )
    return int(bytes_)


def parse_tokens(length: str) -> int:
    """Tokens from text: "4096", "4,096", "120k" and "1.5M" (thousands and millions), "128Ki" (1,024s).

    Raises `SettingError` for anything else, and for parts of a token.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([km]i?)?\s*", re.sub(r"[,_]", "", length).lower())
    unit = found[2] or "" if found is not None else ""
    tokens = float(found[1]) * _UNITS[unit + "b" * bool(unit)] if found is not None else math.nan
    if not tokens.is_integer():
        raise SettingError(f"{length!r} is no number of tokens; write one as 4096 or 120k.")
    return int(tokens)


def format_bytes(size: int) -> str:
    """A size for people, in binary units."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"
