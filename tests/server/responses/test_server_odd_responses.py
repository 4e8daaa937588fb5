"""Items and settings that no client should send, and what is told of them, by the client's own types to the letter."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from in_process import Client, busy, served, until
from mlx_hybridcache_server.calls.incoming import Arguments, Begin
from mlx_hybridcache_server.replies.notices import WARNING_HEADER
from mlx_hybridcache_server.responses import routes
from mlx_hybridcache_server.responses.conversation import turns
from mlx_hybridcache_server.responses.output import Output
from replies import ENDLESS, FUNCTION
from servers import COMPLETIONS, events_of
from serving.sdk_types import RESPONSE, RESPONSE_ITEMS, check_response

RESPONSES = "/v1/responses"
TOOLS = [{"type": "function", **FUNCTION[name]["function"]} for name in ("find_person", "get_time")]


def told(reply: Client) -> list[dict[str, Any]]:
    return events_of(b"".join(each.get("body", b"") for each in reply.sent[1:]).decode())


@pytest.mark.parametrize(
    "fields",
    [
        {"input": [{"type": "reasoning", "content": 5, "summary": 5}]},
        {"input": [{"type": "reasoning", "content": {"a": 1}, "summary": [None, 5]}]},
        {"input": [{"type": None, "role": "user", "content": "x"}]},
        {"input": [{"role": "user", "content": []}]},
        {"input": [{"role": "assistant", "content": [{"type": "output_text"}]}]},
        {"input": [{"type": "function_call_output", "call_id": None, "output": {"a": 1}}]},
        {"input": [{"type": "function_call_output", "output": [None, 5, {}]}]},
        {"input": [{"type": "function_call", "name": "f", "arguments": 5}]},
        {"input": [{"type": "custom_tool_call", "name": "f", "input": None}]},
        {"input": [{"type": "web_search_call"}, {"type": "web_search_call"}]},
        {"input": "x", "tools": [{"type": "f\u0001\u001b"}]},
        {"input": "x", "metadata": {"a": {"b": [1]}}},
        {"input": ""},
    ],
)
def test_what_is_odd_is_read(server, fields):
    """200; nothing of it is a failure of ours."""
    reply = server.post(RESPONSES, max_output_tokens=1, **fields)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tools": [{"type": "custom", "name": "patch", "format": {"type": "grammar"}}]}, "patch"),
        ({"text": {"verbosity": "low"}}, "verbosity"),
        ({"include": ["message.output_text.logprobs"]}, "top_logprobs"),
        ({"tools": [{"type": "custom", "name": "patch", "format": {"type": "text"}}]}, None),
        ({"text": {"verbosity": "medium"}}, None),
    ],
)
def test_what_would_change_the_reply_and_is_not_followed_is_said(server, fields, said):
    """A grammar for a tool's text, a short text, log-probabilities; nothing of what is so anyway."""
    warning = server.post(RESPONSES, input="x", max_output_tokens=1, **fields).headers.get(
        WARNING_HEADER
    )
    assert (warning is None) if said is None else (said in warning)


def test_thoughts_are_read_in_time_that_grows_with_them():
    """A hundred thousand in a row are parts of one turn: none is copied for each of the others."""
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "t"}]}
    (turn,) = turns([thought] * 100_000)
    assert len(turn["content"]) == 100_000


