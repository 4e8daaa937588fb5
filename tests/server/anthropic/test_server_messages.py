"""Anthropic's Messages API as its official client sees it, and beside chats of the same conversation."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx2
import pytest
from replies import FUNCTION, cached, content, tools
from servers import CHAT, INSTANT, MESSAGES, events_of, user
from serving.sdk_types import MESSAGE, check_message

COUNT = f"{MESSAGES}/count_tokens"
OFF = {"type": "disabled"}
SYSTEM = "You are a helpful assistant."


@pytest.fixture(scope="module")
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def own(*names: str) -> list[dict[str, Any]]:
    """The functions as Anthropic has them declared."""
    declared = [FUNCTION[name]["function"] for name in names]
    return [
        {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]}
        for f in declared
    ]


def prompt_tokens(usage: Any) -> int:
    """All of a prompt: the three parts that Anthropic counts apart."""
    return usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens


def test_a_message_is_answered_whatever_model_is_named(claude):
    """Text, stop reason, the model that is served, and a prompt's parts that add up."""
    asked: dict[str, Any] = {"model": "claude-opus-9", "max_tokens": 60, "thinking": OFF}
    reply = claude.messages.create(messages=user("Hello, I am Zoe."), **asked)
    assert [block.type for block in reply.content] == ["text"]
    assert reply.content[0].text == "Hello Zoe, how can I help?"
    assert (reply.role, reply.type, reply.stop_reason) == ("assistant", "message", "end_turn")
    assert reply.id.startswith("msg_")
    assert reply.model == "mlx-hybridcache-demo"
    counted = claude.messages.count_tokens(
        model="any", messages=user("Hello, I am Zoe."), thinking=OFF
    )
    assert prompt_tokens(reply.usage) == counted.input_tokens


