"""Histories, tools and settings that no client should send, and some do: each is read, or refused with a reason."""

from __future__ import annotations

import asyncio
import threading
from typing import Any
from unittest import mock

import pytest
from in_process import Client, served, until
from mlx_hybridcache_server.anthropic import conversation, routes
from mlx_hybridcache_server.anthropic.content import Content
from mlx_hybridcache_server.anthropic.conversation import as_chat, breakpoints
from mlx_hybridcache_server.calls.incoming import Arguments, Begin
from mlx_hybridcache_server.errors import ApiError, shutting_down
from mlx_hybridcache_server.replies import chat
from mlx_hybridcache_server.replies.chat import Breakpoint
from mlx_hybridcache_server.replies.notices import WARNING_HEADER, warning_headers
from mlx_hybridcache_server.schema.messages import MessagesBody
from servers import MESSAGES, events_of, user

MARK = {"cache_control": {"type": "ephemeral"}}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A"}}


def text(said: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **more}


def body(**fields: Any) -> MessagesBody:
    return MessagesBody.model_validate({"messages": user("x"), **fields})


def result(content: Any) -> list[dict[str, Any]]:
    block = {"type": "tool_result", "tool_use_id": "1", "content": content}
    return [{"role": "user", "content": [block]}]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": ["custom"], "name": "f"}]},
        {"tools": [{"type": {}, "name": "f"}]},
        {"tools": [{"name": "f", "description": None, "input_schema": None, "type": None}]},
        {"context_management": {"edits": 5}},
        {"context_management": {"edits": {"type": "x"}}},
        {"context_management": {"edits": [5, None]}},
        {"messages": result({"type": "text", "text": "A single block."})},
        {"messages": result(5)},
        {"messages": result([None, 5, [], {}])},
        {"messages": result([{"type": ["text"], "text": []}])},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "assistant", "content": []}, *user("x")]},
        {"messages": [{"role": "assistant", "content": [{}, {"type": None}, {"type": []}]}]},
        {"messages": [{"role": "system", "content": "Only this."}]},
        {"system": []},
        {"system": [{}, {"type": "image"}, {"text": None}]},
    ],
)
def test_what_is_odd_is_read(server, fields):
    """200, and the count is the prompt's; nothing of it is a failure of ours."""
    asked = {"messages": user("x"), **fields}
    reply = server.post(MESSAGES, max_tokens=1, **asked)
    assert reply.status_code == 200, reply.text
    usage = reply.json()["usage"]
    counted = server.answer(f"{MESSAGES}/count_tokens", **asked)["input_tokens"]
    assert counted == sum(usage[name] for name in usage if name != "output_tokens")


def test_what_a_result_holds_is_not_lost():
    """A block without a list around it; what was found and documents, as a text or as blocks."""
    found = {"type": "search_result", "source": "https://x.example", "content": [text("found")]}
    document = {"type": "document", "source": {"type": "content", "content": "in a document"}}
    for content, expected in (
        (text("alone"), [text("alone")]),
        ([found], [text("found")]),
        ([document], ["in a document"]),
        (5, [5]),
    ):
        (turn,) = as_chat(body(messages=result(content))).messages
        assert turn["content"] == expected


def test_no_number_of_marks_makes_more_than_the_last_beginnings(monkeypatch):
    """Ten thousand marks: four beginnings are put together, not ten thousand of which four are taken."""
    made = []
    turns = conversation._turns
    monkeypatch.setattr(conversation, "_turns", lambda all_: made.append(len(all_)) or turns(all_))
    blocks = [text(str(n), **MARK) for n in range(10_000)]
    asked = body(system=blocks[:5000], messages=[{"role": "user", "content": blocks}])
    chat = as_chat(asked)
    made.clear()
    found = breakpoints(asked, chat)
    assert found[-1] == Breakpoint(None, 300.0)
    inner = [each.beginning for each in found if each.is_boundary]
    assert [len(each.messages[-1]["content"]) for each in inner] == [9996, 9997, 9998, 9999]
    assert len(found) == 6
    assert len(made) == 4


