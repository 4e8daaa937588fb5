"""What a value that was written as plain text means, by the whole schema of its parameter.

Formats of calls that look like XML write a string as it is and other values as JSON, so that only the
schema tells the string `null` from nothing. Numbers are never computed with: as they are written,
they are sent.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

from ..jsontext import strict
from .json_reader import MOST_DIGITS, normal, quoted

MOST_LITERAL = 4096
"""Characters of a value that is read as Python's when it is not JSON."""

MOST_SCHEMAS = 50
"""Of those within each other that are looked at for one value."""

KINDS = ("null", "boolean", "integer", "number", "array", "object", "string")
_NAMES = {
    "str": "string",
    "text": "string",
    "varchar": "string",
    "char": "string",
    "int": "integer",
    "long": "integer",
    "float": "number",
    "double": "number",
    "bool": "boolean",
    "dict": "object",
    "list": "array",
    "tuple": "array",
    "none": "null",
}
"""Types under the names that programs give them; schemas written by hand have them."""

_ANY = object()
_WHOLE = re.compile(r"([+-]?)0*([0-9]+)(\.0*)?")


class Parameters:
    """The parameters of one function that was offered."""

    def __init__(self, schema: Any):
        self._root = schema if isinstance(schema, dict) else {}
        self._found: dict[str, Parameter] = {}

    @cached_property
    def properties(self) -> dict[str, Any]:
        """The schema of each, by name. Looked for when one is called, as many may be offered."""
        return _properties(self._root, self._root)

    @cached_property
    def longest_name(self) -> int:
        """Characters."""
        return max(map(len, self.properties), default=0)

    def __getitem__(self, name: str) -> Parameter:
        if name not in self.properties:
            extra = self._root.get("additionalProperties")
            return Parameter(extra if isinstance(extra, dict) else {}, self._root)
        if name not in self._found:
            self._found[name] = Parameter(self.properties[name], self._root)
        return self._found[name]

    def reread(self, arguments: str) -> str:
        """Arguments that another reader found, as JSON.

        Texts where none is allowed are read again.
        """
        found = json.loads(arguments)
        if not isinstance(found, dict):
            return arguments
        parts = [f"{quoted(name)}: {self[name].reread(value)}" for name, value in found.items()]
        return f"{{{', '.join(parts)}}}"


class Parameter:
    """What one parameter may be. `root` is where references in its schema begin."""

    def __init__(self, schema: Any, root: dict[str, Any]):
        self._schema = schema
        self._root = root
        may_be = [kind for kind in KINDS if self._allows(kind, _ANY)]
        self._may_be_text = "string" in may_be or not may_be
        self._is_any = len(may_be) == len(KINDS)
        self.is_text = may_be == ["string"]
        # One of a few texts may have white space around it that means nothing.
        self.is_free_text = self.is_text and self._allows("string", "\x00 none of a few")

    def read(self, raw: str) -> str:
        """`raw` as JSON. What is none of what the schema allows stays text, for the client to refuse."""
        if self.is_free_text:
            return quoted(raw)
        for kind, text in self._readings(raw):
            if self._allows(kind, _value(text)):
                return text
        return quoted(raw)

    def reread(self, value: Any) -> str:
        """A value that another reader made of the text, as JSON."""
        if isinstance(value, str) and not self._may_be_text:
            return self.read(value)
        return strict(value)

    def _readings(self, raw: str) -> list[tuple[str, str]]:
        """What `raw` can be, with its kind, the more particular first."""
        strings = [("string", quoted(raw)), ("string", quoted(raw.strip()))]
        if self.is_text:
            return strings
        found = []
        text = normal(raw, words=not self._may_be_text)
        if text is not None:
            kind = _kind(text)
            # Where a text may stand as it is, quotes are part of it, and None is a word.
            is_plain = kind == "string" or raw.strip() in ("True", "False", "None")
            if not is_plain or not self._may_be_text or (self._is_any and kind == "string"):
                found.append((kind, text))
        if not self._may_be_text:
            found += _meant(raw.strip())
        return found + strings

    def _allows(self, kind: str, value: Any) -> bool:
        return _allows(self._schema, self._root, kind, value, {})


