"""What kind of thing changed where a prompt parted ways with what is stored."""

from __future__ import annotations

import re

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_DAY = r"(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?"

KINDS: dict[str, str] = {
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "date": rf"\d{{4}}[-/.]\d{{1,2}}[-/.]\d{{1,2}}(?:[t ]\d{{2}}:\d{{2}}(?::\d{{2}}(?:\.\d+)?)?(?:z|[+-]\d{{2}}:?\d{{2}})?)?"
    rf"|\d{{1,2}}[-/.]\d{{1,2}}[-/.]\d{{2,4}}|\b{_MONTH} \d{{1,2}}(?:, ?\d{{4}})?|\b\d{{1,2}}\.? {_MONTH}(?: \d{{4}})?|\b{_DAY}\b",
    "time": r"\d{1,2}:\d{2}(?::\d{2})?(?: ?[ap]m)?",
    "hex": r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{8,}\b",
    "number": r"[-+]?\d+(?:[.,]\d+)*",
}
"""Patterns by kind, the most particular first."""

_PATTERNS = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in KINDS.items()}


def kind_of_change(before: str, asked: str, stored: str) -> str | None:
    """The kind that stands across the place of change in both texts, or None.

    `before` is common to both, `asked` and `stored` are how they go on.
    """
    at = len(before)
    for kind, pattern in _PATTERNS.items():
        if all(_covers(pattern, before + after, at) for after in (asked, stored)):
            return kind
    return None


def _covers(pattern: re.Pattern[str], text: str, at: int) -> bool:
    """Whether a match holds the character at `at`, or ends there: 9 became 10."""
    return any(match.start() <= at <= match.end() for match in pattern.finditer(text))
