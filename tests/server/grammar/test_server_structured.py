"""Replies of a server held to a schema, and calls that must come: every one that ends by itself is what was asked for."""

from __future__ import annotations

import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
from long import forms
from servers import CHAT, COMPLETIONS, INSTANT, user
from texts.constraints import (
    PARAMETERS,
    TOOLS,
    a_schema,
    by_schema,
    tokens_of,
)


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


@pytest.mark.parametrize("prompts", forms(20, 200))
def test_every_reply_to_a_schema_prompt_that_ends_by_itself_is_valid(server, prompts):
    """At temperature 1, with and without reasoning, streamed and not; most do end by themselves."""
    ended: Counter[str] = Counter()
    reasoned = 0
    for number in range(prompts):
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
    assert ended["stop"] >= 0.9 * prompts
    assert ended.keys() <= {"stop", "length"}
    assert reasoned > 0


def test_a_completion_may_hold_the_text_of_a_marker(server):
    """It is text; only chats have parts."""
    wanted = {"a": "<think><tool_call></think>"}
    body = {"prompt": "JSON:", "response_format": by_schema({"const": wanted}), "max_tokens": 60}
    choice = server.answer(COMPLETIONS, **body)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["text"]) == wanted


@pytest.mark.parametrize(
    ("replies", "whole"), [(8, 6), pytest.param(40, 32, marks=pytest.mark.long)]
)
def test_every_forced_call_that_ends_by_itself_obeys_its_schema(server, replies, whole):
    """Eight or forty at temperature 1: required, named, one or several, streamed and not, with reasoning and without."""
    ended: Counter[str] = Counter()
    for number in range(replies):
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
    assert ended["tool_calls"] >= whole


@pytest.mark.parametrize("count", forms(5, 8))
def test_replies_at_once_do_not_mix(server, count):
    """Five or eight requests with schemas of their own, twice: each reply is the one it has alone."""

    def ask(number: int) -> tuple[Any, Any]:
        _, path, body = schema_prompt(2 * number)
        choice = server.answer(path, **body)["choices"][0]
        return choice["finish_reason"], choice.get("message", choice.get("text"))

    alone = [ask(number) for number in range(count)]
    with ThreadPoolExecutor(count) as pool:
        assert list(pool.map(ask, range(count))) == alone


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
    system = {"role": "system", "content": "You know everybody in this town. " * 15}
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
