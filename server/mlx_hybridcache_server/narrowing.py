"""What of a JSON schema its grammar depends on, and what would make that too large."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

Schema = dict[str, Any]

NOTES = frozenset(
    {
        "title",
        "description",
        "default",
        "examples",
        "$comment",
        "deprecated",
        "readOnly",
        "writeOnly",
    }
)
"""What a schema says to people and programs; no text is allowed or forbidden by it."""

_BY_NAME = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
)
_WITHIN = frozenset(
    {
        "items",
        "prefixItems",
        "additionalItems",
        "unevaluatedItems",
        "contains",
        "additionalProperties",
        "unevaluatedProperties",
        "propertyNames",
        "anyOf",
        "allOf",
        "oneOf",
        "not",
        "if",
        "then",
        "else",
    }
)

MOST_PROPERTIES = 4000
"""Of all objects. Compiling one object takes time by the square of those that may be left out."""

MOST_PATTERNS = 100
"""Of `patternProperties`, each of which is held against every other: 240 take seconds."""

MOST_REMAINDERS = 20_000
"""A grammar has a state for each remainder of a `multipleOf`: about 500 bytes and 12 microseconds."""


def without_notes(schema: Schema) -> Schema:
    """`schema` without what it says to people. A property may be called `description`; data is data."""
    refers = (each["$ref"] for each in _objects(schema) if isinstance(each.get("$ref"), str))
    if any(NOTES & set(reference.split("/")) for reference in refers):
        return schema
    made: Schema = _without_notes(schema)
    return made


def _without_notes(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_notes(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _part(key, value) for key, value in schema.items() if key not in NOTES}


def _part(key: str, value: Any) -> Any:
    if key in _BY_NAME and isinstance(value, dict):
        return {name: _without_notes(each) for name, each in value.items()}
    return _without_notes(value) if key in _WITHIN else value


def remainders(schema: Any) -> int:
    """How many remainders its grammar must tell apart.

    Raises `ValueError` for more than `MOST_REMAINDERS`, or too many properties.
    """
    found, is_combined = [], False
    named = {"properties": 0, "patternProperties": 0}
    for each in _objects(schema):
        found.append(_numerator(each.get("multipleOf")))
        is_combined |= bool(each.keys() & {"allOf", "oneOf", "anyOf", "not", "$ref", "$dynamicRef"})
        for key in named:
            names = each.get(key)
            named[key] += len(names) if isinstance(names, dict) else 0
    for (key, count), most in zip(named.items(), (MOST_PROPERTIES, MOST_PATTERNS), strict=True):
        if count > most:
            raise ValueError(
                f"This has {count:,} {key}; at most {most:,} can be kept to in one reply. "
                "Name fewer, or use additionalProperties."
            )
    least = math.lcm(*filter(None, found)) if is_combined and any(found) else 0
    count = max(sum(found), least)
    if count > MOST_REMAINDERS:
        raise ValueError(
            f"The values of multipleOf in this schema come to {count:.6g} together; at most "
            f"{MOST_REMAINDERS:,} can be kept to. Leave multipleOf out, and check the reply."
        )
    return count


def _numerator(value: Any) -> int:
    """Of 2.5 it is 5: decimals are counted in steps of the last digit."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return abs(Fraction(str(value)).numerator) if is_number and math.isfinite(value) else 0


def closed(schema: Schema) -> Schema:
    """`schema` with objects that hold only what it names, unless it says `additionalProperties`.

    By the letter any other key may follow, and a weak model would not stop inventing them. What the
    result allows, `schema` allows; where schemas are combined, it stays as it is.
    """
    return schema if any(map(_combines, _objects(schema))) else _closed(schema)


def _objects(value: Any) -> Iterator[Schema]:
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _objects(each)


def _combines(schema: Schema) -> bool:
    choices = schema.keys() & {"anyOf", "$ref", "$dynamicRef"}
    own = schema.keys() & {"properties", "required", "minProperties", "patternProperties"}
    return bool(schema.keys() & {"allOf", "oneOf"} or len(choices) > 1 or (choices and own))


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for key in schema.keys() & {"properties", "$defs", "definitions"}:
        if isinstance(schema[key], dict):
            made[key] = {name: _closed(each) for name, each in schema[key].items()}
    for key in schema.keys() & {"items", "prefixItems", "anyOf", "additionalProperties"}:
        made[key] = _closed(schema[key])
    names, required = schema.get("properties"), schema.get("required", [])
    is_open = schema.keys() & {"additionalProperties", "patternProperties", "minProperties"}
    if isinstance(names, dict) and isinstance(required, list) and not is_open:
        has_all = all(isinstance(name, str) and name in names for name in required)
        made.update({"additionalProperties": False} if has_all else {})
    return made
