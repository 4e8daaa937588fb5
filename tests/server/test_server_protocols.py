"""Seeded conversations in all three protocols: one prompt, one reply, one cache; each reply and event by the clients' own types."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from bundled import text
from long import forms
from replies import tools
from servers import CHAT, MESSAGES, Server, events_of, user
from serving.sdk_types import (
    ANTHROPIC_ERROR,
    CHAT_REPLY,
    MESSAGE,
    OPENAI_ERROR,
    RESPONSE,
    check_chat,
    check_message,
    check_response,
)
from texts.changed_requests import as_messages, as_response

RESPONSES = "/v1/responses"
NAMES = ("find_person", "get_time", "get_price")
PEOPLE = ["Omar", "Lena"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": PEOPLE}},
    "required": ["name"],
}
QUESTIONS = ("Where is Omar?", "What time is it in Oslo?", "Hello, I am Zoe.")

Body = dict[str, Any]


class Drawn(NamedTuple):
    """A chat's messages and tools, and what is asked of its reply."""

    chat: Body
    most: int
    must_call: bool
    parallel: bool
    is_form: bool


class Told(NamedTuple):
    """What a reply comes to in any protocol."""

    text: str
    calls: list[tuple[str, Body]]
    prompt: int
    cached: int
    written: int
    is_cut: bool


def drawn(seed: int) -> Drawn:
    """A conversation of up to two past turns and a call, behind a system prompt that is long for every third seed."""
    draw = random.Random(seed)
    begins = draw.randrange(20_000)
    system = text(400 if seed % 3 == 0 else 8, begins)
    messages = [{"role": "system", "content": system}]
    for _ in range(draw.randrange(3)):
        messages += [
            *user(text(6, draw.randrange(20_000))),
            {"role": "assistant", "content": "Yes."},
        ]
    declared = tools(*draw.sample(NAMES, draw.randint(1, 3))) if draw.random() < 0.7 else []
    messages += user(draw.choice(QUESTIONS))
    if declared and draw.random() < 0.4:
        function = {"name": declared[0]["function"]["name"], "arguments": "{}"}
        call = {"id": f"call_{seed}", "type": "function", "function": function}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": '{"room": "hall"}'})
    return Drawn(
        {"messages": messages, "tools": declared},
        draw.choice([1, 12, 60, 60]),
        bool(declared) and draw.random() < 0.5,
        draw.random() < 0.5,
        not declared and draw.random() < 0.6,
    )


# The same in each protocol


