"""Calls that must come, and those that may, in each model's own format."""

from __future__ import annotations

from dataclasses import replace

import pytest
from mlx_hybridcache_server.errors import ApiError
from mlx_hybridcache_server.prompts.chat import Rendered
from texts.constraints import (
    CALLS,
    PARSERS,
    TOOLS,
    WRONG,
    allows,
    among,
    by_schema,
    chat,
    made,
    read_back,
    said_as,
    spoken,
)


@pytest.mark.parametrize("parser", ["json_tools", "qwen3_coder"])
def test_a_reply_that_is_free_calls_only_what_is_allowed(parser):
    """Text, reasoning, calls of `book`, in any order; no call of another, and none that is broken."""
    fields = {"tools": TOOLS, "tool_choice": among("book", "get_weather")}
    wanted = made(chat(**fields), spoken(parser), may_reason=True)
    book = said_as(parser, "book", {"who": "Zoe", "seats": ["A1"]})
    good = ["Hello.", "", f"<think>hm</think>So: {book}", f"{book}\n{book} Done."]
    bad = [said_as(parser, "now", {}), "So:<tool_call>", f"{book}{said_as(parser, 'gone', {})}"]
    assert [text for text in good if text and not allows(wanted, text)] == []
    assert [text for text in bad if allows(wanted, text)] == []
    one = made(chat(**fields, parallel_tool_calls=False), spoken(parser))
    assert allows(one, f"So: {book}")
    assert not allows(one, book + book)
    must = made(chat(tools=TOOLS, tool_choice=among("book", mode="required")), spoken(parser))
    assert allows(must, book)
    assert not allows(must, "Hello.")


def test_where_no_token_begins_a_call_what_is_not_allowed_is_text():
    """Nothing is held to a grammar then; the reader of calls is told of the allowed ones."""
    constraints = spoken("json_tools")
    constraints.__dict__["speech"] = replace(constraints.speech, token_of=lambda marker: None)
    body = chat(tools=TOOLS, tool_choice=among("book"))
    assert constraints.of(body, Rendered([1])) is None


@pytest.mark.parametrize("parser", PARSERS)
def test_a_forced_call_obeys_its_parameters_in_the_models_own_format(parser):
    """What is allowed is read back as it was meant; what breaks the schema is not allowed."""
    wanted = made(chat(tools=TOOLS, tool_choice="required"), spoken(parser))
    for name, arguments in CALLS:
        text = said_as(parser, name, arguments)
        assert allows(wanted, text), text
        assert read_back(parser, text, wanted.tools) == [(name, arguments)]
    for name, arguments in WRONG:
        assert not allows(wanted, said_as(parser, name, arguments))
    for text in ("", "Hello", "{}"):
        assert not allows(wanted, text)


@pytest.mark.parametrize("parser", PARSERS)
def test_one_call_or_several(parser):
    """`required` allows more of them; `parallel_tool_calls: false` and a named function one."""
    once = said_as(parser, "now", {})
    twice = (
        once[:-1] + ", " + once[len("[TOOL_CALLS][") :]
        if parser == "mistral"
        else f"{once}\n{once}"
    )
    several = made(chat(tools=TOOLS, tool_choice="required"), spoken(parser))
    assert allows(several, once)
    assert allows(several, twice)
    named = {"type": "function", "function": {"name": "now"}}
    for fields in (
        {"tool_choice": "required", "parallel_tool_calls": False},
        {"tool_choice": named},
    ):
        one = made(chat(tools=TOOLS, **fields), spoken(parser))
        assert allows(one, once)
        assert not allows(one, twice)
    assert not allows(made(chat(tools=TOOLS, tool_choice=named)), said_as("json_tools", *CALLS[0]))


