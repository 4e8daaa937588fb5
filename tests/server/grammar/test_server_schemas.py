"""Schemas as grammars: what they allow, refuse, and where reasoning comes first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from mlx_hybridcache_server.adapter import NORMAL, REASONING
from mlx_hybridcache_server.errors import ApiError
from mlx_hybridcache_server.grammar.narrowing import closed
from mlx_hybridcache_server.prompts.chat import Rendered
from mlx_hybridcache_server.schema.requests import CompletionBody
from texts.constraints import (
    OWN,
    TOOLS,
    allows,
    by_schema,
    chat,
    made,
    said_as,
    spelled,
    spoken,
)


def test_a_reply_without_a_form_has_no_constraint():
    """Plain chats, text, tools that may be called, and none that may."""
    for fields in (
        {},
        {"response_format": {"type": "text"}},
        {"tools": TOOLS, "tool_choice": "auto"},
        {"tools": TOOLS, "tool_choice": "none"},
    ):
        assert OWN.of(chat(**fields), Rendered([1])) is None


def test_a_json_object_is_an_object_and_nothing_else():
    """No other value, nothing before and nothing behind it."""
    wanted = made(chat(response_format={"type": "json_object"}))
    assert allows(wanted, '{"a": [1, {"b": null}], "c": "x"}')
    assert allows(wanted, "{}")
    for text in ("[]", "1", "{", "{}{}", " {}", "{}\n", "Sure: {}", "```json\n{}\n```"):
        assert not allows(wanted, text), text


def test_white_space_is_bounded():
    """One space, or a new line and its indent; never a run that a weak model could go on with."""
    wanted = made(chat(response_format={"type": "json_object"}))
    for text in ('{"a":1,"b":[]}', '{"a": 1, "b": []}', '{\n  "a": 1\n}', '{\n\t"a": 1}'):
        assert allows(wanted, text), text
    for text in ('{"a":  1}', '{\n\n"a": 1}', "{" + "\n" + " " * 40 + '"a": 1}'):
        assert not allows(wanted, text), text


@pytest.mark.parametrize(
    ("state", "may_reason", "good", "bad"),
    [
        (
            NORMAL,
            True,
            ["{}", "<think>hm</think>{}", "<think>\nhm\n</think>\n\n{}"],
            ["hm</think>{}"],
        ),
        (NORMAL, False, ["{}"], ["<think>hm</think>{}", "\n\n{}"]),
        (REASONING, True, ["hm\n</think>\n\n{}", "</think>{}"], ["{}", "hm<tool_call>{}"]),
    ],
)
def test_reasoning_comes_first_where_the_prompt_leaves_room_for_it(state, may_reason, good, bad):
    """Not opened, closed by the template, opened by the template."""
    wanted = made(chat(response_format={"type": "json_object"}), state=state, may_reason=may_reason)
    assert [text for text in good if not allows(wanted, text)] == []
    assert [text for text in bad if allows(wanted, text)] == []


def test_a_marker_is_one_token_however_it_could_be_spelled():
    """Letter by letter it ends reasoning for the reader too, so that it cannot be written so."""
    wanted = made(chat(response_format={"type": "json_object"}), state=REASONING, may_reason=True)
    tokens = spelled("hm</think>{}")
    assert not all(each.deep_copy().consume_tokens(tokens) for each in wanted.matchers)


def test_markers_may_be_plain_text():
    """A tokenizer without tokens of their own: the first one, however it is spelled, ends a part."""
    constraints = spoken("json_tools")
    plain = replace(constraints.speech, token_of=lambda marker: None)
    constraints.__dict__["speech"] = plain
    fields = {"response_format": {"type": "json_object"}, "tools": TOOLS}
    wanted = made(chat(**fields), constraints, may_reason=True)
    call = said_as("json_tools", "now", {})
    good = ["{}", "<think>hm</think>\n{}", f"<think></think>{call}", f"{call}\n{call}"]
    bad = ["<think>hm{}", '{"a": "<think>"}', '{"a": "<tool_call>"}', "<think>a</think>b</think>{}"]
    for text in good + bad:
        matchers = [matcher.deep_copy() for matcher in wanted.matchers]
        taken = [each.consume_tokens(spelled(text)) and each.is_accepting() for each in matchers]
        assert all(taken) == (text in good), text


def test_a_completion_is_json_at_once():
    """It has no parts, so a string in it may hold what would be a marker in a chat."""
    body = CompletionBody(prompt="x", response_format={"type": "json_object"})
    wanted = made(body)
    assert len(wanted.matchers) == 1
    assert allows(wanted, "{}")
    assert not allows(wanted, "<think>hm</think>{}")


def test_objects_hold_what_their_schema_names():
    """Unless it says otherwise, or combines schemas in ways in which closing one would empty all."""
    named = {"type": "object", "properties": {"a": {"properties": {"b": {}}}}}
    assert closed(named) == {
        "type": "object",
        "properties": {"a": {"properties": {"b": {}}, "additionalProperties": False}},
        "additionalProperties": False,
    }
    for schema in (
        {"type": "object"},
        {"properties": {}, "additionalProperties": {"type": "string"}},
        {"properties": {"a": {}}, "required": ["b"]},
        {"properties": {"a": {}}, "minProperties": 1},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"anyOf": [{"properties": {"a": {}}}], "required": ["b"]},
        {"oneOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
    ):
        assert closed(schema) == schema


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "nope"}, "Invalid type: nope"),
        ({"not": {}}, "not"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "greater than maximum"),
        ({"$ref": "https://example.com/x.json"}, "example.com"),
        ({"$ref": "#/$defs/gone"}, "gone"),
        ({"const": "\ud800"}, "escape"),
        ({"enum": []}, "empty"),
        ({"properties": {"a": {}}, "required": [["a"]]}, "required"),
        ({"properties": {"a": 5}}, "schema"),
        ({"type": ["object", {}]}, "type"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_in_the_librarys_words(schema, said):
    """400, with the field, and without the grammar around it."""
    with pytest.raises(ApiError, match=said) as refused:
        made(chat(response_format=by_schema(schema)))
    assert refused.value.status_code == 400
    assert refused.value.param == "response_format"
    assert "%json {" not in refused.value.detail


def test_a_schema_nested_without_end_is_refused():
    """Neither Python's stack nor the library's is a way to stop the server."""
    for depth in (400, 100_000):
        schema: dict[str, Any] = {}
        for _ in range(depth):
            schema = {"type": "array", "items": schema}
        fields = chat()
        fields.response_format = constrain_format(schema)
        with pytest.raises(ApiError, match=r"nested too deeply|recursion limit"):
            made(fields)


def constrain_format(schema: Any) -> Any:
    """A response_format of a schema that is too deep to be validated as part of a body."""
    body = chat(response_format=by_schema({}))
    assert body.response_format is not None
    assert body.response_format.json_schema is not None
    body.response_format.json_schema.content = schema
    return body.response_format


def test_the_schema_is_asked_for_where_it_is_missing():
    """`json_schema` without one."""
    with pytest.raises(ApiError, match="needs"):
        made(chat(response_format={"type": "json_schema"}))