def in_chat(asked: Drawn) -> Body:
    body: Body = {**asked.chat, "max_tokens": asked.most}
    if asked.is_form:
        form = {"name": "a", "schema": SCHEMA, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    if not asked.chat["tools"]:
        return {name: value for name, value in body.items() if name != "tools"}
    must = {"tool_choice": "required"} if asked.must_call else {}
    return {**body, "parallel_tool_calls": asked.parallel, **must}


def in_messages(asked: Drawn) -> Body:
    body = {**as_messages(asked.chat), "max_tokens": asked.most}
    if asked.is_form:
        body["output_config"] = {"format": {"type": "json_schema", "schema": SCHEMA}}
    choice = {"type": "any" if asked.must_call else "auto"}
    return {**body, "tool_choice": {**choice, "disable_parallel_tool_use": not asked.parallel}}


def in_responses(asked: Drawn) -> Body:
    body = {**as_response(asked.chat), "max_output_tokens": asked.most, "store": False}
    if asked.is_form:
        body["text"] = {
            "format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}
        }
    must = {"tool_choice": "required"} if asked.must_call else {}
    return {**body, "parallel_tool_calls": asked.parallel, **must}


def of_chat(reply: Body) -> Told:
    CHAT_REPLY.validate_python(reply)
    (choice,), usage = reply["choices"], reply["usage"]
    functions = [call["function"] for call in choice["message"].get("tool_calls") or ()]
    calls = [(each["name"], json.loads(each["arguments"])) for each in functions]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    counts = (usage["prompt_tokens"], cached, usage["completion_tokens"])
    return Told(
        choice["message"]["content"] or "", calls, *counts, choice["finish_reason"] == "length"
    )


def of_message(reply: Body) -> Told:
    MESSAGE.validate_python(reply)
    usage, blocks = reply["usage"], reply["content"]
    said = "".join(block["text"] for block in blocks if block["type"] == "text")
    calls = [(block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"]
    cached = usage["cache_read_input_tokens"]
    prompt = usage["input_tokens"] + usage["cache_creation_input_tokens"] + cached
    return Told(
        said, calls, prompt, cached, usage["output_tokens"], reply["stop_reason"] == "max_tokens"
    )


def of_response(reply: Body) -> Told:
    RESPONSE.validate_python(reply)
    usage, items = reply["usage"], reply["output"]
    parts = [part for item in items if item["type"] == "message" for part in item["content"]]
    calls = [
        (item["name"], json.loads(item["arguments"]))
        for item in items
        if item["type"] == "function_call"
    ]
    cached = usage["input_tokens_details"]["cached_tokens"]
    counts = (usage["input_tokens"], cached, usage["output_tokens"])
    return Told(
        "".join(part["text"] for part in parts), calls, *counts, reply["status"] == "incomplete"
    )


def chat_events(told: str) -> list[Body]:
    """Of a stream that names none."""
    lines = [line.removeprefix("data: ") for line in told.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


class Protocol(NamedTuple):
    """Where it is asked, how, what a reply comes to, and what the text of a stream has to be."""

    path: str
    asks: Callable[[Drawn], Body]
    reads: Callable[[Body], Told]
    checks: Callable[[str], None]


PROTOCOLS = (
    Protocol(CHAT, in_chat, of_chat, lambda told: check_chat(chat_events(told))),
    Protocol(MESSAGES, in_messages, of_message, lambda told: check_message(events_of(told))),
    Protocol(RESPONSES, in_responses, of_response, lambda told: check_response(events_of(told))),
)


@pytest.fixture(params=["thinks", "instant"])
def either(request: pytest.FixtureRequest) -> Server:
    """With reasoning, and without."""
    found: Server = request.getfixturevalue("server" if request.param == "thinks" else "instant")
    return found


@pytest.mark.parametrize("count", forms(3, 100))
def test_a_conversation_is_one_in_every_protocol(either: Server, count: int) -> None:
    """Text, calls, tokens in and out; all of the prompt is hot in the second and the third; and so it is streamed."""
    for seed in range(count):
        asked = drawn(seed)
        order = random.Random(seed).sample(PROTOCOLS, len(PROTOCOLS))
        found = [each.reads(either.answer(each.path, **each.asks(asked))) for each in order]
        first = found[0]
        for told in found:
            assert told[2:] == (first.prompt, told.cached, first.written, first.is_cut)
            assert told.is_cut or (told.text, told.calls) == (first.text, first.calls), seed
        assert [told.cached for told in found[1:]] == [first.prompt - 1] * 2, seed
        assert not asked.must_call or first.is_cut or first.calls
        assert not asked.is_form or first.is_cut or json.loads(first.text)["name"] in PEOPLE
        for each in order:
            body = {**each.asks(asked), "stream": True}
            with either.client.stream("POST", each.path, json=body) as left:  # in its middle
                next(left.iter_lines())
            each.checks(either.post(each.path, **body).text)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda each: each.path)
def test_every_refusal_is_what_the_clients_types_say(server: Server, protocol: Protocol) -> None:
    """A field of the wrong kind, a length that cannot be, a body that is no JSON, a conversation of nothing."""
    body = protocol.asks(drawn(1))
    said = "input" if protocol.path == RESPONSES else "messages"
    for odd in (
        {said: 5},
        {said: [{"role": 5}]},
        {"tools": "x"},
        {"stream": "perhaps"},
        {said: []},
    ):
        refused = server.post(protocol.path, **{**body, **odd})
        assert refused.status_code == 400, (odd, refused.text)
        check_error(protocol, refused.json())
    broken = server.client.post(protocol.path, content=b"{")
    check_error(protocol, broken.json())


def check_error(protocol: Protocol, told: Body) -> None:
    if protocol.path == MESSAGES:
        ANTHROPIC_ERROR.validate_python(told)
    else:
        OPENAI_ERROR.validate_python(told["error"])
