"""Formats of calls whose arguments are one JSON object."""

from __future__ import annotations

import json
import keyword
from collections.abc import Sequence
from dataclasses import dataclass

from .lark import Lark, literal, pattern
from .named_values import named_values, unwritable
from .narrowing import closed
from .speech import Tool, name_of, parameters_of


def arguments(lark: Lark, tool: Tool) -> str:
    """All arguments of a call as JSON."""
    is_lenient = name_of(tool) in lark.lenient
    return lark.json(closed(parameters_of(tool)), is_lenient=is_lenient)


def object_call(lark: Lark, tool: Tool) -> str:
    """`{"name": ..., "arguments": {...}}`."""
    name = pattern(json.dumps(name_of(tool), ensure_ascii=False))
    return rf'/\{{"name": ?{name}, ?"arguments": ?/ {arguments(lark, tool)} "}}"'


@dataclass(frozen=True, slots=True)
class ObjectCalls:
    """`{"name": ..., "arguments": {...}}`, each between markers of its own."""

    has_bare_values = False

    def calls(self, lark: Lark, tools: Sequence[Tool], most: int | None) -> str:
        """What a reply that calls may be."""
        start, end = lark.marker(lark.speech.call_start or ""), lark.speech.call_end or ""
        if not lark.is_exact:
            return lark.several(f"{start} {lark.until(end)}", most)
        calls = " | ".join(object_call(lark, tool) for tool in tools)
        return lark.several(f"{start} SPACE? ({calls}) SPACE? {lark.marker(end)}", most)


@dataclass(frozen=True, slots=True)
class MistralCalls:
    """`[{...}, {...}]` or `name[ARGS]{...}` behind a marker; nothing ends the calls."""

    has_bare_values = False

    def calls(self, lark: Lark, tools: Sequence[Tool], most: int | None) -> str:
        """What a reply that calls may be."""
        start = lark.marker(lark.speech.call_start or "")
        if not lark.is_exact:
            return f"{start} (/(?s:.+)/ | <[*]>)*"
        if lark.speech.has_headers:
            calls = " | ".join(
                f"{literal(name_of(tool))} {lark.marker('[ARGS]')} {arguments(lark, tool)}"
                for tool in tools
            )
            return lark.several(f"{start} ({calls})", most)
        call = lark.rule(" | ".join(object_call(lark, tool) for tool in tools))
        more = "" if most == 1 else f" (/, ?/ {call})*"
        return f'{start} SPACE? "[" {call}{more} "]"'


@dataclass(frozen=True, slots=True)
class NumberedCalls:
    """Kimi K2's `functions.name:0`, a marker and the arguments, each between further markers."""

    has_bare_values = False
    begin = "<|tool_call_begin|>"
    behind_name = "<|tool_call_argument_begin|>"
    end = "<|tool_call_end|>"

    def calls(self, lark: Lark, tools: Sequence[Tool], most: int | None) -> str:
        """What a reply that calls may be."""
        start, end = lark.marker(lark.speech.call_start or ""), lark.speech.call_end or ""
        calls = " | ".join(self._call(lark, tool, end) for tool in tools)
        several = lark.several(f"{lark.marker(self.begin)} ({calls})", most, "")
        return f"{start} {several} {lark.marker(end)}"

    def _call(self, lark: Lark, tool: Tool, end: str) -> str:
        head = f"{literal(f'functions.{name_of(tool)}:')} /[0-9]{{1,4}}/ {lark.marker(self.behind_name)}"
        if lark.is_exact:
            return f"{head} {arguments(lark, tool)} {lark.marker(self.end)}"
        return f"{head} {lark.until(self.end, end)}"


@dataclass(frozen=True, slots=True)
class PythonicCalls:
    """`[name(key=value, ...), ...]`: values are JSON, which mlx-lm reads as Python's literals."""

    has_bare_values = False

    def calls(self, lark: Lark, tools: Sequence[Tool], most: int | None) -> str:
        """What a reply that calls may be. Raises `GrammarError` for a name that is none in Python."""
        start, end = lark.marker(lark.speech.call_start or ""), lark.speech.call_end or ""
        if not lark.is_exact:
            return f"{start} {lark.until(end)}"
        call = " | ".join(self._call(lark, tool) for tool in tools)
        return f'{start} "[" {lark.several(call, most, literal(", "))} "]" {lark.marker(end)}'

    def _call(self, lark: Lark, tool: Tool) -> str:
        name, is_lenient = name_of(tool), name_of(tool) in lark.lenient
        if not all(map(_is_identifier, name.split("."))):
            raise unwritable(name)
        items = []
        for value in named_values(tool, is_lenient=is_lenient):
            if not _is_identifier(value.name):
                raise unwritable(value.name)
            written = lark.json(closed(value.schema), is_lenient=is_lenient)
            items.append((f"{literal(value.name + '=')} {written}", value.is_required))
        return f'{literal(name + "(")} {lark.listed(items, ", ")} ")"'


def _is_identifier(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)
