"""JSON schemas as grammars of Gemma's values, which llguidance has none of."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .lark import Lark, literal, none_of
from .named_values import unwritable
from .narrowing import Schema, closed, without_notes
from .speech import GrammarError

_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_FOLLOWED = {
    "string": frozenset({"minLength", "maxLength"}),
    "integer": _BOUNDS,
    "number": _BOUNDS,
    "boolean": frozenset[str](),
    "null": frozenset[str](),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "object": frozenset({"properties", "required", "additionalProperties"}),
}
"""Keywords beside its type that the values of each type are held to."""

_SHARED = frozenset({"$defs", "definitions"})
_ANY = ("string", "number", "boolean", "null", "array", "object")


@dataclass(eq=False)
class GemmaValues:
    """Writes the values of one parameter into a grammar."""

    lark: Lark
    mark: str
    end: str
    is_lenient: bool = field(kw_only=True)
    _root: Schema = field(default_factory=dict)
    _rules: dict[str, str] = field(default_factory=dict)

    def entry(self, name: str, schema: Schema) -> str:
        """A parameter with what it may be. Raises `GrammarError` for a keyword that cannot be followed."""
        self._root = closed(without_notes(schema))
        try:
            return self._entry(name, self._root)
        except (AttributeError, TypeError) as error:  # a keyword's value may be anything
            raise GrammarError(f"The schema of {name!r} has a keyword of a wrong type") from error

    def _entry(self, name: str, schema: Any) -> str:
        if not re.fullmatch(r"\w+", name):
            raise unwritable(name)
        return f"{literal(name + ':')} {self._of(schema)}"

    def _of(self, schema: Any) -> str:
        """The rule of a schema."""
        if not isinstance(schema, dict):
            schema = {} if schema else {"enum": []}
        schema = {key: part for key, part in schema.items() if key not in _SHARED}
        key = json.dumps(schema, sort_keys=True)
        if key not in self._rules:
            self._rules[key] = name = self.lark.named()  # before it is written: it may hold itself
            self.lark.define(name, self._body(schema))
        return self._rules[key]

    def _body(self, schema: Schema) -> str:
        among = next((word for word in ("$ref", "const", "enum", "anyOf") if word in schema), None)
        if among is None:
            kinds = self._kinds(schema)
            self._check(schema, {"type"}.union(*(_FOLLOWED[kind] for kind in kinds)))
            return " | ".join(self._written(kind, schema) for kind in kinds)
        self._check(schema, {among, "type"} if among in ("const", "enum") else {among})
        if among == "$ref":
            return self._of(self._target(schema["$ref"]))
        if among == "anyOf":
            return " | ".join(map(self._of, schema["anyOf"]))
        values = [schema["const"]] if among == "const" else schema["enum"]
        if not values:
            raise GrammarError("A parameter that may have no value at all cannot be written")
        return " | ".join(map(self._data, values))

    def _check(self, schema: Schema, followed: set[str]) -> None:
        if (unknown := sorted(schema.keys() - followed)) and not self.is_lenient:
            raise GrammarError(f"{unknown[0]!r} cannot be kept to in this model's format of calls")

    def _kinds(self, schema: Schema) -> Sequence[str]:
        kinds = schema.get("type")
        if kinds is None:
            of_keyword = {"properties": "object", "items": "array"}
            kinds = [kind for word, kind in of_keyword.items() if word in schema] or _ANY
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if unknown := [kind for kind in kinds if kind not in _FOLLOWED]:
            raise GrammarError(f"{unknown[0]!r} is no type of JSON")
        return list(kinds)

    def _target(self, reference: Any) -> Any:
        found: Any = self._root
        for part in str(reference).removeprefix("#/").split("/"):
            found = found.get(part) if isinstance(found, dict) else None
        if found is None:
            raise GrammarError(f"{reference!r} is not in this schema")
        return found

    # By type

    def _written(self, kind: str, schema: Schema) -> str:
        if kind == "string":
            least, most = schema.get("minLength", 0), schema.get("maxLength", "")
            return self._string(f"/(?s:.{{{least},{most}}})/{none_of(self.mark, self.end)}")
        if kind == "array":
            return self._array(schema)
        if kind == "object":
            return self._object(schema)
        own = {key: schema[key] for key in _FOLLOWED[kind] & schema.keys()}
        return self.lark.json({"type": kind, **own})

    def _string(self, body: str) -> str:
        text = self.lark.terminal(body)
        return f"{self.lark.marker(self.mark)} {self.lark.ended(text, self.mark)}"

    def _array(self, schema: Schema) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return '"[]"'
        item = self._of(schema.get("items", {}))
        last = "" if most is None else most - 1
        several = f'{item} ("," {item}){{{max(least - 1, 0)},{last}}}'
        return f'"[" {several} "]"' if least else f'"[" ({several})? "]"'

    def _object(self, schema: Schema) -> str:
        names, required = schema.get("properties") or {}, schema.get("required") or []
        if unnamed := [name for name in required if name not in names]:
            raise GrammarError(f"{unnamed[0]!r} is required and has no schema")
        if names:
            items = [(self._entry(name, each), name in required) for name, each in names.items()]
            return f'"{{" {self.lark.listed(items, ",")} "}}"'
        more = schema.get("additionalProperties", True)
        if more is False:
            return '"{}"'
        key = self.lark.terminal("/[A-Za-z_][A-Za-z0-9_]{0,63}/")
        entry = f'{key} ":" {self._of(more)}'
        return f'"{{" ({entry} ("," {entry})*)? "}}"'

    def _data(self, value: Any) -> str:
        """One value as it is written."""
        if isinstance(value, str):
            if self.mark in value or self.end in value:
                raise GrammarError(f"{value!r} holds a marker of this model's replies")
            mark = self.lark.marker(self.mark)
            return f"{mark} {literal(value)} {mark}" if value else f"{mark} {mark}"
        if isinstance(value, list):
            inner = ' "," '.join(map(self._data, value))
            return f'"[" {inner} "]"'
        if isinstance(value, dict):
            entries = [f"{literal(f'{key}:')} {self._data(each)}" for key, each in value.items()]
            return f'"{{" {""" "," """.join(entries)} "}}"'
        return literal(json.dumps(value))