def test_it_is_the_reply_that_a_chat_gets_and_shares_its_prefix(server, claude):
    """Both ways: begun in one protocol, the next step is hot in the other, with the same prompt."""
    names = ("find_person", "get_price")
    system, question = user(SYSTEM)[0] | {"role": "system"}, user("Where is Omar?")
    first = server.answer(CHAT, messages=[system, *question], tools=tools(*names), **INSTANT)
    (call,) = first["choices"][0]["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    asked: dict[str, Any] = {"model": "m", "max_tokens": 99, "system": SYSTEM, "thinking": OFF}
    again = claude.messages.create(messages=question, tools=own(*names), **asked)
    (block,) = again.content
    assert (block.type, block.name, block.input) == ("tool_use", "find_person", arguments)
    assert again.stop_reason == "tool_use"
    assert again.usage.output_tokens == first["usage"]["completion_tokens"]
    assert prompt_tokens(again.usage) == first["usage"]["prompt_tokens"]
    assert again.usage.cache_read_input_tokens == first["usage"]["prompt_tokens"] - 1
    said = '{"room": "kitchen"}'
    result = {"type": "tool_result", "tool_use_id": block.id, "content": said}
    history = [
        *question,
        {"role": "assistant", "content": [block.model_dump(exclude_none=True)]},
        {"role": "user", "content": [result]},
    ]
    answer = claude.messages.create(messages=history, tools=own(*names), **asked)
    assert answer.content[0].text == "Omar is in the kitchen."
    assert answer.usage.cache_read_input_tokens > prompt_tokens(again.usage) - 10
    assert (
        answer.usage.input_tokens == 1
    )  # the last one, which is always read; the others are stored
    told = [
        {**first["choices"][0]["message"]},
        {"role": "tool", "tool_call_id": call["id"], "content": said},
    ]
    same = server.answer(CHAT, messages=[system, *question, *told], tools=tools(*names), **INSTANT)
    assert content(same) == answer.content[0].text
    assert cached(same) == same["usage"]["prompt_tokens"] - 1
    assert same["usage"]["prompt_tokens"] == prompt_tokens(answer.usage)


def told(claude, **asked: Any) -> tuple[list[Any], Any]:
    """The raw events of a stream, and what the client's own helper makes of the same request."""
    with claude.messages.stream(**asked) as stream:
        for _ in stream:
            pass
        whole = stream.get_final_message()
    return list(claude.messages.create(stream=True, **asked)), whole


def test_a_stream_has_every_event_in_its_order(claude):
    """Thinking with a signature, then a call: blocks begin, grow and stop one after the other."""
    asked: dict[str, Any] = {
        "model": "m",
        "max_tokens": 200,
        "messages": user("Where is Lena?"),
        "tools": own("find_person", "get_time"),
        "tool_choice": {"type": "any"},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    events, whole = told(claude, **asked)
    kinds = [each.type for each in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("message_start") == kinds.count("message_delta") == 1
    assert [block.type for block in whole.content] == ["thinking", "tool_use"]
    open_at, deltas = None, {0: "", 1: ""}
    for each in events[1:-2]:
        if each.type == "content_block_start":
            assert open_at is None
            open_at = each.index
        elif each.type == "content_block_delta":
            assert each.index == open_at
            delta = each.delta
            if delta.type != "signature_delta":
                grown = getattr(delta, "thinking", "") or delta.partial_json
                assert grown
                deltas[each.index] += grown
        else:
            assert (each.type, each.index) == ("content_block_stop", open_at)
            open_at = None
    assert open_at is None
    thought, call = whole.content
    assert deltas[0] == thought.thinking
    assert thought.signature
    assert json.loads(deltas[1]) == call.input == {"person": "Lena"}
    plain = claude.messages.create(**asked)
    assert [block.type for block in plain.content] == ["thinking", "tool_use"]
    assert plain.content[0] == type(plain.content[0])(**thought.model_dump())
    assert plain.stop_reason == events[-2].delta.stop_reason == "tool_use"
    assert events[0].message.usage.cache_read_input_tokens > 0
    assert events[-2].usage.output_tokens == plain.usage.output_tokens
    assert len(kinds) > 8 + len("Lena")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"thinking": OFF, "stop_sequences": [", how"]},
        {"tools": own("find_person"), "tool_choice": {"type": "any"}},
        {"tools": own("find_person"), "tool_choice": {"type": "any"}, "max_tokens": 18},
        {"max_tokens": 1},
    ],
)
def test_events_and_replies_are_what_the_client_says_that_they_are(server, more):
    """To the letter, by its own types, also where a reply ends within a thought or a call's arguments."""
    asked = {"messages": user("Hello, I am Zoe."), "max_tokens": 200, **more}
    events = events_of(server.post(MESSAGES, **asked, stream=True).text)
    check_message(events)
    whole = server.answer(MESSAGES, **asked)
    MESSAGE.validate_python(whole)
    begun = [e["content_block"]["type"] for e in events if e["type"] == "content_block_start"]
    assert [block["type"] for block in whole["content"]] == begun
    assert whole["stop_reason"] == events[-2]["delta"]["stop_reason"]


def test_why_a_reply_ended_is_told(claude):
    """At its length, at a stop text, which is named, or where its turn ends."""
    asked: dict[str, Any] = {"model": "m", "messages": user("Hello, I am Zoe."), "thinking": OFF}
    short = claude.messages.create(max_tokens=2, **asked)
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 2)
    cut = claude.messages.create(max_tokens=60, stop_sequences=["xyz", ", how"], **asked)
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", ", how")
    assert cut.content[0].text == "Hello Zoe"
    _, whole = told(claude, max_tokens=60, stop_sequences=[", how"], **asked)
    assert (whole.stop_reason, whole.stop_sequence) == ("stop_sequence", ", how")
    assert claude.messages.create(max_tokens=60, **asked).stop_sequence is None


def test_the_last_assistant_message_is_gone_on_with(claude):
    """As Anthropic's prefill: what comes is what follows."""
    history = [*user("Hello, I am Zoe."), {"role": "assistant", "content": "Hello Zoe,"}]
    reply = claude.messages.create(model="m", max_tokens=60, messages=history, thinking=OFF)
    assert reply.content[0].text == " how can I help?"


