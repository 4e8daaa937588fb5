"""Formats of calls that look like XML: names in tags, and values as plain text between them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .lark import Lark, literal
from .named_values import NamedValue, bare_texts, named_values, unwritable
from .narrowing import Schema, closed
from .object_calls import object_call
from .speech import Tool, name_of

OTHER_TYPES = ("array", "boolean", "integer", "null", "number", "object")


@dataclass(frozen=True, slots=True)
class MarkupCalls:
    """One such format. `call` and `parameter` are what stands in front of a name and behind it.

    `begin` follows the marker that begins calls; a value stands between `before_value` and `close`,
    and `end` ends a call. A `#` in a tag is any number. `inner` are the
    tags that no value may hold; `marks` may be tokens of their own. `is_shared`: several calls stand
    between one pair of markers. `has_lines`: a line may break behind each tag. `has_types`: a tag
    names its value's type. `has_cdata`: what is no plain word stands in CDATA. `has_objects`: a call
    without arguments is written as an object, because mlx-lm reads no other.
    """

    call: tuple[str, str]
    parameter: tuple[str, str]
    close: str
    before_value: str = ""
    end: str = ""
    begin: str = ""
    inner: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    unwritable: str = r"\s<>"
    is_shared: bool = False
    has_lines: bool = False
    has_types: bool = False
    has_cdata: bool = False
    has_objects: bool = False

    has_bare_values = True

    def calls(self, lark: Lark, tools: Sequence[Tool], most: int | None) -> str:
        """What a reply that calls may be. Raises `GrammarError` for a name that no tag can hold."""
        start = f"{lark.marker(lark.speech.call_start or '')} {self._tags(lark, self.begin)}"
        end = lark.marker(lark.speech.call_end or "")
        calls = " | ".join(self._call(lark, tool) for tool in tools)
        if self.is_shared:
            return f"{start} {lark.several(calls, most, '')} {end}"
        return lark.several(f"{start} ({calls}) {end}", most)

    def _call(self, lark: Lark, tool: Tool) -> str:
        name, is_lenient = name_of(tool), name_of(tool) in lark.lenient
        values = named_values(tool, is_lenient=is_lenient)
        if self.has_objects and not values:
            return object_call(lark, tool)
        parts = [self._opened(lark, self.call, name)]
        for value in values:
            part = (
                f"{self._parameter(lark, value)} {self._value(lark, value, is_lenient=is_lenient)}"
            )
            parts.append(part if value.is_required else f"({part})?")
        return " ".join([*parts, self._tags(lark, self.end)])

    def _opened(self, lark: Lark, tag: tuple[str, str], name: str) -> str:
        if not re.fullmatch(f"[^{self.unwritable}]+", name):
            raise unwritable(name)
        before, behind = tag
        return f"{self._tags(lark, before + name)} {self._numbered(lark, behind)} {self._line}"

    def _numbered(self, lark: Lark, text: str) -> str:
        """A text with `#` where a number stands."""
        parts = [self._tags(lark, part) for part in text.split("#")]
        return " /[1-9][0-9]{0,3}/ ".join(parts)

    def _parameter(self, lark: Lark, value: NamedValue) -> str:
        if not self.has_types:
            head = self._opened(lark, self.parameter, value.name)
            return f"{head} {self._tags(lark, self.before_value)}"
        before, behind = self.parameter
        head = self._opened(lark, (before, '" type="'), value.name)
        kinds = " | ".join(map(literal, _types(value.schema)))
        return f"{head} ({kinds}) {self._tags(lark, behind)}"

    def _value(self, lark: Lark, value: NamedValue, *, is_lenient: bool) -> str:
        bare = bare_texts(value.schema)
        if lark.is_exact and bare is None:
            written = lark.json(closed(value.schema), is_lenient=is_lenient)
            return f"{written} {self._tags(lark, self.close)} {self._line}"
        if lark.is_exact and bare:
            among = " | ".join(literal(self._in_cdata(each)) for each in bare)
            return f"({among}) {self._tags(lark, self.close)} {self._line}"
        return f"{self._text(lark, is_plain=lark.is_exact)} {self._line}"

    def _text(self, lark: Lark, *, is_plain: bool) -> str:
        """Any text and what closes it."""
        held_back = (*self.inner, lark.speech.call_end)
        if not (self.has_cdata and is_plain):
            return lark.ended(lark.free(*held_back), self.close, self.marks)
        word = lark.terminal(r"/([^\s<&]([^<&\n]*[^\s<&])?)?/")
        any_text = lark.ended(lark.free("]]>", *held_back), "]]>")
        in_cdata = f'"<![CDATA[" {any_text}'
        return f"({word} | {in_cdata}) {literal(self.close)}"

    def _in_cdata(self, text: str) -> str:
        is_word = text == text.strip() and not set(text) & set("<&\n")
        return text if is_word or not self.has_cdata else f"<![CDATA[{text}]]>"

    def _tags(self, lark: Lark, text: str) -> str:
        return lark.tags(text, self.marks) if text else ""

    @property
    def _line(self) -> str:
        return '"\\n"?' if self.has_lines else ""


def _types(schema: Schema) -> tuple[str, ...]:
    """The names of types under which a value may be written: whatever is no text is read as JSON."""
    if bare_texts(schema) is not None:
        return ("string",)
    kind = schema.get("type")
    return (kind,) if kind in OTHER_TYPES else OTHER_TYPES
