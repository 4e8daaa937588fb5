"""Replies held to a schema and calls that must come: every one that ends by itself is what was asked for."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from bundled import load
from mlx_hybridcache_server.adapter import NORMAL, REASONING
from mlx_hybridcache_server.calls.formats import ToolFormat
from mlx_hybridcache_server.calls.incoming import Arguments, Begin
from mlx_hybridcache_server.calls.parts import Parts
from mlx_hybridcache_server.errors import ApiError
from mlx_hybridcache_server.grammar import constrain
from mlx_hybridcache_server.grammar.constrain import Constraints, masked
from mlx_hybridcache_server.grammar.narrowing import closed
from mlx_hybridcache_server.prompts.chat import Rendered
from mlx_hybridcache_server.schema.requests import ChatBody, CompletionBody
from mlx_lm.generate import GenerationResponse, stream_generate
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools, mistral, qwen3_coder
from servers import CHAT, COMPLETIONS, INSTANT, OURS, Server, running, user

from mlx_hybridcache.worker.worker import PAUSE

PARSERS = {"json_tools": json_tools, "mistral": mistral, "qwen3_coder": qwen3_coder}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 12},
                    "unit": {"enum": ["C", "F"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 14},
                },
                "required": ["city", "unit"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
    {
        "type": "function",
        "function": {
            "name": "book",
            "parameters": {
                "type": "object",
                "properties": {
                    "who": {"type": "string", "enum": ["Maya", "Zoe"]},
                    "seats": {
                        "type": "array",
                        "items": {"$ref": "#/$defs/seat"},
                        "minItems": 1,
                        "maxItems": 2,
                    },
                    "note": {"anyOf": [{"type": "string", "maxLength": 6}, {"type": "null"}]},
                },
                "required": ["who", "seats"],
                "$defs": {"seat": {"type": "string", "pattern": "^[A-F][1-9]$"}},
            },
        },
    },
]
PARAMETERS = {
    tool["function"]["name"]: tool["function"].get("parameters", {"additionalProperties": False})
    for tool in TOOLS
}


def by_schema(schema: Any, name: str = "answer") -> dict[str, Any]:
    """The response_format that asks for JSON by `schema`."""
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


# The grammar


def spoken(parser: str) -> Constraints:
    """Constraints of the bundled tokenizer, as if its model wrote calls in `parser`'s format."""
    _, tokenizer = load()
    module = PARSERS[parser]
    return Constraints(
        TokenizerWrapper(
            tokenizer._tokenizer,
            eos_token_ids=tokenizer.eos_token_ids,
            tool_call_start=module.tool_call_start,
            tool_call_end=module.tool_call_end,
            tool_parser=module.parse_tool_call,
        )
    )


OWN = spoken("json_tools")


def chat(**fields: Any) -> ChatBody:
    """A chat request."""
    return ChatBody.model_validate({"messages": user("Hello"), **fields})


def made(
    body: ChatBody | CompletionBody,
    constraints: Constraints = OWN,
    *,
    state: str = NORMAL,
    may_reason: bool = False,
) -> constrain.Constraint:
    """What `body` asks for."""
    constraint = constraints.of(body, Rendered([1], state, may_reason))
    assert constraint is not None
    return constraint


def allows(constraint: constrain.Constraint, text: str) -> bool:
    """Whether `text` is a whole reply."""
    _, tokenizer = load()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    matchers = [matcher.deep_copy() for matcher in constraint.matchers]
    return all(each.consume_tokens(tokens) and each.is_accepting() for each in matchers)


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


def spelled(text: str) -> list[int]:
    """The tokens of each character on its own."""
    return [token for char in text for token in tokens_of(char)]


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


# What grammars cost is tested in test_server_grammars


# Calls


CALLS = [
    ("get_weather", {"city": "Oslo", "unit": "C", "days": 3}),
    ("get_weather", {"city": "", "unit": "F"}),
    ("now", {}),
    ("book", {"who": "Zoe", "seats": ["A1", "F9"], "note": None}),
    ("book", {"who": "Maya", "seats": ["B2"], "note": "null"}),
]
WRONG = [
    ("get_weather", {"city": "Oslo"}),
    ("get_weather", {"city": "Oslo", "unit": "K"}),
    ("get_weather", {"city": "Oslo", "unit": "C", "days": 15}),
    ("now", {"a": 1}),
    ("book", {"who": "Ann", "seats": ["A1"]}),
    ("gone", {}),
]