def test_one_call_at_most_and_none_at_all(claude):
    """`disable_parallel_tool_use`, a named tool, and none, which leaves the prompt as it was."""
    asked: dict[str, Any] = {
        "model": "m",
        "max_tokens": 200,
        "messages": user("Where is Lena?"),
        "tools": own("find_person", "get_time"),
        "thinking": OFF,
    }
    one = {"type": "any", "disable_parallel_tool_use": True}
    reply = claude.messages.create(tool_choice=one, **asked)
    assert [block.type for block in reply.content] == ["tool_use"]
    named = claude.messages.create(tool_choice={"type": "tool", "name": "get_time"}, **asked)
    assert named.content[-1].name == "get_time"
    none = claude.messages.create(tool_choice={"type": "none"}, **asked)
    assert [block.type for block in none.content] == ["text"]
    assert none.usage.cache_read_input_tokens == prompt_tokens(none.usage) - 1


def test_a_reply_is_held_to_a_schema(claude):
    """`output_config.format`, under the client's own name for it."""
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Zoe", "Omar"]}},
        "required": ["name"],
        "additionalProperties": False,
    }
    reply = claude.messages.create(
        model="m",
        max_tokens=60,
        messages=user("Hello, I am Zoe."),
        thinking=OFF,
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    assert json.loads(reply.content[0].text)["name"] in {"Zoe", "Omar"}


def test_mistakes_are_told_in_anthropics_shape(claude, server, strict):
    """Each status as the client's own exception, with our sentence in it; other paths keep OpenAI's shape."""
    with pytest.raises(anthropic.BadRequestError, match="messages") as refused:
        claude.messages.create(model="m", max_tokens=0, messages=[])
    assert refused.value.body["type"] == "error"
    assert refused.value.body["error"]["type"] == "invalid_request_error"
    for broken in ({"content": 5}, {"role": "tool", "content": "x"}, {"content": [5]}):
        with pytest.raises(anthropic.BadRequestError):
            claude.messages.create(model="m", max_tokens=9, messages=[user("x")[0] | broken])
    image = {"type": "image", "source": {"type": "url", "url": "https://x.example/y.png"}}
    with pytest.raises(anthropic.BadRequestError, match="image"):
        claude.messages.create(
            model="m", max_tokens=9, messages=[{"role": "user", "content": [image]}]
        )
    gone = server.client.get(f"{MESSAGES}/batches")
    assert (gone.status_code, gone.json()["error"]["type"]) == (404, "not_found_error")
    assert server.client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    asked: dict[str, Any] = {"model": "claude-opus-9", "max_tokens": 9}
    with anthropic.Anthropic(base_url=strict.url, api_key="wrong", max_retries=0) as other:
        with pytest.raises(anthropic.AuthenticationError) as unknown:
            other.messages.create(messages=user("x"), **asked)
        assert unknown.value.body["error"]["type"] == "authentication_error"
    with anthropic.Anthropic(base_url=strict.url, api_key="a-key", max_retries=0) as known:
        with pytest.raises(anthropic.BadRequestError, match="at most 60"):
            known.messages.create(messages=user("word " * 100), **asked)
        with pytest.raises(anthropic.APIStatusError) as large:
            known.messages.create(messages=user("word " * 2000), **asked)
        assert large.value.status_code == 413
        assert large.value.body["error"]["type"] == "request_too_large"
        assert known.messages.create(messages=user("Hi."), **asked).role == "assistant"
        with pytest.raises(anthropic.NotFoundError, match="/no/such"):  # others may be loaded here
            known.messages.create(messages=user("Hi."), max_tokens=9, model="/no/such")
    by_bearer = anthropic.Anthropic(base_url=strict.url, auth_token="a-key", max_retries=0)
    with by_bearer:
        assert (
            by_bearer.messages.count_tokens(model="claude", messages=user("Hi.")).input_tokens > 1
        )


def test_a_client_that_leaves_ends_its_reply(server):
    """Nothing is left running, and the next one is served."""
    body = {"messages": user("x"), "max_tokens": 100_000, "stream": True, "temperature": 0}
    with server.client.stream("POST", MESSAGES, json=body) as response:
        lines = response.iter_lines()
        assert next(line for line in lines if line.startswith("event: message_start"))
    until = httpx2.Timeout(20)
    while server.client.get("/v1/cache/recent", timeout=until).json()["data"][0]["endpoint"] != (
        MESSAGES
    ):
        pass
    assert server.answer(MESSAGES, messages=user("Hi."), max_tokens=3)["type"] == "message"
