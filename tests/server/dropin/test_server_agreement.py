"""The same requests to ours and to mlx_lm.server: equal replies, whole and streamed."""

from __future__ import annotations

import re
from typing import Any

import pytest
from servers import (
    CHAT,
    COMPLETIONS,
    INSTANT,
    OURS,
    THEIRS,
    raw_exchange,
    raw_post,
    raw_status,
    running,
    user,
)
from serving.comparing import (
    CALLED,
    FIRST_TURN,
    PARTS,
    RAW,
    RESULT,
    THOUGHT,
    disagreements,
    essence,
    offering,
)
from texts import strict

# Every case asks another question: repeating some of them would end mlx_lm.server.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "a chat": (CHAT, {"messages": user("Hello, I am Zoe."), **INSTANT}),
    "the shorter path": ("/chat/completions", {"messages": user("Hi, I am Yuki."), **INSTANT}),
    "reasoning": (CHAT, {"messages": user("Good morning, I am Leo."), "max_tokens": 60}),
    "reasoning cut short": (CHAT, {"messages": user("What is 3 + 4?"), "max_tokens": 6}),
    "a system message": (
        CHAT,
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                *user("Which is the first of saw, rope, tent?"),
            ],
            **INSTANT,
        },
    ),
    "a second turn": (
        CHAT,
        {"messages": [*FIRST_TURN, *user("Which colour is the lamp of Ada?")], **INSTANT},
    ),
    "reasoning in the history": (
        CHAT,
        {"messages": [*user("Add 5 and 4."), THOUGHT, *user("Hello, I am Emil.")], **INSTANT},
    ),
    "content in parts": (CHAT, {"messages": [{"role": "user", "content": PARTS}], **INSTANT}),
    "an assistant message last": (
        CHAT,
        {"messages": [*user("Repeat: oven"), {"role": "assistant", "content": "oven"}], **INSTANT},
    ),
    "a tool call": (
        CHAT,
        {"messages": user("Where is Hugo?"), **offering("find_person", "get_price"), **INSTANT},
    ),
    "a tool call after reasoning": (
        CHAT,
        {"messages": user("Order 7 pieces of the piano."), **offering("order_item")},
    ),
    "a tool's result": (
        CHAT,
        {
            "messages": [*user("Where is Nora?"), CALLED, RESULT],
            **offering("find_person"),
            **INSTANT,
        },
    ),
    "tools that are not called": (
        CHAT,
        {"messages": user("Hello, I am Hana."), **offering("get_time"), **INSTANT},
    ),
    "tool_choice auto": (
        CHAT,
        {
            "messages": user("How much is a violin?"),
            **offering("get_price", tool_choice="auto"),
            **INSTANT,
        },
    ),
    "max_completion_tokens": (
        CHAT,
        {"messages": user("What does len do in Python?"), "max_completion_tokens": 5, **INSTANT},
    ),
    "a stop word": (
        CHAT,
        {"messages": user("What does abs do in Python?"), "stop": [" value"], **INSTANT},
    ),
    "stop words that ask for nothing": (
        CHAT,
        {"messages": user("Hello, I am Ines."), "stop": [""], **INSTANT},
    ),
    "a stop word that asks for nothing": (
        CHAT,
        {"messages": user("Hello, I am Juri."), "stop": "", **INSTANT},
    ),
    "unknown fields": (
        CHAT,
        {"messages": user("Hi, I am Raj."), "user": "u", "metadata": {"a": "b"}, **INSTANT},
    ),
    "logprobs": (
        CHAT,
        {"messages": user("Repeat: red lamp"), "logprobs": True, **INSTANT},
    ),
    "top_logprobs": (
        CHAT,
        {"messages": user("Repeat: pink boat"), "logprobs": True, "top_logprobs": 5, **INSTANT},
    ),
    "a completion": (COMPLETIONS, {"prompt": RAW, "max_tokens": 24}),
    "a completion of one token": (COMPLETIONS, {"prompt": "import", "max_tokens": 1}),
    "penalties": (
        COMPLETIONS,
        {
            "prompt": "If a name is bound in a block,",
            "max_tokens": 24,
            "repetition_penalty": 1.3,
            "repetition_context_size": 10,
            "presence_penalty": 0.4,
            "presence_context_size": 8,
            "frequency_penalty": 0.3,
            "frequency_context_size": 12,
        },
    ),
    "a bias": (
        COMPLETIONS,
        {"prompt": "for x in range", "max_tokens": 6, "logit_bias": {"700": 100, "12": -3.5}},
    ),
    "a seeded sample": (
        COMPLETIONS,
        {"prompt": "class Lamp:", "max_tokens": 20, "temperature": 1.0, "seed": 3},
    ),
    "a seeded sample from the likeliest": (
        COMPLETIONS,
        {
            "prompt": "def area(",
            "max_tokens": 20,
            "temperature": 0.8,
            "top_p": 0.9,
            "top_k": 30,
            "min_p": 0.01,
            "seed": 2**31,
        },
    ),
    "a seeded sample without the top choices": (
        COMPLETIONS,
        {
            "prompt": "while True:",
            "max_tokens": 20,
            "temperature": 1.0,
            "xtc_probability": 0.5,
            "xtc_threshold": 0.05,
            "seed": 11,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_replies_agree_field_by_field(case, theirs, ours):
    """Text, reasoning, calls, finish reasons, token counts and every float of a logprob."""
    path, body = CASES[case]
    body = {"model": "default_model", **body}
    expected, reply = (server.answer(path, **body) for server in (theirs, ours))
    assert not list(disagreements(expected, reply)), f"{expected}\n{reply}"


@pytest.mark.parametrize("case", CASES)
def test_streams_agree_with_theirs_and_with_the_reply_that_is_not_streamed(case, theirs, ours):
    """The deltas add up to the same choice; usage comes in a last chunk of its own; [DONE] ends it."""
    path, body = CASES[case]
    body = {"model": "default_model", "stream_options": {"include_usage": True}, **body}
    expected, stream = (server.stream(path, **body) for server in (theirs, ours))
    assert stream.done
    assert expected.done
    assert essence(stream.joined()) == essence(expected.joined())
    assert not list(disagreements(expected.usage, stream.usage))
    assert stream.events[-1]["choices"] == []
    assert stream.headers["content-type"].startswith(expected.headers["content-type"])
    whole = ours.answer(path, **{**body, "stream": False, "stream_options": None})
    assert essence(stream.joined()) == essence(whole["choices"][0])


@pytest.fixture(scope="module")
def strict_servers():
    model = ("--model", str(strict.directory()))
    with running(THEIRS, *model) as theirs, running(OURS, *model) as ours:
        yield theirs, ours


UNDER_A_STRICT_TEMPLATE = [
    "a chat",
    "reasoning",
    "reasoning cut short",
    "a system message",
    "a second turn",
    "reasoning in the history",
    "content in parts",
    "a tool's result",
    "tools that are not called",
    "logprobs",
]


@pytest.mark.parametrize("case", UNDER_A_STRICT_TEMPLATE)
def test_replies_agree_under_a_strict_template(case, strict_servers):
    """Prompts that begin inside of reasoning, arguments as mappings, calls in XML: the same fields."""
    path, body = CASES[case]
    body = {"model": "default_model", **body}
    expected, reply = (server.answer(path, **body) for server in strict_servers)
    assert not list(disagreements(expected, reply)), f"{expected}\n{reply}"


def test_streams_without_include_usage_carry_none(theirs, ours):
    """No chunk with `usage`, no chunk without choices."""
    for server in (theirs, ours):
        stream = server.stream(CHAT, messages=user("Repeat: one bicycle"), **INSTANT)
        assert stream.usage is None
        assert len(stream.events) > 1
        assert all(event["choices"] for event in stream.events)


def test_keepalives_tell_how_much_of_the_prompt_was_read(theirs, ours):
    """`: keepalive read/total`, ascending; at the last one at most the last token is unread."""
    body = {"prompt": " ".join(f"word {i}" for i in range(200)), "max_tokens": 2}
    for server in (theirs, ours):
        stream = server.stream(COMPLETIONS, **body)
        told = [re.fullmatch(r"keepalive (\d+)/(\d+)", comment) for comment in stream.comments]
        assert told
        assert all(told)
        read = [(int(t[1]), int(t[2])) for t in told if t]
        assert read == sorted(read)
        assert read[-1][0] >= read[-1][1] - 1


def test_what_both_refuse_gets_the_same_status(theirs, ours):
    """400 for a number out of range or a wrong type, 404 for a path or a model that is not there."""
    hello = user("Hello, I am Ivan.")
    refused: list[dict[str, Any]] = [
        {"messages": hello, "max_tokens": 0},
        {"messages": hello, "max_tokens": "5"},
        {"messages": hello, "temperature": -1},
        {"messages": hello, "top_p": 1.5},
        {"messages": hello, "top_k": -1},
        {"messages": hello, "min_p": 2},
        {"messages": hello, "repetition_penalty": -1},
        {"messages": hello, "repetition_context_size": -1},
        {"messages": hello, "presence_penalty": "x"},
        {"messages": hello, "xtc_probability": 1.5},
        {"messages": hello, "top_logprobs": -2},
        {"messages": hello, "logprobs": "yes"},
        {"messages": hello, "logit_bias": {"x": 1}},
        {"messages": hello, "logit_bias": [1]},
        {"messages": hello, "seed": "x"},
        {"messages": hello, "model": 5},
        {"messages": hello, "stream": "yes"},
        {"messages": hello, "model": "nobody/has-this"},
        {},
    ]
    for body in refused:
        statuses = [server.post(CHAT, **body).status_code for server in (theirs, ours)]
        assert statuses[0] == statuses[1] >= 400, body
    assert [s.client.get("/v1/nothing").status_code for s in (theirs, ours)] == [404, 404]
    assert [s.post("/v1/nothing").status_code for s in (theirs, ours)] == [404, 404]
    for body in (b"{", b"[1]", b'"text"', b""):
        sent = raw_post(CHAT, body, Content_Length=str(len(body)))
        assert [raw_status(raw_exchange(s, sent)) for s in (theirs, ours)] == [400, 400], body


def test_health_and_preflight_agree(theirs, ours):
    """200 with `{"status": "ok"}`, and 204."""
    assert [s.client.get("/health").json() for s in (theirs, ours)] == [{"status": "ok"}] * 2
    assert [s.client.options(CHAT).status_code for s in (theirs, ours)] == [204, 204]
