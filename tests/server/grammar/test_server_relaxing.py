"""Schemas as clients generate them: what asks for nothing, and what no grammar can say."""

from __future__ import annotations

from typing import Any

import pytest
from mlx_hybridcache_server.errors import ApiError
from mlx_hybridcache_server.grammar.narrowing import without_notes
from mlx_hybridcache_server.prompts.chat import Rendered
from texts.constraints import allows, among, by_schema, chat, made, said_as, spoken

FINE = {"type": "object", "properties": {"a": {"type": "integer"}}}
ODD: dict[str, tuple[dict[str, Any], str]] = {
    "a set": ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems"),
    "a lookahead": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "a reference": ({"$ref": "https://example.com/x.json"}, "example.com"),
    "a condition": ({"if": {"type": "string"}, "then": {"minLength": 2}}, "then"),
}
each_parser = pytest.mark.parametrize("parser", ["json_tools", "qwen3_coder"])


def tool(name: str, parameters: Any) -> dict[str, Any]:
    """A declaration."""
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def odd(name: str) -> dict[str, Any]:
    """A tool with a parameter that is one of the odd ones."""
    properties = {"it": ODD[name][0], "n": {"type": "integer"}}
    return tool("odd", {"type": "object", "properties": properties, "required": ["it", "n"]})


def named(name: str) -> dict[str, Any]:
    """The choice of one tool."""
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    "nothing",
    [
        {"type": "array", "uniqueItems": False},
        {"type": "string", "format": "password"},
        {"type": "string", "format": "byte"},
        {"type": "object", "propertyNames": {}, "unevaluatedProperties": True},
        {"type": "object", "dependentRequired": {}, "not": False},
    ],
    ids=lambda schema: list(schema)[1],
)
def test_keywords_that_ask_for_nothing_are_left_out(nothing: dict[str, Any]) -> None:
    """In a response_format and in the parameters of a tool that must be called."""
    assert without_notes(nothing) == {"type": nothing["type"]}
    assert without_notes({"const": nothing}) == {"const": nothing}, "data is data"
    assert made(chat(response_format=by_schema({"properties": {"a": nothing}})))
    must = chat(
        tools=[tool("f", {"type": "object", "properties": {"a": nothing}})], tool_choice=named("f")
    )
    assert made(must)
    assert must.warnings == ()


@pytest.mark.parametrize("number", [1.0, 0.0, -3.0, 120.0, 999_999.0])
def test_a_number_named_as_1_0_may_be_written_so(number: float) -> None:
    """And as 1: JSON has one number under both spellings. No other number passes."""
    for schema in ({"const": number}, {"type": "number", "enum": ["a", number]}):
        wanted = made(chat(response_format=by_schema(schema)))
        assert all(allows(wanted, text) for text in (str(number), str(int(number))))
        others = (number + 0.1, number - 0.1, int(number) + 1, int(number) - 1, f"{number}0")
        assert not any(allows(wanted, str(text)) for text in others)
    assert allows(made(chat(response_format=by_schema({"enum": ["a", number]}))), '"a"')
    whole = {"type": "integer", "const": number}
    assert not allows(made(chat(response_format=by_schema(whole))), str(number))


@each_parser
@pytest.mark.parametrize("name", ODD)
def test_a_tool_that_need_not_be_called_is_relaxed_and_said(parser: str, name: str) -> None:
    """A call must come, but not of this one: its name and the reason are told, the others are kept to."""
    for choice in ("required", among("fine", "odd")):
        body = chat(tools=[tool("fine", FINE), odd(name)], tool_choice=choice)
        wanted = made(body, spoken(parser))
        (said,) = body.warnings
        assert said.startswith("tools: calls of odd are held to its parameters in part only: ")
        assert ODD[name][1] in said
        assert "\n" not in said
        assert allows(wanted, said_as(parser, "fine", {"a": 1}))
        assert not allows(wanted, said_as(parser, "fine", {"a": "x"}))
        assert allows(wanted, said_as(parser, "odd", {"it": [7, 7], "n": 1}))


@each_parser
@pytest.mark.parametrize("name", ODD)
def test_a_tool_that_must_be_called_is_refused_by_its_name(parser: str, name: str) -> None:
    """The only one, or the one that is named; beside another that is named it does not matter."""
    tools = [tool("fine", FINE), odd(name)]
    for fields in (
        {"tools": tools, "tool_choice": named("odd")},
        {"tools": tools[1:], "tool_choice": "required"},
    ):
        with pytest.raises(ApiError, match=f"Calls of odd cannot .*{ODD[name][1]}") as refused:
            spoken(parser).of(chat(**fields), Rendered([1]))
        assert (refused.value.status_code, refused.value.param) == (400, "tools")
    body = chat(tools=tools, tool_choice=named("fine"))
    assert made(body, spoken(parser))
    assert body.warnings == ()


def test_a_schema_beside_tools_is_not_relaxed() -> None:
    """The reply may be JSON by it: 400 for `response_format`, though the tool would have been."""
    body = chat(response_format=by_schema(ODD["a set"][0]), tools=[odd("a set")])
    with pytest.raises(ApiError, match="uniqueItems") as refused:
        made(body)
    assert refused.value.param == "response_format"