def said_as(parser: str, name: str, arguments: dict[str, Any]) -> str:
    """A call as a model of that format writes it."""
    if parser == "mistral":
        return f"[TOOL_CALLS][{json.dumps({'name': name, 'arguments': arguments})}]"
    if parser == "json_tools":
        call = json.dumps({"name": name, "arguments": arguments})
        return f"<tool_call>\n{call}\n</tool_call>"
    bare = {"who", "plain"}
    values = "".join(
        f"<parameter={key}>\n{value if key in bare else json.dumps(value)}\n</parameter>\n"
        for key, value in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def among(*names: str, mode: str = "auto") -> dict[str, Any]:
    """A tool_choice among these."""
    named = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}


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


def read_back(parser: str, text: str, tools: Any) -> list[tuple[str, Any]]:
    """The calls that the server finds in a reply of one."""
    module = PARSERS[parser]
    form = ToolFormat(module.tool_call_start, module.tool_call_end, module.parse_tool_call, tools)
    parts = Parts(spoken(parser).tokenizer, NORMAL, form)
    calls: list[list[str]] = []
    for part in [*parts.feed(text), *parts.end(is_whole=True)]:
        if isinstance(part, Begin):
            calls.append([part.name, ""])
        elif isinstance(part, Arguments):
            calls[-1][1] += part.text
    return [(name, json.loads(arguments)) for name, arguments in calls]


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
    [(None, "no format for tool calls"), ("glm47", "glm47.*json_tools, qwen3_coder, mistral")],
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


# The mask


def test_a_mask_keeps_its_tokens_and_nothing_of_the_padding():
    """Bits 0, 31 and 40 of 41; rows 41 to 47 belong to no token."""
    words = np.array([1 | 1 << 31, 1 << 8 | 1 << 9], dtype=np.uint32).view(np.int32)
    for dtype in (mx.float32, mx.bfloat16):
        out = masked(mx.ones((1, 48), dtype), words, 41)
        assert out.dtype == dtype
        assert np.flatnonzero(np.array(out[0].astype(mx.float32)) == 1).tolist() == [0, 31, 40]
        assert np.isneginf(np.array(out[0].astype(mx.float32))).sum() == 45


def allowed(guide: constrain.Guide, tokens: list[int], rows: int = 3100) -> set[int]:
    """What may come behind `tokens`."""
    row = np.array(guide(mx.array(tokens), mx.zeros((1, rows)))[0])
    return set(np.flatnonzero(row == 0).tolist())


def tokens_of(text: str) -> list[int]:
    """Its tokens."""
    _, tokenizer = load()
    return list(tokenizer.encode(text, add_special_tokens=False))


def test_only_new_tokens_move_a_reply_on_and_it_ends_when_it_is_complete():
    """The prompt is not part of it; behind the last brace only the end may come."""
    _, tokenizer = load()
    guide = made(chat(response_format=by_schema({"const": {"a": 1}}))).start()
    prompt, reply = tokens_of('{"a": 2}'), tokens_of('{"a": 1}')
    for count in range(len(reply)):
        assert reply[count] in allowed(guide, prompt + reply[:count])
    assert allowed(guide, prompt + reply) == tokenizer.eos_token_ids
    end = [min(tokenizer.eos_token_ids)]
    assert len(allowed(guide, prompt + reply + end)) == 3100  # computed ahead, and never looked at