def _allows(
    schema: Any, root: dict[str, Any], kind: str, value: Any, known: dict[int, bool], depth: int = 0
) -> bool:
    """Whether a value of this kind may stand here, as far as types, `enum` and `const` say.

    `known` has what was found out already: a schema may refer to itself, and to others many times.
    """
    if not isinstance(schema, dict):
        return schema is not False
    if id(schema) in known:
        return known[id(schema)]
    known[id(schema)] = False  # a schema that refers to itself allows nothing by that
    if depth > MOST_SCHEMAS:
        return True

    def within(part: Any) -> bool:
        return _allows(part, root, kind, value, known, depth + 1)

    allowed = _has_type(schema, kind) and _is_among(schema, kind, value)
    if allowed and "$ref" in schema and (target := _target(schema["$ref"], root)) is not None:
        allowed = within(target)
    for word, combine in (("anyOf", any), ("oneOf", any), ("allOf", all)):
        parts = schema.get(word)
        if allowed and isinstance(parts, list) and parts:
            allowed = combine(within(part) for part in parts)
    known[id(schema)] = allowed
    return allowed


def _has_type(schema: dict[str, Any], kind: str) -> bool:
    types = schema.get("type")
    if types is None:
        return True
    if kind == "null" and schema.get("nullable") is True:  # OpenAPI's way
        return True
    for each in types if isinstance(types, list) else [types]:
        name = str(each).lower()
        name = _NAMES.get(name, name)
        if name == kind or (name == "number" and kind == "integer") or name not in KINDS:
            return True
    return False


def _is_among(schema: dict[str, Any], kind: str, value: Any) -> bool:
    choices = schema.get("enum")
    if isinstance(choices, list) and not _is_one_of(kind, value, choices):
        return False
    return "const" not in schema or _is_one_of(kind, value, [schema["const"]])


def _is_one_of(kind: str, value: Any, choices: list[Any]) -> bool:
    """Equal as JSON is: 1 is 1.0, but true is not 1."""
    if value is _ANY:
        return any(_kind_of(choice) == kind for choice in choices)
    return any(
        value == choice and isinstance(value, bool) == isinstance(choice, bool)
        for choice in choices
    )


def _kind_of(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return "null" if value is None else kinds.get(type(value), "object")


def _target(reference: Any, root: dict[str, Any]) -> Any:
    """What `#/$defs/name` refers to, None if nothing here."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found: Any = root
    for part in reference[1:].split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list):
            found = found[int(key)] if key.isdecimal() and int(key) < len(found) else None
        elif isinstance(found, dict):
            found = found.get(key)
        else:
            return None
    return found


def _properties(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    """The properties that a schema names, also where it refers to others or combines them."""
    found: dict[str, Any] = {}
    waiting, known = [schema], set()
    while waiting:
        each = waiting.pop()
        if not isinstance(each, dict) or id(each) in known:
            continue
        known.add(id(each))
        own = each.get("properties")
        for name, part in own.items() if isinstance(own, dict) else ():
            found.setdefault(name, part)
        waiting.append(_target(each.get("$ref"), root))
        for word in ("allOf", "anyOf", "oneOf"):
            parts = each.get(word)
            waiting += parts if isinstance(parts, list) else []
    return found


def _kind(text: str) -> str:
    """Of a value in JSON."""
    begins = {
        "{": "object",
        "[": "array",
        '"': "string",
        "t": "boolean",
        "f": "boolean",
        "n": "null",
    }
    return begins.get(text[0]) or ("number" if set(text) & set(".eE") else "integer")


def _value(text: str) -> Any:
    return json.loads(text) if len(text) <= MOST_LITERAL else _ANY


def _meant(text: str) -> list[tuple[str, str]]:
    """What is written as other programs write it, where no text is allowed: `+5`, `5.0`, `TRUE`, `{'a': 1}`."""
    found = []
    if (whole := _WHOLE.fullmatch(text)) and len(whole[2]) <= MOST_DIGITS:
        found.append(("integer", f"{'-' if whole[1] == '-' and whole[2] != '0' else ''}{whole[2]}"))
    if text.lower() in ("true", "false"):
        found.append(("boolean", text.lower()))
    if text.lower() in ("null", "none", ""):
        found.append(("null", "null"))
    if text[:1] in ("{", "[", "(") and len(text) <= MOST_LITERAL:
        with suppress(Exception):  # whatever it trips over, it is no literal
            made = ast.literal_eval(text)
            found.append((_kind_of(list(made) if isinstance(made, tuple) else made), strict(made)))
    return found


def offered(tools: list[dict[str, Any]] | None) -> Mapping[str, Parameters]:
    """The functions that may be called, by name."""
    functions = [tool["function"] for tool in tools or () if isinstance(tool.get("function"), dict)]
    return {str(each["name"]): Parameters(each.get("parameters")) for each in functions}
