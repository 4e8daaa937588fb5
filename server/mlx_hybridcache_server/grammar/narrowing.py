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

NOTHING: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "format": ("password", "byte", "binary"),  # how it is shown and stored
    "propertyNames": (True, {}),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "not": (False,),
}
"""Values with which keywords ask for nothing, though llguidance knows no grammar for them."""

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


LARGEST_SPELLED = 10**6
"""Of the numbers named as 1.0 is, which may be written as 1 as well."""

MOST_SPELLED = 20
"""Of such numbers in one list."""


def without_notes(schema: Schema) -> Schema:
    """`schema` without what it says to people, and what asks for nothing.

    A property may be called `description`; data is data.
    """
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
    return _spelled(
        {
            key: _part(key, value)
            for key, value in schema.items()
            if key not in NOTES and value not in NOTHING.get(key, ())
        }
    )


def _spelled(schema: Schema) -> Schema:
    """`schema` with 1.0 beside 1 where it names the number 1.0: llguidance would take 1 only."""
    data = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(data, list) or schema.keys() - {"const", "enum", "type"}:
        return schema
    whole = [each for each in data if _is_whole(each)]
    if (
        not 0 < len(whole) <= MOST_SPELLED
        or {"const", "enum"} <= schema.keys()
        or _is_typed(schema)
    ):
        return schema
    others = [each for each in data if not _is_whole(each)]
    rest = [{**schema, "enum": others}] if others else []
    return {"anyOf": [*map(_number, whole), *rest]}


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer() and abs(value) < LARGEST_SPELLED


def _is_typed(schema: Schema) -> bool:
    """Whether it takes no numbers, or whole ones only."""
    kinds = schema.get("type", "number")
    return "number" not in (kinds if isinstance(kinds, list) else [kinds])


def _number(value: float) -> Schema:
    """Bounds between which a multiple of 0.1 is `value`, with a digit behind the point or none."""
    low, high = (value, "minimum"), (round(value + 0.1, 1), "exclusiveMaximum")
    if value < 0:
        low, high = (value, "maximum"), (round(value - 0.1, 1), "exclusiveMinimum")
    return {"type": "number", low[1]: low[0], high[1]: high[0], "multipleOf": 0.1}


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