def test_an_output_that_is_no_text_leaves_a_part_that_prompts_put_a_sentence_for():
    """It is not dropped."""
    (turn,) = turns([{"type": "function_call_output", "call_id": "1", "output": {"a": 1}}])
    assert turn["content"] == [{"a": 1}]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": {"type": "function", "name": "get_time"}},
        {"tools": TOOLS, "max_output_tokens": 12},
        {
            "tools": [{"type": "custom", "name": "find_person"}],
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "custom", "name": "find_person"}],
            },
        },
        {"include": ["reasoning.encrypted_content"]},
        {"text": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        {"text": {"format": {"type": "json_object"}}, "reasoning": {"effort": "low"}},
        {"max_output_tokens": 1},
    ],
)
def test_every_reply_and_event_is_what_the_clients_types_say(server, fields):
    """All required fields, by their values too: streamed, whole, and asked for again."""
    asked = {"input": "Where is Lena?", "max_output_tokens": 120, **fields}
    whole = server.answer(RESPONSES, **asked)
    RESPONSE.validate_python(whole)
    events = events_of(server.post(RESPONSES, stream=True, **asked).text)
    check_response(events)
    own = events[-1]["response"]
    assert [each["type"] for each in own["output"]] == [each["type"] for each in whole["output"]]
    kept = server.client.get(f"{RESPONSES}/{own['id']}").json()
    assert kept == own
    items = server.client.get(f"{RESPONSES}/{own['id']}/input_items").json()
    RESPONSE_ITEMS.validate_python(items)


def test_what_was_added_is_listed_in_either_order(server):
    """Newest first unless asked; texts are parts."""
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    name = server.answer(RESPONSES, input=asked, max_output_tokens=1)["id"]
    newest = server.client.get(f"{RESPONSES}/{name}/input_items").json()["data"]
    oldest = server.client.get(f"{RESPONSES}/{name}/input_items?order=asc").json()["data"]
    assert newest == oldest[::-1]
    assert [each["content"][0]["type"] for each in oldest] == ["input_text", "output_text"]


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_what_was_added_is_listed_in_pages(server, order):
    """Twenty-five items: twenty at first, and all of them once in pages of seven; ids say where one ended."""
    asked = [{"role": "user", "content": f"a{n}"} for n in range(25)]
    name = server.answer(RESPONSES, input=asked, max_output_tokens=1)["id"]
    where = f"{RESPONSES}/{name}/input_items?order={order}"
    first = server.client.get(where).json()
    assert (len(first["data"]), first["has_more"]) == (20, True)
    whole = server.client.get(f"{where}&limit=100").json()
    assert (len(whole["data"]), whole["has_more"]) == (25, False)
    assert not server.client.get(f"{where}&limit=25").json()["has_more"]
    said = [each["content"][0]["text"] for each in whole["data"]]
    assert said == [f"a{n}" for n in (range(25) if order == "asc" else range(24, -1, -1))]
    pages, after = [], ""
    while not pages or pages[-1]["has_more"]:
        pages.append(server.client.get(f"{where}&limit=7{after}").json())
        assert pages[-1]["last_id"] == pages[-1]["data"][-1]["id"]
        after = f"&after={pages[-1]['last_id']}"
    assert [len(page["data"]) for page in pages] == [7, 7, 7, 4]
    assert [each for page in pages for each in page["data"]] == whole["data"]
    behind = server.client.get(f"{where}{after}").json()
    assert (behind["data"], behind["has_more"], behind["last_id"]) == ([], False, None)
    for wrong, status in (("limit=0", 400), ("limit=101", 400), ("limit=x", 400), ("after=x", 404)):
        refused = server.client.get(f"{where}&{wrong}")
        assert refused.status_code == status
        assert wrong.partition("=")[0] in refused.text


def test_truncation_is_not_followed_and_that_is_said(server):
    """A history is never cut; a prompt that is too long is refused."""
    reply = server.post(RESPONSES, input="x", max_output_tokens=1, truncation="auto")
    assert "truncation" in reply.headers[WARNING_HEADER]


def test_a_stream_that_fails_ends_what_it_had_begun():
    """An item that was being written is there with its text, incomplete; the code is one that clients know."""

    async def work(serving, app):
        reply = Client(app, RESPONSES, {"input": "word " * 3000, "stream": True})
        await until(lambda: any(run.count.completion > 2 for run in serving.runs))
        serving.stop()
        await reply.answer()
        events = told(reply)
        check_response(events)
        assert events[-1]["type"] == "response.failed"
        response = events[-1]["response"]
        assert response["error"]["code"] == "server_error"
        (item,) = response["output"]
        assert item["status"] == "incomplete"
        assert item["content"][0]["text"]

    served(work)