def test_tokens_that_are_taken_back_are_forgotten():
    """As drafts are; also behind the end of a reply."""
    _, tokenizer = load()
    wanted = made(chat(response_format=by_schema({"type": "array", "items": {"type": "boolean"}})))
    guide, straight = wanted.start(), wanted.start()
    prompt, one, other = [5], tokens_of("[true, false]"), tokens_of("[false]")
    end = [min(tokenizer.eos_token_ids)]
    whole = prompt + one + end
    for count in range(1, len(whole) + 1):
        allowed(guide, whole[:count])
    for count in range(1, len(prompt + other) + 1):
        taken_back = allowed(guide, (prompt + other)[:count])
        assert taken_back == allowed(straight, (prompt + other)[:count])
    assert allowed(guide, prompt + one) == tokenizer.eos_token_ids
    assert allowed(guide, prompt + one + end + other)  # drafted behind an end that is then refused
    straight = wanted.start()
    allowed(straight, prompt)
    assert allowed(guide, prompt + one[:-1]) == allowed(straight, prompt + one[:-1])


def test_a_drafted_reply_is_held_to_its_schema():
    """Two Llamas of random weights, the one drafting for the other, with 128 rows of padding."""
    _, tokenizer = load()
    args = llama.ModelArgs("llama", 64, 2, 128, 2, 1e-5, vocab_size=3200, tie_word_embeddings=True)
    mx.random.seed(0)
    model, draft = llama.Model(args), llama.Model(args)
    schema = a_schema(random.Random(12))
    for drafter, count in ((None, {}), (draft, {"num_draft_tokens": 3}), (model, {})):
        guide = made(chat(response_format=by_schema(schema))).start()
        options = {"logits_processors": [guide], "draft_model": drafter, **count}
        steps = stream_generate(model, tokenizer, [1, 2, 3], max_tokens=120, **options)
        replies = list(guide.watching(lambda responses: responses)(steps))
        assert replies[-1].finish_reason == "stop"
        jsonschema.validate(json.loads("".join(reply.text for reply in replies)), schema)


def test_a_reply_that_cannot_go_on_ends_with_an_error():
    """A constant that holds a marker leaves nothing that could follow: the reader is told, in time."""
    _, tokenizer = load()
    guide = made(chat(response_format=by_schema({"const": "a<think>"}))).start()
    tokens = [5]
    while (may := allowed(guide, tokens)) != tokenizer.eos_token_ids:
        tokens.append(min(may))
    good = len(tokens) - 1
    assert good > 2
    responses = iter([PAUSE, *[response()] * (good + 1)])
    read = guide.watching(lambda steps: steps)(responses)
    assert len([next(read) for _ in range(1 + good)]) == 1 + good
    with pytest.raises(ApiError, match="nothing may follow"):
        next(read)


def response() -> GenerationResponse:
    """One of mlx-lm's responses."""
    return GenerationResponse("x", 1, mx.zeros(1), False, 1, 1.0, 1, 1.0, 0.0, None)


def test_a_token_that_was_not_allowed_is_an_error():
    """Whatever chose it: the reply is not silently something else."""
    guide = made(chat(response_format={"type": "json_object"})).start()
    allowed(guide, [5])
    _, tokenizer = load()
    assert allowed(guide, [5, *tokens_of("}")]) == tokenizer.eos_token_ids
    with pytest.raises(ApiError, match="could not be kept"):
        next(guide.watching(lambda steps: steps)(iter([response()])))


# A server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(OURS) as server:
        yield server


