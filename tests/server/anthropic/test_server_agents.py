"""What coding agents send over Anthropic's API: long beginnings, marks, blocks of every kind, tools of all sorts."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import pytest
from in_process import Client, busy, served, until
from mlx_hybridcache_server.anthropic.conversation import as_chat, breakpoints
from mlx_hybridcache_server.replies.notices import WARNING_HEADER
from mlx_hybridcache_server.schema.messages import MessagesBody
from replies import ENDLESS, FUNCTION
from servers import CHAT, MESSAGES, user

MARK = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
EMPTY = {"type": "object", "properties": {}}
LINES = [f"Rule {n}: the lamp of Ada is red, and so is the chair of Omar." for n in range(40)]


def chat(**fields: Any) -> list[dict[str, Any]]:
    """A conversation's messages as a chat's."""
    return as_chat(MessagesBody.model_validate({"messages": user("x"), **fields})).messages


def text(said: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **more}


def test_a_head_request_of_a_client_that_looks_whether_somebody_is_there(server):
    """Claude Code begins so."""
    assert server.client.head("/").status_code == 200


def test_a_coding_agents_request_is_answered_and_what_is_ignored_is_named(server):
    """A body with everything that Claude Code sends, and a step later most of it is restored."""
    declared = [
        {"name": f"tool_{n}", "description": f"Does {n}.", "input_schema": EMPTY} for n in range(24)
    ]
    body: dict[str, Any] = {
        "model": "claude-sonnet-9",
        "max_tokens": 32,
        "system": [
            text("x-anthropic-billing-header: cc_version=9.9.9; cch=00000;"),
            text("You are an agent.", **MARK),
            text("\n".join(LINES), **MARK),
        ],
        "messages": [
            {"role": "user", "content": [text("<reminder>Be brief.</reminder>"), text("Hello.")]},
            {"role": "system", "content": "The day is over."},
        ],
        "tools": [*declared, {"type": "web_search_20250305", "name": "web_search"}],
        "thinking": {"type": "adaptive", "display": "omitted"},
        "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]},
        "output_config": {"effort": "medium"},
        "metadata": {"user_id": "user_1_session_2"},
        "betas": ["interleaved-thinking"],
        "stream": False,
    }
    reply = server.client.post(f"{MESSAGES}?beta=true", json=body)
    assert reply.status_code == 200, reply.text
    warned = reply.headers[WARNING_HEADER]
    for name in ("web_search_20250305", "context_management", "reasoning_effort"):
        assert name in warned
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    quiet = {**body, "context_management": edits, "output_config": None, "tools": declared}
    first = server.client.post(MESSAGES, json=quiet)
    assert WARNING_HEADER not in first.headers
    prompt = first.json()["usage"]["cache_read_input_tokens"]
    assert prompt > 500
    history = [
        *body["messages"],
        {"role": "assistant", "content": first.json()["content"]},
        *user("Go on."),
    ]
    next_step = server.answer(MESSAGES, **{**quiet, "messages": history})
    assert next_step["usage"]["cache_read_input_tokens"] >= prompt


def test_what_is_marked_within_a_message_is_a_checkpoint(server):
    """Two prompts that part ways behind a mark, in the middle of the system's text: the second one is
    restored there. Without marks such a prompt goes on from where it has a checkpoint anyway.
    """

    def restored(salt: str, marks: dict[str, Any], *endings: str) -> list[int]:
        return [
            server.answer(
                MESSAGES,
                system=[text("\n".join(LINES), **marks), text(ending)],
                messages=user("Hello."),
                max_tokens=1,
                cache_salt=salt,
            )["usage"]["cache_read_input_tokens"]
            for ending in endings
        ]

    (marked,) = restored("marked", MARK, "It is Monday.", "Now it is Tuesday.")[1:]
    (unmarked,) = restored("unmarked", {}, "It is Monday.", "Now it is Tuesday.")[1:]
    beginning = server.answer(
        f"{MESSAGES}/count_tokens", system="\n".join(LINES), messages=user("Hello.")
    )["input_tokens"]
    empty = server.answer(f"{MESSAGES}/count_tokens", messages=user("Hello."))["input_tokens"]
    assert beginning - empty - 10 <= marked <= beginning
    assert unmarked < marked


@pytest.mark.parametrize("ttl", ["5m", "1h"])
def test_marks_keep_for_their_time_what_stands_before_them(server, ttl):
    """Behind the system's only block and behind the question: told in the account and in /v1/cache."""
    salt = f"kept {ttl}"
    mark = {"cache_control": {"type": "ephemeral", "ttl": ttl}}
    asked = {
        "system": [text("\n".join(LINES), **mark)],
        "messages": [{"role": "user", "content": [text("Where is Omar?", **mark)]}],
        "max_tokens": 1,
        "cache_salt": salt,
    }
    before = server.client.get("/v1/cache").json()
    for _ in range(2):
        server.answer(MESSAGES, **asked)
        recent = server.client.get("/v1/cache/recent").json()["data"][0]
        assert recent["soft_pins"] == 2
    assert recent["restored_tokens"] == recent["prompt_tokens"] - 1
    figures = server.client.get("/v1/cache").json()
    assert figures["soft_pinned"] == before["soft_pinned"] + 2
    assert 0 < figures["soft_pinned_bytes"] <= figures["budget_bytes"] // 2
    assert figures["stable_prefix"] is None


