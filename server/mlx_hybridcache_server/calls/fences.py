"""Whether a place in a text stands in code, as Markdown has it: between fences, or in backticks."""

from __future__ import annotations

import re

MOST_HEAD = 64
"""Characters of a line's beginning that can make a fence of it."""

_BEGIN = re.compile(r"[\s>]*(`{3,}|~{3,})(.*)", re.DOTALL)
_RUN = re.compile(r"`+")


class Fences:
    """Follows a text as it is written."""

    def __init__(self) -> None:
        self._open = ""  # the fence
        self._head = ""  # of this line
        self._runs = 0  # of backticks in it
        self._ends_in_run = False

    @property
    def is_code(self) -> bool:
        """Whether what comes next stands in code."""
        return bool(self._open) or self._runs % 2 == 1

    def feed(self, text: str) -> None:
        """More of the text."""
        first, *lines = text.split("\n")
        self._more(first)
        for line in lines:
            self._end_line()
            self._more(line)

    def _more(self, text: str) -> None:
        if not text:
            return
        self._head += text[: MOST_HEAD - len(self._head)]
        goes_on = self._ends_in_run and text[0] == "`"
        self._runs += len(_RUN.findall(text)) - goes_on
        self._ends_in_run = text[-1] == "`"

    def _end_line(self) -> None:
        found = _BEGIN.fullmatch(self._head)
        if found is not None:
            fence, behind = found[1], found[2]
            if not self._open:
                self._open = fence if fence[0] == "~" or self._runs == 1 else ""
            elif fence.startswith(self._open) and not behind.strip():
                self._open = ""
        self._head, self._runs, self._ends_in_run = "", 0, False