def a_schema(draw: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose texts are short."""
    kinds = ["enum", "const", "integer", "number", "boolean", "null", "pattern", "length"]
    kind = draw.choice(kinds + ["object", "array", "either"] * 2 * (depth > 0))
    if kind == "enum":
        return {"enum": draw.sample(["red", "Maya", 7, 2.5, None, True, "é\n", [1]], 3)}
    if kind == "const":
        return {"const": draw.choice(["x", 3, {"k": [None]}, "</b>"])}
    if kind in ("integer", "number"):
        least = draw.randrange(-50, 50)
        bounds = {"minimum": least, "maximum": least + draw.randrange(1, 500)}
        return {"type": kind, **bounds, **({"multipleOf": 0.25} if kind == "number" else {})}
    if kind == "pattern":
        patterns = ["^[a-z]{2,5}$", "^(a|bc)+-[0-9]{3}$", "^[A-Z][a-z]{1,6}$", r"^\d{4}-\d{2}$"]
        return {"type": "string", "pattern": draw.choice(patterns), "maxLength": 12}
    if kind == "length":
        return {
            "type": "string",
            "minLength": draw.randrange(3),
            "maxLength": draw.randrange(3, 12),
        }
    if kind == "object":
        names = draw.sample(["name", "age", "tags", "x y", "é", "ok"], draw.randrange(1, 4))
        return {
            "type": "object",
            "properties": {name: a_schema(draw, depth - 1) for name in names},
            "required": [name for name in names if draw.random() < 0.6],
            **({"additionalProperties": False} if draw.random() < 0.5 else {}),
        }
    if kind == "array":
        return {
            "type": "array",
            "items": a_schema(draw, depth - 1),
            "maxItems": draw.randrange(1, 4),
        }
    if kind == "either":
        return {"anyOf": [a_schema(draw, depth - 1), {"type": "null"}]}
    return {"type": kind}


def schema_prompt(number: int) -> tuple[Any, str, dict[str, Any]]:
    """Schema, path and body of one of the 200: chats that may think, that may not, completions."""
    draw = random.Random(number)
    schema = a_schema(draw)
    body: dict[str, Any] = {
        "response_format": by_schema(schema),
        "temperature": 1.0,
        "seed": number,
        "max_tokens": 160,
    }
    question = f"Tell me about {draw.choice(['Maya', 'Zoe', 'the weather', 'Oslo'])} as JSON."
    if number % 5 == 4:
        return schema, COMPLETIONS, {**body, "prompt": question}
    thinks = number % 2 == 0
    return schema, CHAT, {**body, "messages": user(question), **({} if thinks else INSTANT)}


def test_of_200_schema_prompts_every_reply_that_ends_by_itself_is_valid(server):
    """At temperature 1, with and without reasoning, streamed and not; most do end by themselves."""
    ended: Counter[str] = Counter()
    reasoned = 0
    for number in range(200):
        schema, path, body = schema_prompt(number)
        streamed = number % 3 == 0
        choice = (
            server.stream(path, **body).joined()
            if streamed
            else server.answer(path, **body)["choices"][0]
        )
        ended[choice["finish_reason"]] += 1
        message = choice.get("message") or {}
        reasoned += bool(message.get("reasoning"))
        if choice["finish_reason"] == "stop":
            content = choice["text"] if path == COMPLETIONS else message["content"]
            jsonschema.validate(json.loads(content), schema)
    print(f"\n{dict(ended)}, {reasoned} with reasoning")
    assert ended["stop"] >= 180
    assert ended.keys() <= {"stop", "length"}
    assert reasoned > 0


def test_a_completion_may_hold_the_text_of_a_marker(server):
    """It is text; only chats have parts."""
    wanted = {"a": "<think><tool_call></think>"}
    body = {"prompt": "JSON:", "response_format": by_schema({"const": wanted}), "max_tokens": 60}
    choice = server.answer(COMPLETIONS, **body)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["text"]) == wanted


def test_every_forced_call_that_ends_by_itself_obeys_its_schema(server):
    """Forty at temperature 1: required, named, one or several, streamed and not, with reasoning and without."""
    ended: Counter[str] = Counter()
    for number in range(40):
        tool = TOOLS[number % 3]["function"]["name"]
        named = number % 4 == 3
        body: dict[str, Any] = {
            "messages": user("What is the weather in Oslo?"),
            "tools": TOOLS,
            "tool_choice": {"type": "function", "function": {"name": tool}}
            if named
            else "required",
            "temperature": 1.0,
            "seed": number,
            "max_tokens": 200,
            **({} if number % 2 else INSTANT),
            **({"parallel_tool_calls": False} if number % 5 else {}),
        }
        choice = (
            server.stream(CHAT, **body).joined()
            if number % 3 == 0
            else server.answer(CHAT, **body)["choices"][0]
        )
        ended[choice["finish_reason"]] += 1
        calls = choice["message"].get("tool_calls") or []
        if choice["finish_reason"] == "length":  # the last one may be cut
            calls = calls[:-1]
        for call in calls:
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            jsonschema.validate(arguments, PARAMETERS[name])
            assert not named or name == tool
        if choice["finish_reason"] != "length":
            assert choice["finish_reason"] == "tool_calls"
            assert not choice["message"].get("content")
            assert len(calls) >= 1
            assert len(calls) == 1 or not (named or number % 5)
    print(f"\n{dict(ended)}")
    assert ended["tool_calls"] >= 32


def test_replies_at_once_do_not_mix(server):
    """Eight requests with schemas of their own, twice: each reply is the one it has alone."""

    def ask(number: int) -> tuple[Any, Any]:
        _, path, body = schema_prompt(2 * number)
        choice = server.answer(path, **body)["choices"][0]
        return choice["finish_reason"], choice.get("message", choice.get("text"))

    alone = [ask(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone


def test_several_choices_are_each_held_to_the_schema(server):
    """`n: 3` of one prompt."""
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}}
    body = {"messages": user("A number?"), "response_format": by_schema(schema), **INSTANT}
    reply = server.answer(CHAT, **body, n=3, temperature=1.0, seed=1, max_tokens=100)
    for choice in reply["choices"]:
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)


def test_from_the_cache_a_constrained_reply_is_the_same(server):
    """Tokens and log-probabilities, greedy and drawn, JSON and calls."""
    system = {"role": "system", "content": "You know everybody in this town. " * 40}
    forms: list[dict[str, Any]] = [
        {"response_format": {"type": "json_object"}},
        {"response_format": by_schema(a_schema(random.Random(3)))},
        {"tools": TOOLS, "tool_choice": "required"},
    ]
    for number, form in enumerate(forms * 2):
        body = {
            "messages": [system, *user(f"Who is Maya? {number % 3}")],
            "temperature": float(number >= 3),
            "seed": number,
            "max_tokens": 60,
            "logprobs": True,
            **form,
        }
        cold = server.answer(CHAT, **body, cache_prompt=False)
        server.answer(CHAT, **body)
        hot = server.answer(CHAT, **body)
        assert hot["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert without_ids(hot["choices"]) == without_ids(cold["choices"])


def without_ids(choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choices without the names that every call gets anew."""
    for choice in choices:
        for call in choice["message"].get("tool_calls") or ():
            del call["id"]
    return choices


def test_nothing_a_client_biases_or_penalizes_lets_a_reply_out(server):
    """A token with a bias of a hundred that the schema has no place for, and strong penalties."""
    banned = tokens_of(" Hello")[0]
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 4, "maxItems": 4}
    body = {
        "messages": user("Hello"),
        "response_format": by_schema(schema),
        "logit_bias": {str(banned): 100},
        "repetition_penalty": 5.0,
        "frequency_penalty": 2.0,
        "max_tokens": 60,
        **INSTANT,
    }
    choice = server.answer(CHAT, **body)["choices"][0]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), schema)