def test_a_request_may_ask_for_all_of_its_prompt_to_be_kept(server):
    """`cache_control` beside the messages, and OpenAI's `prompt_cache_retention` of 24 hours; else it is said."""

    def kept(where, **more):
        reply = server.post(where, cache_salt=f"{where} {more}", **more)
        assert reply.status_code == 200, reply.text
        told = reply.headers.get(WARNING_HEADER, "")
        return server.client.get("/v1/cache/recent").json()["data"][0]["soft_pins"], told

    said = {"messages": user("Where is Omar?"), "max_tokens": 1}
    assert kept(MESSAGES, cache_control={"type": "ephemeral"}, **said)[0] == 1
    assert kept(MESSAGES, **said)[0] == 0
    written = {"input": "Where is Omar?", "max_output_tokens": 1, "store": False}
    for where, asked in ((CHAT, said), ("/v1/responses", written)):
        assert kept(where, prompt_cache_retention="24h", **asked) == (1, "")
        assert kept(where, prompt_cache_retention="in_memory", prompt_cache_key="a", **asked) == (
            0,
            "",
        )
        pins, told = kept(where, prompt_cache_retention="for ever", **asked)
        assert (pins, "prompt_cache_retention" in told) == (0, True)


def test_marks_name_the_beginnings_of_a_conversation():
    """Of tools, and of blocks that others follow; the last four of more. Ends of messages need none."""
    body = MessagesBody.model_validate(
        {
            "system": [text("a", **MARK), text("b", **MARK)],
            "tools": [{"name": "f", "input_schema": EMPTY, **MARK}],
            "messages": [
                {"role": "user", "content": [text("c", **MARK), text("d", **MARK)]},
                {"role": "assistant", "content": [text("e", **MARK)]},
                {"role": "user", "content": [text(str(n), **MARK) for n in range(3)]},
            ],
        }
    )
    every = breakpoints(body, as_chat(body))
    found = [each.beginning for each in every if each.is_boundary]
    ends = [
        each.beginning and len(each.beginning.messages) for each in every if not each.is_boundary
    ]
    assert ends == [2, 3, 4, None]
    assert {each.seconds for each in every} == {3600.0}
    contents = [[message["content"] for message in each.messages] for each in found]
    assert [len(each) for each in contents] == [1, 3, 5, 5]
    assert contents[0] == ["a"]
    assert [part["text"] for part in contents[1][-1]] == ["c"]
    assert [part["text"] for part in contents[3][-1]] == ["0", "1"]
    assert all(each.tools for each in found)
    plain = MessagesBody.model_validate({"messages": user("x"), "system": "s"})
    assert breakpoints(plain, as_chat(plain)) == []


def test_results_are_turns_of_their_own_in_the_order_in_which_they_stand():
    """Text before, between and behind them stays there; errors are said, and images become sentences later."""
    image = {"type": "image", "source": {"type": "base64", "data": "AA"}}
    blocks = [
        text("before"),
        {"type": "tool_result", "tool_use_id": "1", "content": "one"},
        {"type": "tool_result", "tool_use_id": "2", "content": [text("two"), image]},
        {"type": "tool_result", "tool_use_id": "3", "is_error": True, "content": "no such file"},
        {"type": "tool_result", "tool_use_id": "4", "is_error": True},
        {"type": "tool_result", "tool_use_id": "5"},
        text("behind"),
    ]
    turns = chat(messages=[{"role": "user", "content": blocks}])
    assert [turn["role"] for turn in turns] == ["user", *["tool"] * 5, "user"]
    assert [turn.get("tool_call_id") for turn in turns[1:-1]] == ["1", "2", "3", "4", "5"]
    assert turns[1]["content"] == ["one"]
    assert turns[2]["content"] == [text("two"), image]
    assert turns[3]["content"] == ["Error: ", "no such file"]
    assert (turns[4]["content"], turns[5]["content"]) == (["Error"], [])


