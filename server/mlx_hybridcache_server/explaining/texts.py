"""What kind of thing differs between two texts, at the first letter that does."""

from __future__ import annotations

import re

from ..generation.changes import kind_of_change
from ..prompts.volatile import volatile_spans
from .kinds import Kind

BEFORE, BEHIND = 512, 256
"""Letters of a text around the place where it differs that are looked at."""

NAMED = {
    "billing": Kind.ATTRIBUTION,
    "uuid": Kind.ID,
    "date": Kind.DATE,
    "time": Kind.DATE,
    "path": Kind.PATH,
    "id": Kind.ID,
    "hex": Kind.ID,
    "git": Kind.REPOSITORY,
    "number": Kind.NUMBER,
}
"""By what prompts call a volatile span, and `/v1/cache/recent` a change."""

PATH = re.compile(r"(?:^|[\s\"'`(=:])(?:[A-Za-z]:)?[~.]{0,2}[/\\][^\s\"'`]*$")
"""A path up to a place within it."""


def common_letters(one: str, other: str) -> int:
    """The length of what both begin with: by halves, as slices are compared at once."""
    same, length = 0, min(len(one), len(other))
    while same < length:
        half = (same + length + 1) // 2
        if one[same:half] == other[same:half]:
            same = half
        else:
            length = half - 1
    return same


def kind_between(one: str, other: str) -> Kind | None:
    """The kind of thing that stands in both texts where they differ first; None for any other text."""
    at = common_letters(one, other)
    start = max(0, at - BEFORE)
    start = max(start, one.rfind("\n", start, at) + 1)  # the line that it stands in
    before, behind = one[start:at], (one[at : at + BEHIND], other[at : at + BEHIND])
    first, second = (_spans_at(before + text, at - start) for text in behind)
    for kind in first:
        if kind in second:
            return NAMED[kind]
    if PATH.search(before) and all(text[:1].strip() for text in behind):
        return Kind.PATH
    changed = kind_of_change(before, *behind)
    return None if changed is None else NAMED[changed]


def _spans_at(text: str, at: int) -> list[str]:
    """The kinds of volatile spans that hold the letter at `at`, or end there."""
    return [span.kind for span in volatile_spans(text) if span.start <= at <= span.end]