def test_log_probabilities_of_what_cannot_come_are_finite(server):
    """The mask's minus infinity is no JSON; OpenAI's -9999 stands for it."""
    body = {"messages": user("Hello"), "response_format": by_schema({"const": True}), **INSTANT}
    choice = server.answer(CHAT, **body, logprobs=True, top_logprobs=5)["choices"][0]
    assert choice["message"]["content"] == "true"
    least = [top["logprob"] for e in choice["logprobs"]["content"] for top in e["top_logprobs"]]
    assert min(least) == -9999.0


def test_what_cannot_be_held_is_refused_or_told(server):
    """400 before it starts; an error, and in a stream an event, when nothing can follow."""
    bad = {"messages": user("Hello"), "response_format": by_schema({"type": "nope"})}
    for stream in (False, True):
        refused = server.post(CHAT, **bad, stream=stream)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "response_format"
    dead = {"messages": user("Hi"), "response_format": by_schema({"const": "<think>"}), **INSTANT}
    failed = server.post(CHAT, **dead)
    assert failed.status_code == 400
    assert failed.json()["error"]["code"] == "constraint_failed"
    assert server.stream(CHAT, **dead).events[-1]["error"]["code"] == "constraint_failed"
    good = {"messages": user("Hi"), "response_format": by_schema({"const": 1}), **INSTANT}
    assert server.answer(CHAT, **good)["choices"][0]["message"]["content"] == "1"