def test_no_number_of_tools_is_looked_at_more_than_once_each(monkeypatch):
    """Ten thousand that are left out: each is judged a few times, not once for each of the others."""
    judged = []
    is_own = conversation._is_own
    monkeypatch.setattr(conversation, "_is_own", lambda tool: judged.append(1) or is_own(tool))
    chat = as_chat(body(tools=[{"type": f"kind_{n}", "name": "f"} for n in range(10_000)]))
    assert len(judged) <= 30_000
    (warning,) = chat.warnings
    assert len(warning) < 500
    assert "9,992 more" in warning


def test_what_is_left_out_is_named_by_names_alone(server):
    """A kind that is no name is a client's text: neither the log nor a header has it, nor what no header may."""
    said = "a secret\x00\x1b\x7f\r\nof ü"
    reply = server.post(
        MESSAGES, messages=user("x"), max_tokens=1, tools=[{"type": said, "name": "f"}]
    )
    assert reply.status_code == 200
    assert "of no known type" in reply.headers[WARNING_HEADER]
    assert "secret" not in server.log
    headers = warning_headers("/", [said])
    assert headers[WARNING_HEADER].isprintable()


def test_a_mark_behind_which_nothing_can_be_asked_fails_no_request(server, strict):
    """A picture of earlier turns, and a prompt that fits as it is and not with another turn behind it."""
    history = [
        {"role": "user", "content": [IMAGE, text("What is this?", **MARK), text("Say it.")]},
        {"role": "assistant", "content": "A lamp."},
        *user("And now?"),
    ]
    assert server.answer(MESSAGES, messages=history, max_tokens=1)["type"] == "message"
    sizes = []
    for count in range(1, 60):
        asked = {"messages": [{"role": "user", "content": [text("a " * count), text("b")]}]}
        reply = strict.post(f"{MESSAGES}/count_tokens", **asked)
        if reply.status_code != 200:
            break
        sizes.append(count)
    marked = [text("a " * sizes[-1], **MARK), text("b")]
    messages = [{"role": "user", "content": marked}]
    assert strict.answer(MESSAGES, messages=messages, max_tokens=1)["type"] == "message"


def test_a_stream_that_is_ended_before_its_prompt_is_read_is_one_all_the_same():
    """Its events are those of an empty message: a beginning first."""

    async def work(serving, app):
        asked = {"messages": user("word " * 30_000), "stream": True, "max_tokens": 9}
        reply = Client(app, MESSAGES, asked)
        await until(lambda: any(run.read_tokens for run in serving.runs))
        (run,) = serving.runs
        assert run.cancel()
        await reply.answer()
        said = b"".join(each.get("body", b"") for each in reply.sent[1:]).decode()
        kinds = [each["type"] for each in events_of(said)]
        assert kinds == ["message_start", "message_delta", "message_stop"]

    served(work)


def test_a_history_is_put_into_a_chat_beside_the_event_loop(monkeypatch):
    """It may be as long as a body, and others are answered meanwhile."""
    threads = []
    as_chat = routes.as_chat
    monkeypatch.setattr(
        routes, "as_chat", lambda each: threads.append(threading.current_thread()) or as_chat(each)
    )

    async def work(serving, app):
        asked = {"messages": user("Hi."), "max_tokens": 1}
        for path in (MESSAGES, f"{MESSAGES}/count_tokens"):
            assert (await Client(app, path, asked).answer()).status == 200

    served(work)
    assert len(threads) == 2
    assert threading.main_thread() not in threads


def test_a_server_that_stops_says_so_while_marks_are_read():
    """Only a beginning that cannot be rendered by itself is passed over."""
    serving = mock.Mock()
    serving.rendering.steps = mock.AsyncMock(side_effect=shutting_down())
    with pytest.raises(ApiError):
        asyncio.run(chat._end(mock.Mock(), [1], None, mock.Mock(), serving, 1))


def test_a_part_without_letters_is_no_event():
    """A call's arguments come in parts, of which one between a brace and a name may be empty."""
    content = Content()
    list(content.add(Begin("find_person", "1")))
    assert [len(list(content.add(Arguments(said)))) for said in ("{", "", "}")] == [1, 0, 1]