def test_a_text_parameter_of_the_xml_format_is_written_as_it_is():
    """Over several lines, but without what would end it; the word null is a word."""
    schema = {"type": "object", "properties": {"plain": {"type": "string"}}, "required": ["plain"]}
    tools = [{"type": "function", "function": {"name": "say", "parameters": schema}}]
    wanted = made(chat(tools=tools, tool_choice="required"), spoken("qwen3_coder"))
    for value in ("one\ntwo <b>", "12", "", '"quoted"', "nullable", "\n", "null", "NULL", " a "):
        text = said_as("qwen3_coder", "say", {"plain": value})
        assert allows(wanted, text), value
        assert read_back("qwen3_coder", text, wanted.tools) == [("say", {"plain": value})]
    for value in ("a</parameter>b", "</function>"):
        assert not allows(wanted, said_as("qwen3_coder", "say", {"plain": value})), value


@pytest.mark.parametrize("parser", ["json_tools", "qwen3_coder"])
def test_a_value_cannot_hold_what_would_end_its_call(parser):
    """The marker inside a JSON string: mlx-lm would end the call there."""
    end = "</tool_call>" if parser == "json_tools" else "</parameter>"
    schema = {"type": "object", "properties": {"x": {"type": "array"}}, "required": ["x"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    wanted = made(chat(tools=tools, tool_choice="required"), spoken(parser))
    assert allows(wanted, said_as(parser, "f", {"x": ["</tool"]}))
    assert not allows(wanted, said_as(parser, "f", {"x": [end]}))


def test_mistrals_newer_form_of_calls():
    """A name, a marker, and the arguments."""
    constraints = spoken("mistral")
    constraints.__dict__["speech"] = replace(constraints.speech, has_headers=True)
    wanted = made(chat(tools=TOOLS, tool_choice="required"), constraints)
    text = '[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo", "unit": "C"}'
    assert allows(wanted, text)
    assert read_back("mistral", text, wanted.tools) == [
        ("now", {}),
        ("get_weather", {"city": "Oslo", "unit": "C"}),
    ]


def test_with_a_form_and_tools_either_may_come():
    """JSON by the schema, or calls that obey theirs."""
    fields = {"response_format": by_schema({"const": 1}), "tools": TOOLS}
    wanted = made(chat(**fields))
    assert allows(wanted, "1")
    assert allows(wanted, said_as("json_tools", "now", {}))
    assert not allows(wanted, "2")
    assert not allows(made(chat(**fields, tool_choice="none")), said_as("json_tools", "now", {}))


@pytest.mark.parametrize(
    ("parser", "said"),
    [(None, "no format for tool calls"), ("newer", "newer.*json_tools.*qwen3_coder")],
)
def test_a_format_of_calls_without_a_grammar_is_refused_by_name(parser, said):
    """No format at all, and one that is not written down here."""
    constraints = spoken("json_tools")
    start = constraints.speech.call_start if parser else None
    constraints.__dict__["speech"] = replace(constraints.speech, parser=parser, call_start=start)
    with pytest.raises(ApiError, match=said) as refused:
        made(chat(tools=TOOLS, tool_choice="required"), constraints)
    assert refused.value.param == "tools"


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ([], "must be the schema of an object"),
        ({"type": "string"}, "must be the schema of an object"),
        ({"properties": []}, "must be an object"),
        ({"anyOf": [{}]}, "anyOf"),
        ({"required": ["a"]}, "'a'"),
        ({"required": [[]]}, "a list of names"),
        ({"required": 5}, "a list of names"),
        ({"properties": {"a b": {}}}, "a b"),
    ],
)
def test_parameters_that_no_call_can_carry_are_refused(parameters, said):
    """With the name of what is in the way."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    with pytest.raises(ApiError, match=said):
        made(chat(tools=tools, tool_choice="required"), spoken("qwen3_coder"))


def test_a_message_that_goes_on_is_not_held_to_a_form():
    """Its beginning is the client's."""
    body = chat(response_format={"type": "json_object"}, continue_final_message=True)
    with pytest.raises(ApiError, match="continue_final_message"):
        made(body)
