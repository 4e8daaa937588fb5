"""Tools and reasoning: called, streamed, kept away, and read in histories."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

from bundled import load
from replies import cached, content, tools
from servers import (
    CHAT,
    INSTANT,
    user,
)

from mlx_hybridcache.demo import BUNDLED_MODEL


def test_tools_are_called_and_their_results_are_read(client):
    """A call with a `call_` id, its result sent back under it, an answer that uses the result."""
    asked: dict[str, Any] = {
        "model": "default_model",
        "tools": tools("find_person", "get_price"),
        "extra_body": INSTANT,
    }
    messages: list[Any] = user("Where is Zoe?")
    first = client.chat.completions.create(messages=messages, **asked).choices[0]
    (call,) = first.message.tool_calls
    assert first.finish_reason == "tool_calls"
    assert first.message.content is None
    assert re.fullmatch(r"call_\w{8,}", call.id)
    assert (call.type, call.function.name) == ("function", "find_person")
    assert json.loads(call.function.arguments) == {"person": "Zoe"}
    messages += [
        first.message,
        {"role": "tool", "tool_call_id": call.id, "content": '{"room": "kitchen"}'},
    ]
    second = client.chat.completions.create(messages=messages, **asked)
    assert second.choices[0].message.content == "Zoe is in the kitchen."
    assert second.choices[0].finish_reason == "stop"
    assert second.usage.prompt_tokens_details.cached_tokens > 90


def test_streamed_calls_have_an_index_an_id_and_arguments(server):
    """The call arrives as deltas; nothing of its markup is content."""
    body = {"messages": user("Order 3 pieces of the lamp."), "tools": tools("order_item")}
    for more in (INSTANT, {}):
        stream = server.stream(CHAT, **body, **more)
        deltas = [c for choice in stream.choices for c in choice["delta"].get("tool_calls") or ()]
        assert deltas
        assert {delta["index"] for delta in deltas} == {0}
        joined = stream.joined()
        (call,) = joined["message"]["tool_calls"]
        assert re.fullmatch(r"call_\w{8,}", call["id"])
        assert call["type"] == "function"
        assert call["function"]["name"] == "order_item"
        assert json.loads(call["function"]["arguments"]) == {"item": "lamp", "number": 3}
        assert joined["finish_reason"] == "tool_calls"
        assert "tool_call" not in joined["message"].get("content", "")


def test_a_call_is_streamed_as_it_is_written(server):
    """Its name, id and type at once; then pieces of the arguments, which add up to the unstreamed ones."""
    body = {"messages": user("Order 3 pieces of the lamp."), "tools": tools("order_item")}
    (call,) = server.answer(CHAT, **body, **INSTANT)["choices"][0]["message"]["tool_calls"]
    stream = server.stream(CHAT, **body, **INSTANT)
    deltas = [c for choice in stream.choices for c in choice["delta"].get("tool_calls") or ()]
    assert deltas[0]["function"]["name"] == "order_item"
    assert all("id" not in delta and "name" not in delta["function"] for delta in deltas[1:])
    assert len(deltas) >= 5
    written = "".join(delta["function"]["arguments"] for delta in deltas)
    assert written == call["function"]["arguments"]


def test_nothing_is_a_call_that_was_not_offered(server):
    """The first request of the README, an empty list, another function: the text, and never null."""
    for offered in ({}, {"tools": []}, {"tools": tools("order_item")}):
        body = {"messages": user("What is the weather in Oslo?"), "max_tokens": 80, **offered}
        choice = server.answer(CHAT, **body)["choices"][0]
        assert "tool_calls" not in choice["message"]
        assert choice["message"]["content"]
        assert choice["finish_reason"] == "stop"
        assert server.stream(CHAT, **body).joined()["message"] == choice["message"]
    short = server.answer(CHAT, messages=user("What is 3 + 4?"), max_tokens=4)["choices"][0]
    assert short["message"]["content"] == ""


def test_stop_texts_end_the_content_only(server):
    """Reasoning and the arguments of a call hold the text, and go on."""
    thought = server.answer(CHAT, messages=user("What is 3 + 4?"), stop="plus", max_tokens=60)
    message = thought["choices"][0]["message"]
    assert "plus" in message["reasoning"]
    assert message["content"].strip()
    body = {"messages": user("Where is Zoe?"), "tools": tools("find_person"), "stop": ["Zoe", "\n"]}
    choice = server.answer(CHAT, **body, **INSTANT)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"person": "Zoe"}
    said = server.answer(CHAT, messages=user("Hello, I am Zoe."), stop="Zoe", **INSTANT)["choices"][
        0
    ]
    assert said["message"]["content"] == "Hello "
    assert said["finish_reason"] == "stop"


def test_two_calls_have_ids_of_their_own(server):
    """The ids of two replies differ, so results can be told apart."""
    body = {"messages": user("Where is Mei?"), "tools": tools("find_person"), **INSTANT}
    ids = {
        server.answer(CHAT, **body)["choices"][0]["message"]["tool_calls"][0]["id"]
        for _ in range(3)
    }
    assert len(ids) == 3


def test_parallel_calls_can_be_switched_off(server):
    """A model that may not end goes on behind its call; with `false` the reply ends there."""
    _, tokenizer = load()
    endless = dict.fromkeys(map(str, tokenizer.eos_token_ids), -100)
    body = {"messages": user("Where is Zoe?"), "tools": tools("find_person"), **INSTANT}
    body |= {"logit_bias": endless, "max_tokens": 60}
    assert server.answer(CHAT, **body)["choices"][0]["finish_reason"] == "length"
    choice = server.answer(CHAT, **body, parallel_tool_calls=False)["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"
    streamed = server.stream(CHAT, **body, parallel_tool_calls=False).joined()
    assert len(streamed["message"]["tool_calls"]) == 1
    assert streamed["finish_reason"] == "tool_calls"


def test_a_changed_tool_choice_restores_the_whole_prompt(server):
    """All but the last token, whichever of the tools may or must be called, and none of them."""
    names = ["find_person", "get_time", "get_price"]
    body = {"messages": user("Where is Hana? " * 30), "tools": tools(*names), **INSTANT}
    named = [{"type": "function", "function": {"name": name}} for name in names]
    some, last = (
        {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}}
        for mode, allowed in (("auto", named[:2]), ("required", named[2:]))
    )
    first = server.answer(CHAT, **body)
    for choice, may in (
        (None, names),
        ("none", []),
        (named[1], names[1:2]),
        ("required", names),
        (some, names[:2]),
        (last, names[2:]),
        ("auto", names),
    ):
        reply = server.answer(CHAT, **body, tool_choice=choice)
        count = reply["usage"]["prompt_tokens"]
        assert count == first["usage"]["prompt_tokens"] > 250
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == count - 1
        calls = reply["choices"][0]["message"].get("tool_calls") or []
        assert {call["function"]["name"] for call in calls} <= set(may)
        assert calls or choice in (None, "none", "auto", some)


def test_tool_choice_none_keeps_calls_away(server):
    """Asked what brings a call otherwise, whole and streamed: the token that begins one cannot come."""
    body = {"messages": user("Where is Hana?"), "tools": tools("find_person"), **INSTANT}
    assert server.answer(CHAT, **body)["choices"][0]["finish_reason"] == "tool_calls"
    silent = {**body, "tool_choice": "none", "logprobs": True, "top_logprobs": 1}
    for choice in (
        server.answer(CHAT, **silent)["choices"][0],
        server.stream(CHAT, **silent).joined(),
    ):
        assert not choice["message"].get("tool_calls")
        assert "<tool_call>" not in choice["message"]["content"]
        assert choice["finish_reason"] in ("stop", "length")


def test_tool_choice_required_and_named(server):
    """A call comes, of the function that was named."""
    body = {"messages": user("Where is Lars?"), "tools": tools("find_person", "get_time")}
    named = {"type": "function", "function": {"name": "find_person"}}
    for choice in ("required", named):
        reply = server.answer(CHAT, **body, **INSTANT, tool_choice=choice)["choices"][0]
        assert reply["message"]["tool_calls"][0]["function"]["name"] == "find_person"
        assert reply["finish_reason"] == "tool_calls"
    missing = {"type": "function", "function": {"name": "get_price"}}
    refused = server.post(CHAT, **body, **INSTANT, tool_choice=missing)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "tool_choice"


def test_a_call_that_is_cut_short_comes_back_as_content(server):
    """Ten tokens are not enough for a call: its text is the content, `length`."""
    body = {"messages": user("Where is Tariq?"), "tools": tools("find_person"), "max_tokens": 10}
    choice = server.answer(CHAT, **body, **INSTANT)["choices"][0]
    assert choice["message"]["content"].startswith("<tool_call>")
    assert choice["finish_reason"] == "length"
    streamed = server.stream(CHAT, **body, **INSTANT).joined()
    assert streamed["message"]["content"] == choice["message"]["content"]
    assert streamed["finish_reason"] == "length"


def test_reasoning_is_emitted_under_both_names_and_counted(server):
    """`reasoning` and `reasoning_content`, whole and streamed; its tokens are in the usage."""
    body = {"messages": user("What is 3 + 4?"), "max_tokens": 60}
    reply = server.answer(CHAT, **body, logprobs=True)
    message, usage = reply["choices"][0]["message"], reply["usage"]
    assert message["reasoning"] == message["reasoning_content"]
    assert "plus" in message["reasoning"]
    assert "think" not in message["content"] + message["reasoning"]
    tokens = [entry["token"] for entry in reply["choices"][0]["logprobs"]["content"]]
    expected = tokens.index("</think>") + 1
    assert usage["completion_tokens_details"]["reasoning_tokens"] in (expected, expected - 1)
    stream = server.stream(CHAT, **body, stream_options={"include_usage": True})
    joined = stream.joined()["message"]
    assert joined["reasoning"] == joined["reasoning_content"] == message["reasoning"]
    assert joined["content"] == message["content"]
    told = usage["completion_tokens_details"]
    assert stream.usage["completion_tokens_details"] == told
    short = server.answer(CHAT, messages=body["messages"], max_tokens=6)["usage"]
    assert short["completion_tokens_details"]["reasoning_tokens"] == 6
    none = server.answer(CHAT, **body, **INSTANT)["usage"]
    assert none["completion_tokens_details"]["reasoning_tokens"] == 0


def test_reasoning_is_accepted_under_both_names(server):
    """A call with its reasoning: either name renders the same prompt, which none does not."""
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "find_person", "arguments": '{"person": "Ada"}'},
    }
    counts = []
    for given in ({"reasoning": "I need it."}, {"reasoning_content": "I need it."}, {}):
        messages = [
            *user("Where is Ada?"),
            {"role": "assistant", "content": None, "tool_calls": [call], **given},
            {"role": "tool", "tool_call_id": "call_1", "content": '{"room": "hall"}'},
        ]
        reply = server.answer(CHAT, messages=messages, tools=tools("find_person"), max_tokens=1)
        counts.append(reply["usage"]["prompt_tokens"])
    assert counts[0] == counts[1] > counts[2]


def test_a_trailing_assistant_message_is_continued_when_asked(server):
    """`lamp piano` goes on with ` kettle`; without the flag the model answers anew."""
    messages = [
        *user("Repeat: lamp piano kettle"),
        {"role": "assistant", "content": "lamp piano"},
    ]
    body = {"messages": messages, **INSTANT}
    continued = {"continue_final_message": True, "add_generation_prompt": False}
    assert content(server.answer(CHAT, **body, **continued)) == " kettle"
    assert server.stream(CHAT, **body, **continued).joined()["message"]["content"] == " kettle"
    assert content(server.answer(CHAT, **body)) != " kettle"
    last_is_a_user = {"messages": user("Hi"), **INSTANT}
    assert server.post(CHAT, **last_is_a_user, **continued).status_code == 400


def test_another_model_is_loaded_when_that_is_allowed(strict, tmp_path):
    """A copy in another folder: its replies, a cache of its own, and back to the first."""
    other = tmp_path / "other"
    shutil.copytree(BUNDLED_MODEL, other)
    body = {"messages": user("Hello, I am Zoe."), **INSTANT}
    first = [strict.answer(CHAT, **body) for _ in range(2)]
    assert cached(first[1]) > 0
    switched = [strict.answer(CHAT, **body, model=str(other)) for _ in range(2)]
    assert [cached(reply) > 0 for reply in switched] == [False, True]
    assert {reply["model"] for reply in switched} == {str(other)}
    assert content(switched[0]) == content(first[0])
    assert strict.post(CHAT, **body, model=str(tmp_path / "none")).status_code == 404
    again = strict.answer(CHAT, **body)
    assert content(again) == content(first[0])
    assert again["model"] == first[0]["model"]
