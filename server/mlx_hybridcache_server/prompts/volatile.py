"""What in a text is not the same tomorrow, or in the next session: dates, ids, paths, billing lines.

Pure, and in time that grows with the text and no faster, whatever it holds: each pattern begins where it
cannot begin again within what it has read, or reads a bounded number of letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple


class VolatileSpan(NamedTuple):
    """The characters `[start, end)` of a text. `kind` is a key of `KINDS`. None crosses a line's end."""

    start: int
    end: int
    kind: str


def _word(*words: str) -> str:
    """Any of the words, where a word begins; their first letters stand first in the pattern."""
    letters = "".join(sorted({word[0].lower() + word[0].upper() for word in words}))
    rest = "|".join(f"(?<=[{word[0].lower()}{word[0].upper()}]){word[1:]}" for word in words)
    return rf"[{letters}](?<!\w.)(?i:{rest})"


_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?"
    r"|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)"
)
_WEEKDAY = (
    r"(?:Mon(?:day)?|Tue(?:s(?:day)?)?|Wed(?:nesday)?|Thu(?:r?s(?:day)?)?|Fri(?:day)?"
    r"|Sat(?:urday)?|Sun(?:day)?)"
)
_YEAR = r"(?:19|20)\d\d"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_ZONE = r"(?: ?(?:Z|UTC|GMT)\b)?(?: ?[+-]\d\d:?\d\d)?"
_MINUTES = rf":[0-5]\d(?::[0-5]\d(?:[.,]\d{{1,9}})?)?(?: ?[AaPp]\.?[Mm]\b\.?)?{_ZONE}"
_WITH_CLOCK = rf"(?:(?:,? (?:at )?|T)\d\d?{_MINUTES})?"
_DAY_MONTH = rf"(?:st|nd|rd|th)?\.? (?:of )?{_MONTH}\b\.?(?:,? {_YEAR}\b)?{_WITH_CLOCK}"
_MONTH_DAY = rf"\.? (?:{_DAY}\b(?:,? (?:\d\d?{_MINUTES} )?{_YEAR}\b)?|{_YEAR}\b){_WITH_CLOCK}"
_HEX = "[0-9a-fA-F]"
_NAMES = ("session", "conversation", "scratchpad", "sandbox", "request", "trace", "thread", "run")
_MORE_NAMES = ("task", "workspace", "message", "tmp")

KINDS: dict[str, tuple[str, ...]] = {
    # x-anthropic-billing-header: cc_version=2.1.197; cch=0a1b2;
    "billing": (r"^[ \t]{0,8}[xX]-[\w-]{2,80}: ?[^\n]*",),
    "uuid": (rf"{_HEX}(?<!\w.){_HEX}{{7}}-(?:{_HEX}{{4}}-){{3}}{_HEX}{{12}}(?!\w)",),
    "date": (
        # 2026-11-29T03:14:29Z, 29.11.2026, 29 November 2026
        (
            r"\d(?<![\w.-].)(?:(?:\d{3}(?P<a>[-/.])\d{1,2}(?P=a)\d{1,2}"
            rf"|\d?(?P<b>[-/.])\d{{1,2}}(?P=b){_YEAR})(?!\d){_WITH_CLOCK}|\d?{_DAY_MONTH})"
        ),
        # November 29, 2026, 3:14 pm; Nov 29 03:14:29 UTC 2026
        rf"{_MONTH}{_MONTH_DAY}",
        # Sunday, November 29, 2026
        rf"{_WEEKDAY},? (?:the )?(?:{_MONTH}{_MONTH_DAY}|\d\d?{_DAY_MONTH})",
    ),
    # 03:14:29 UTC, 3:14 am, and seconds or milliseconds since 1970
    "time": (
        rf"\d(?<![\w:.,+-].)(?:\d?{_MINUTES}(?![\w:])|(?<=1)[5-9]\d{{8}}(?:\d{{3}})?(?![\w,-]|\.\d))",
    ),
    # where a system, or an agent, puts what one session needs
    "path": (r"(?:(?<![\w.~/\\-])[~/]|(?<!\w)[A-Za-z]:\\)(?P<path>[^\s\"'`<>|]+)",),
    "id": (
        # session_id: V1StGXR8_Z5jdHi6B
        (
            rf"{_word(*_NAMES, *_MORE_NAMES)}(?:(?i:[ _-]?(?:id|key|token|name|dir))?[\"'*`]{{0,3}} ?"
            r"(?:[:=/#]|is) ?[\"'*`]{0,3}(?P<value>[\w.-]{6,128})|[_-](?P<named>\w{8,128}))"
        ),
        # ses_4f9cd1c26ffe
        rf"{_word('ses', 'sess', 'msg', 'req', 'conv')}[_-](?P<short>\w{{8,128}})",
        # 64 digits of a hash
        rf"{_HEX}(?<!\w.){_HEX}{{31,127}}(?!\w)",
    ),
    # what git says of a working tree
    "git": (
        r"^[ \t]{0,8}(?:- )?(?i:current |on |main )?[Bb]ranch\b[^:\n]{0,60}: ?[^\n]+",
        r"^(?P<commit>[0-9a-f]{7,40}) [^\n]+",
        rf"{_word('commit', 'head')}(?: is at| at|:)? (?P<head>[0-9a-f]{{7,40}})\b",
    ),
}
"""Patterns by what they find: `re` skips fast to a letter of the class that one begins with. Where two
find the same, the one counts that begins first, or goes on longest."""

_START = "^"
"""What a pattern begins with that is for the start of a line."""


@cache
def _patterns(*, of_lines: bool) -> list[tuple[str, re.Pattern[str]]]:
    """Those for the start of a line, or those for anywhere. They are compiled with the first text that is looked through."""
    return [
        (kind, re.compile(pattern.removeprefix(_START), re.ASCII))
        for kind, patterns in KINDS.items()
        for pattern in patterns
        if pattern.startswith(_START) == of_lines
    ]


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
        spans = sorted(_found(text, start, end), key=lambda span: (span.start, -span.end))
        yield from _apart(spans)


def _found(text: str, start: int, end: int) -> Iterator[VolatileSpan]:
    """What is in one line."""
    for kind, pattern in _patterns(of_lines=True):
        if (line := pattern.match(text, start, end)) and _is_volatile(line):
            yield VolatileSpan(*line.span(), kind)
    for kind, pattern in _patterns(of_lines=False):
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