def test_a_conversation_is_put_together_and_kept_beside_the_event_loop(monkeypatch):
    """It may be as long as a body, and others are answered meanwhile."""
    threads = []

    def noted(function):
        def called(*args):
            threads.append(threading.current_thread())
            return function(*args)

        return called

    monkeypatch.setattr(routes, "as_chat", noted(routes.as_chat))
    monkeypatch.setattr(routes.Kept, "of", noted(routes.Kept.of))

    async def work(serving, app):
        reply = await Client(app, RESPONSES, {"input": "Hi.", "max_output_tokens": 1}).answer()
        assert reply.status == 200

    served(work)
    assert len(threads) == 2
    assert threading.main_thread() not in threads


def test_a_conversation_that_is_kept_may_be_as_long_as_a_body():
    """Beyond that it is refused, though the request that goes on from it is short; and it weighs what all of it does."""

    async def work(serving, app):
        weights = []
        steps = serving.rendering.steps
        serving.rendering.steps = lambda all_, weight: weights.append(weight) or steps(all_, weight)
        asked = {"input": "word " * 500, "max_output_tokens": 1}
        first = (await Client(app, RESPONSES, asked).answer()).reply
        asked["previous_response_id"] = first["id"]
        second = (await Client(app, RESPONSES, {**asked, "input": "x"}).answer()).reply
        assert weights[1] > weights[0]
        last, sent = None, 0
        while last is None or last.status == 200:
            last = Client(app, RESPONSES, {**asked, "previous_response_id": second["id"]})
            await last.answer()
            second, sent = last.reply, sent + 1
        assert (last.status, 1 < sent < 9) == (413, True)
        assert last.reply["error"]["param"] == "previous_response_id"
        await until(lambda: not busy(serving))

    served(work, "--max-body-bytes", "9000")


def test_a_response_that_waits_for_its_turn_can_be_cancelled():
    """Its stream ends at once, as one that was cancelled; the other goes on."""

    async def work(serving, app):
        first = Client(app, COMPLETIONS, {"prompt": "x", **ENDLESS, "stream": True})
        await until(lambda: any(run.count.completion for run in serving.runs))
        reply = Client(app, RESPONSES, {"input": "x", "stream": True})
        await until(lambda: len(serving.runs) == 2)
        (_, run) = serving.runs
        cancelled = await Client(app, f"{RESPONSES}/{run.reply_id}/cancel", {}).answer()
        assert cancelled.status == 200
        await reply.answer()
        events = told(reply)
        check_response(events)
        assert events[-1]["response"]["status"] == "cancelled"
        assert len(serving.runs) == 1
        first.leave()
        await until(lambda: not busy(serving))

    served(work, "--decode-concurrency", "1")


def test_a_response_that_is_cancelled_while_it_is_written_says_so():
    """With what there is of it; it did not end by itself."""

    async def work(serving, app):
        reply = Client(app, RESPONSES, {"input": "word " * 30})
        await until(lambda: any(run.count.completion > 2 for run in serving.runs))
        (run,) = serving.runs
        await Client(app, f"{RESPONSES}/{run.reply_id}/cancel", {}).answer()
        response = (await reply.answer()).reply
        assert response["status"] == "cancelled"
        assert response["output"][0]["status"] == "incomplete"

    served(work)


def test_a_part_without_letters_is_no_event():
    """A call's arguments come in parts, of which one between a brace and a name may be empty."""
    output = Output()
    list(output.add(Begin("find_person", "1")))
    assert [len(list(output.add(Arguments(said)))) for said in ("{", "", "}")] == [1, 0, 1]
