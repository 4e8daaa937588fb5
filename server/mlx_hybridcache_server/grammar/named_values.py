"""Arguments as a list of named values, for formats that have no place for one object of them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from .narrowing import Schema
from .speech import GrammarError, Tool, name_of, parameters_of

_KNOWN = {"type", "properties", "required", "additionalProperties", "title", "description"}
_SHARED = ("$defs", "definitions")


class NamedValue(NamedTuple):
    """One parameter of a tool. The schema has what it may refer to within it."""

    name: str
    schema: Schema
    is_required: bool


def named_values(tool: Tool, *, is_lenient: bool) -> list[NamedValue]:
    """The parameters in their order. Raises `GrammarError` for what a list of them cannot say."""
    parameters = parameters_of(tool)
    extra = parameters.keys() - _KNOWN - {*_SHARED, "$schema", "$id", "strict"}
    required = parameters.get("required") or []
    names = parameters.get("properties") or {}
    unnamed = [name for name in required if name not in names]
    if (extra and not is_lenient) or unnamed:
        raise GrammarError(
            f"The parameters of {name_of(tool)} have {', '.join(map(repr, [*sorted(extra), *unnamed]))}, "
            "which this model's format of calls, a list of named values, has no place for."
        )
    shared: Schema = {key: parameters[key] for key in _SHARED if key in parameters}
    needed = {*required}
    return [
        NamedValue(name, {**_as_object(schema), **shared}, name in needed)
        for name, schema in names.items()
    ]


def bare_texts(schema: Any) -> list[str] | None:
    """The texts that a parameter can be, none for any; None when its value is written as JSON."""
    notes = {"type", "title", "description", "default", "examples", "enum", *_SHARED}
    if not isinstance(schema, dict) or schema.get("type") != "string" or schema.keys() - notes:
        return None
    if "enum" not in schema:
        return []
    texts = schema["enum"]
    is_plain = isinstance(texts, list) and all(
        isinstance(text, str) and re.fullmatch(r"[^<>\n]+", text) for text in texts
    )
    return texts or None if is_plain else None


def unwritable(name: str) -> GrammarError:
    """What is raised for a name that a format of calls cannot carry."""
    return GrammarError(f"This model's format of calls has no way to write the name {name!r}.")


def _as_object(schema: Any) -> Schema:
    if isinstance(schema, dict):
        return schema
    return {} if schema else {"enum": []}