def test_an_image_in_a_result_fails_no_turn(server):
    """It is a sentence in the prompt, at once and in every later turn."""
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A"}}
    history: list[dict[str, Any]] = [
        *user("Where is Omar?"),
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "1", "name": "look", "input": {}}],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "1", "content": [image]}],
        },
    ]
    first = server.answer(MESSAGES, messages=history, max_tokens=4)
    later = [*history, {"role": "assistant", "content": first["content"]}, *user("And now?")]
    assert server.answer(MESSAGES, messages=later, max_tokens=4)["type"] == "message"


def test_assistants_blocks_come_back_as_they_were_told():
    """Thoughts with their signatures, text and calls; redacted thoughts are left out."""
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        {"type": "redacted_thinking", "data": "x"},
        text("I look."),
        {"type": "tool_use", "id": "1", "name": "f", "input": {"a": [1, {"b": None}]}},
    ]
    (turn,) = chat(messages=[{"role": "assistant", "content": blocks}])
    assert turn["content"] == [blocks[0], blocks[2]]
    (call,) = turn["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {"a": [1, {"b": None}]}}


def test_documents_are_text_where_they_hold_text():
    """As text, as blocks; of another kind they stay a part that prompts put a sentence for."""
    pdf = {"type": "document", "source": {"type": "base64", "data": "AA"}}
    blocks = [
        {"type": "document", "source": {"type": "text", "data": "one"}},
        {"type": "document", "source": {"type": "content", "content": [text("two")]}},
        pdf,
    ]
    (turn,) = chat(messages=[{"role": "user", "content": blocks}])
    assert turn["content"] == ["one", text("two"), pdf]


def test_tools_are_declared_as_a_chat_declares_them():
    """The same object with its keys in the same order, so that both have the same prompt."""
    own = FUNCTION["find_person"]["function"]
    tool = {
        "input_schema": own["parameters"],
        "name": own["name"],
        "description": own["description"],
        "strict": True,
        **MARK,
    }
    body = MessagesBody.model_validate({"messages": user("x"), "tools": [tool]})
    assert json.dumps(as_chat(body).tools) == json.dumps([FUNCTION["find_person"]])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("system", 5),
        ("system", [5]),
        ("tools", [{"input_schema": {}}]),
        ("tools", [{"name": "f", "input_schema": []}]),
        ("tools", [{"name": 5}]),
        ("tool_choice", {"type": "some"}),
        ("tool_choice", {"type": "tool"}),
        ("tool_choice", {"type": "tool", "name": ""}),
        ("tool_choice", {"type": "any"}),
        ("thinking", {"type": "enabled", "budget_tokens": -1}),
        ("output_config", {"format": {"type": "json_schema"}}),
        ("stop_sequences", [""]),
        ("temperature", -1),
        ("messages", [{"role": "user", "content": [{"type": "tool_use", "name": 5}]}]),
        ("messages", [{"role": "user"}]),
        ("messages", "x"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_name(server, name, value):
    """400 in Anthropic's shape, never a failure; the server goes on."""
    reply = server.post(MESSAGES, **{"messages": user("x"), "max_tokens": 1, name: value})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert name in error["message"]


def test_a_stream_that_waits_pings_and_says_why_it_ends():
    """Queued behind another: pings until its turn. What fails in the stream is an error event."""

    async def work(serving, app):
        first = Client(app, "/v1/completions", {"prompt": "x", **ENDLESS, "stream": True})
        await until(lambda: any(run.count.completion for run in serving.runs))
        body = {"messages": user("Hi."), "max_tokens": 1, "stream": True}
        second = Client(app, MESSAGES, body)
        said = lambda: b"".join(each.get("body", b"") for each in second.sent[1:])  # noqa: E731
        ping = b'event: ping\ndata: {"type":"ping"}\n\n'
        await until(lambda: said().count(ping) >= 3)
        assert b"message_start" not in said()
        first.leave()
        await second.answer()
        assert said().endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
        with ExitStack() as held:
            await serving.slot.any_model(held)
            lost = Client(app, MESSAGES, {**body, "model": "/nowhere/at/all"})
            await until(lambda: b"".join(each.get("body", b"") for each in lost.sent[1:]))
        await lost.answer()
        (*_, last) = b"".join(each.get("body", b"") for each in lost.sent[1:]).split(b"\n\n")[:-1]
        assert lost.status == 200
        assert last.startswith(
            b'event: error\ndata: {"type":"error","error":{"type":"not_found_error"'
        )
        await until(lambda: not busy(serving))

    served(
        work, "--keepalive-seconds", "0.02", "--decode-concurrency", "1", "--allow-model-switching"
    )
