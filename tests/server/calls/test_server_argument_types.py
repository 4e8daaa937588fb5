"""Values of calls by the schema of their parameters."""

from __future__ import annotations

import json

import pytest
from mlx_hybridcache_server.calls.argument_types import Parameter, offered
from mlx_hybridcache_server.calls.json_reader import normal

TEXT, NULLABLE = {"type": "string"}, {"type": ["string", "null"]}
ROOT = {"$defs": {"text": TEXT, "tree": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "integer"}]}}}


@pytest.mark.parametrize(
    ("schema", "raw", "value"),
    [
        (TEXT, "null", "null"),
        (TEXT, " 5\n", " 5\n"),
        (TEXT, '"quoted"', '"quoted"'),
        ({"$ref": "#/$defs/text"}, "null", "null"),
        ({"allOf": [TEXT, {"minLength": 1}]}, "5", "5"),
        ({"type": "STRING"}, "5", "5"),
        (NULLABLE, "null", None),
        (NULLABLE, "None", "None"),
        (NULLABLE, "5", "5"),
        ({"anyOf": [TEXT, {"type": "null"}]}, "null", None),
        ({"type": "string", "nullable": True}, "null", None),
        ({"oneOf": [{"type": "integer"}, TEXT]}, "5", 5),
        ({"oneOf": [{"type": "integer"}, TEXT]}, "007", "007"),
        ({"type": "integer"}, "9007199254740993", 2**53 + 1),
        ({"type": "integer"}, " +5.0\n", 5),
        ({"type": "integer"}, "five", "five"),
        ({"type": "integer"}, "null", "null"),
        ({"type": "int"}, "5", 5),
        ({"$ref": "#/$defs/tree"}, "5", 5),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "yes", "yes"),
        ({"enum": ["a", "b"]}, "\na ", "a"),
        ({"enum": ["1", 2]}, "1", "1"),
        ({"enum": ["1", 2]}, "2", 2),
        ({"enum": ["null", "x"]}, "null", "null"),
        ({"const": 5}, "5", 5),
        ({"const": "5"}, "5", "5"),
        ({"type": "array", "items": TEXT}, '["1", "null"]', ["1", "null"]),
        ({"type": "array"}, "[1, 2,]", [1, 2]),
        ({"type": "array"}, "one", "one"),
        ({"type": "object"}, "{'a': True, 'b': [None]}", {"a": True, "b": [None]}),
        ({"type": "object"}, '{"a": 12345678901234567890}', {"a": 12345678901234567890}),
        ({}, "5", 5),
        ({}, '"5"', "5"),
        ({}, " [draft] ", " [draft] "),
        (True, "word", "word"),
        ({"type": "unheard of"}, "word", "word"),
    ],
)
def test_a_text_is_read_by_the_whole_schema(schema, raw, value):
    """What none of it allows stays text, which the client's own check refuses."""
    found = json.loads(Parameter(schema, ROOT).read(raw))
    assert (found, type(found)) == (value, type(value))


def test_a_schema_of_many_references_to_itself_is_looked_through_once():
    """Thirty levels of two references each would be a billion places."""
    defs = {
        f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}]}
        for n in range(30)
    }
    schema = {
        "$defs": {**defs, "d30": {"type": "integer"}},
        "properties": {"x": {"$ref": "#/$defs/d0"}},
    }
    tools = offered([{"function": {"name": "f", "parameters": schema}}])
    assert tools["f"]["x"].read("5") == "5"


def test_a_schema_that_is_nested_without_end_ends_no_reply():
    """50,000 levels: beyond fifty anything may be."""
    schema = {"type": "integer"}
    for _ in range(50_000):
        schema = {"anyOf": [schema]}
    tools = offered([{"function": {"name": "f", "parameters": {"properties": {"x": schema}}}}])
    assert tools["f"]["x"].read("5") == "5"
    assert offered([{"function": {"name": "f", "parameters": schema}}])["f"]["x"].read("5") == "5"


def test_numbers_are_sent_with_the_digits_that_were_written():
    """More than a float holds, and zeros at the end."""
    assert normal('{"a": 1.10000000000000000001, "b": 1E5}', words=False) == (
        '{"a": 1.10000000000000000001, "b": 1E5}'
    )
