"""Gemma's formats of calls: like JSON, with bare keys, and strings between marks of their own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .gemma_values import GemmaValues
from .lark import Lark, literal
from .named_values import named_values, unwritable
from .speech import Tool, name_of


@dataclass(frozen=True, slots=True)
class GemmaCalls:
    """`call:name{key:value,...}`, each between markers; `mark` stands on both sides of a string."""

    mark: str

    has_bare_values = False

    def calls(self, lark: Lark, tools: Sequence[Tool], most: int | None) -> str:
        """What a reply that calls may be. Raises `GrammarError` for what this format cannot say."""
        start, end = lark.marker(lark.speech.call_start or ""), lark.speech.call_end or ""
        if not lark.is_exact:
            return lark.several(f"{start} {self._anything(lark, end)}", most)
        calls = " | ".join(self._call(lark, tool, end) for tool in tools)
        return lark.several(f"{start} ({calls}) {lark.marker(end)}", most)

    def _anything(self, lark: Lark, end: str) -> str:
        """Up to the end: strings have none of the markers in either grammar."""
        mark = lark.speech.token_of(self.mark)
        return lark.until(end) if mark is None else f"({lark.free(end)} {mark})* {lark.until(end)}"

    def _call(self, lark: Lark, tool: Tool, end: str) -> str:
        name, is_lenient = name_of(tool), name_of(tool) in lark.lenient
        if not re.fullmatch(r"[\w-]+", name):
            raise unwritable(name)
        items = []
        for each in named_values(tool, is_lenient=is_lenient):
            values = GemmaValues(lark, self.mark, end, is_lenient=is_lenient)
            items.append((values.entry(each.name, each.schema), each.is_required))
        return f'{literal(f"call:{name}{{")} {lark.listed(items, ",")} "}}"'
