"""What in a text is not the same tomorrow, or in the next session: dates, ids, paths, billing lines.

Pure, and in time that grows with the text and no faster, whatever it holds: each pattern begins where it
cannot begin again within what it has read, or reads a bounded number of letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class VolatileSpan(NamedTuple):
    """The characters `[start, end)` of a text. `kind` is a key of `KINDS`. None crosses a line's end."""

    start: int
    end: int
    kind: str


_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?"
    r"|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)"
)
_WEEKDAY = r"(?:Mon|Tues?|Wed(?:nes)?|Thu(?:rs)?|Fri|Sat(?:ur)?|Sun)(?:day)?"
_YEAR = r"(?:19|20)\d\d"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?\b"
_ZONE = r"(?: ?(?:Z|UTC|GMT)\b)?(?: ?[+-]\d\d:?\d\d)?"
_CLOCK = (
    rf"(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:[.,]\d{{1,9}})?)?(?: ?[AaPp]\.?[Mm]\b\.?)?{_ZONE}"
)
_WITH_CLOCK = rf"(?:(?:,? (?:at )?|T){_CLOCK})?"
_HEX = "[0-9a-fA-F]"

KINDS: dict[str, str] = {
    # x-anthropic-billing-header: cc_version=2.1.197; cch=0a1b2;
    "billing": r"^[ \t]{0,8}[xX]-[\w-]{2,80}: ?[^\n]*",
    "uuid": rf"{_HEX}(?<![\w]{_HEX}){_HEX}{{7}}-(?:{_HEX}{{4}}-){{3}}{_HEX}{{12}}(?!\w)",
    # 2026-11-29T03:14:29Z, 29.11.2026, 29 November 2026; Sunday, November 29, 2026; Nov 29 03:14:29 UTC 2026
    "date": rf"\d(?<![\w.-]\d)(?:\d{{3}}(?P<a>[-/.])\d{{1,2}}(?P=a)\d{{1,2}}|\d?(?P<b>[-/.])\d{{1,2}}(?P=b){_YEAR})"
    rf"(?!\d){_WITH_CLOCK}"
    rf"|\d(?<!\w\d)\d?(?:st|nd|rd|th)?\.? (?:of )?{_MONTH}\b\.?(?:,? {_YEAR}\b)?{_WITH_CLOCK}"
    rf"|(?:{_WEEKDAY},? (?:the )?)?{_MONTH}\.? (?:{_DAY}(?:,? (?:{_CLOCK} )?{_YEAR}\b)?|{_YEAR}\b){_WITH_CLOCK}",
    # 03:14:29 UTC, 3:14 am, and seconds or milliseconds since 1970
    "time": rf"(?<![\w:.+-]){_CLOCK}(?![\w:])|(?<![\w.,-])1[5-9]\d{{8}}(?:\d{{3}})?(?![\w,-]|\.\d)",
    # where a system, or an agent, puts what one session needs
    "path": r"(?:[A-Za-z]:\\|[~/])(?<![\w.~/-][~/])(?P<path>[^\s\"'`<>|]+)",
    # session_id: V1StGXR8_Z5jdHi6B, ses_4f9cd1c26ffe, 64 digits of a hash
    "id": r"\b(?i:session|conversation|scratchpad|sandbox|request|trace|thread|run|task|workspace|message|tmp)"
    r"(?:(?i:[ _-]?(?:id|key|token|name|dir))?[\"'*`]{0,3} ?(?:[:=/#]|is) ?[\"'*`]{0,3}(?P<value>[\w.-]{6,128})"
    r"|[_-](?P<named>\w{8,128}))"
    r"|\b(?:ses|sess|msg|req|conv)[_-](?P<short>\w{8,128})"
    r"|(?<!\w)[0-9a-fA-F]{32,128}(?!\w)",
    # what git says of a working tree
    "git": r"^[ \t]{0,8}(?:- )?(?i:current |on |main )?[Bb]ranch\b[^:\n]{0,60}: ?[^\n]+"
    r"|^(?P<commit>[0-9a-f]{7,40}) [^\n]+|\b(?i:commit|head)(?: is at| at|:)? (?P<head>[0-9a-f]{7,40})\b",
}
"""Patterns by what they find. Where two find the same, the one that begins first, or goes on longest."""

_PATTERNS = {kind: re.compile(pattern, re.ASCII | re.MULTILINE) for kind, pattern in KINDS.items()}

_PROMISING = re.compile("[0-9]|[Bb]ranch")
"""What every line has that a pattern finds anything in: most lines have none of it."""

_SHORT_LIVED = re.compile(
    r"^(?:private[/\\])?(?:tmp|var[/\\](?:tmp|folders)|run[/\\]user)[/\\]"
    r"|[/\\]temp[/\\]|scratch|session|sandbox|worktrees?[/\\]",
    re.IGNORECASE,
)

_DRAWN = ("value", "named", "short", "commit", "head", "path")
"""Groups that hold what somebody drew, or hashed: a word in their place has no digit."""


def volatile_spans(text: str) -> Iterator[VolatileSpan]:
    """Each of them, from left to right, none overlapping with another. What comes first is found first."""
    end = 0
    while promising := _PROMISING.search(text, end):
        start = text.rfind("\n", end, promising.start()) + 1 or end
        end = text.find("\n", promising.end())
        end = len(text) if end < 0 else end
        yield from _apart(
            sorted(_found(text, start, end), key=lambda span: (span.start, -span.end))
        )


def _found(text: str, start: int, end: int) -> Iterator[VolatileSpan]:
    for kind, pattern in _PATTERNS.items():
        for match in pattern.finditer(text, start, end):
            if _is_volatile(match):
                yield VolatileSpan(*match.span(), kind)


def _is_volatile(match: re.Match[str]) -> bool:
    groups = match.groupdict()
    drawn = next((groups[name] for name in _DRAWN if groups.get(name)), None)
    if drawn is not None and not any(map(str.isdigit, drawn)):
        return False
    path = groups.get("path")
    return path is None or _SHORT_LIVED.search(path) is not None


def _apart(spans: list[VolatileSpan]) -> Iterator[VolatileSpan]:
    reached = 0
    for span in spans:
        if span.start >= reached:
            yield span
            reached = span.end
