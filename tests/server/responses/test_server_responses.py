"""OpenAI's Responses API as its official client sees it, and beside chats of the same conversation."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from typing import Any

import openai
import pytest
from in_process import Client, busy, served, until
from mlx_hybridcache_server.replies.notices import WARNING_HEADER
from replies import FUNCTION, content, tools
from servers import CHAT, MESSAGES, events_of, user

RESPONSES = "/v1/responses"
SYSTEM = "You are a helpful assistant."
MODEL = "default_model"


@pytest.fixture(scope="module")
def quiet(instant):
    with openai.OpenAI(base_url=f"{instant.url}/v1", api_key="none", max_retries=0) as client:
        yield client.responses


def own(*names: str) -> list[dict[str, Any]]:
    """The functions as responses have them declared: without an envelope."""
    return [{"type": "function", **FUNCTION[name]["function"]} for name in names]


def test_one_conversation_is_the_same_prompt_in_all_three_protocols(instant, quiet):
    """A call, its result, the answer: the same tokens in and out, and each is hot where another was first."""
    names = ("find_person", "get_price")
    asked: dict[str, Any] = {"model": MODEL, "instructions": SYSTEM, "tools": own(*names)}
    first = quiet.create(input="Where is Omar?", **asked)
    (call,) = first.output
    assert (call.type, call.name, call.status) == ("function_call", "find_person", "completed")
    assert json.loads(call.arguments) == {"person": "Omar"}
    assert (first.status, first.usage.input_tokens_details.cached_tokens) == ("completed", 0)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"room": "hall"}'}
    history = [*user("Where is Omar?"), call.model_dump(exclude_none=True), result]
    second = quiet.create(input=history, **asked)
    assert second.output_text == "Omar is in the hall."
    assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens - 10
    chat = instant.answer(
        CHAT,
        messages=[
            {"role": "system", "content": SYSTEM},
            *user("Where is Omar?"),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": call.call_id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": call.call_id, "content": '{"room": "hall"}'},
        ],
        tools=tools(*names),
    )
    assert content(chat) == second.output_text
    usage = chat["usage"]
    assert usage["prompt_tokens"] == second.usage.input_tokens
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
    message = instant.answer(
        MESSAGES,
        system=SYSTEM,
        messages=[
            *user("Where is Omar?"),
            {
                "role": "assistant",
                "content": [
                    {"type": "tool_use", "id": "1", "name": call.name, "input": {"person": "Omar"}}
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "1", "content": '{"room": "hall"}'}
                ],
            },
        ],
        tools=[
            {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]}
            for f in own(*names)
        ],
        max_tokens=99,
    )
    assert message["content"][0]["text"] == second.output_text
    assert message["usage"]["cache_read_input_tokens"] == usage["prompt_tokens"] - 1


def test_a_conversation_goes_on_from_a_response_that_is_kept(instant, quiet):
    """The same prompt as with all items sent; instructions are not carried on; each is found and forgotten."""
    asked: dict[str, Any] = {"model": MODEL, "instructions": SYSTEM}
    first = quiet.create(input="Hello, I am Zoe.", **asked)
    second = quiet.create(input="Who am I?", previous_response_id=first.id, **asked)
    third = quiet.create(input="And now?", previous_response_id=second.id, **asked)
    said = [
        {"role": "assistant", "content": [{"type": "output_text", "text": each.output_text}]}
        for each in (first, second)
    ]
    history = [
        *user("Hello, I am Zoe."),
        said[0],
        *user("Who am I?"),
        said[1],
        *user("And now?"),
    ]
    whole = quiet.create(input=history, **asked)
    assert whole.usage.input_tokens == third.usage.input_tokens
    assert whole.usage.input_tokens_details.cached_tokens == third.usage.input_tokens - 1
    assert whole.output_text == third.output_text
    without = quiet.create(input="And now?", previous_response_id=second.id, model=MODEL)
    assert without.usage.input_tokens < third.usage.input_tokens
    assert quiet.retrieve(second.id).output_text == second.output_text
    (added,) = quiet.input_items.list(second.id).data
    assert (added.role, added.content[0].text) == ("user", "Who am I?")
    quiet.delete(second.id)
    for again in (
        lambda: quiet.retrieve(second.id),
        lambda: quiet.create(input="x", previous_response_id=third.id, model=MODEL),
        lambda: quiet.delete(second.id),
    ):
        with pytest.raises(openai.NotFoundError, match=second.id):
            again()
    unkept = quiet.create(input="Hello.", store=False, model=MODEL)
    with pytest.raises(openai.NotFoundError):
        quiet.retrieve(unkept.id)
    salted = quiet.create(input="Hello.", model=MODEL, extra_body={"cache_salt": "mine"})
    with pytest.raises(openai.NotFoundError):
        quiet.retrieve(salted.id)
    assert quiet.retrieve(salted.id, extra_query={"cache_salt": "mine"}).id == salted.id
    assert instant.healthy


def test_a_stream_has_every_event_in_its_order(server, client):
    """Reasoning, then a call: each item is added, grows and is done before the next; numbers have no gap."""
    asked: dict[str, Any] = {
        "model": MODEL,
        "input": "Where is Lena?",
        "tools": own("find_person", "get_time"),
        "include": ["reasoning.encrypted_content"],
    }
    events = list(client.responses.create(stream=True, **asked))
    assert [each.sequence_number for each in events] == list(range(len(events)))
    kinds = [each.type.removeprefix("response.") for each in events]
    assert kinds[:2] == ["created", "in_progress"]
    assert kinds[-1] == "completed"
    plain = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]
    assert plain[2:-1] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    thought, call = events[-1].response.output
    assert (thought.type, call.type) == ("reasoning", "function_call")
    deltas = [each for each in events if each.type.endswith(".delta")]
    for item, output_index in ((thought, 0), (call, 1)):
        own_deltas = [each for each in deltas if each.output_index == output_index]
        assert {each.item_id for each in own_deltas} == {item.id}
        said = "".join(each.delta for each in own_deltas)
        assert said == (call.arguments if item is call else thought.content[0].text)
    assert events[0].response.id == events[-1].response.id
    assert events[0].response.usage is None
    assert events[-1].response.usage.output_tokens_details.reasoning_tokens > 3
    with client.responses.stream(**asked) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output[1].arguments == call.arguments
    assert server.healthy


def test_reasoning_comes_back_in_full_or_sealed(client):
    """Both ways the next prompt is the one that a chat with `reasoning_content` has."""
    asked: dict[str, Any] = {"model": MODEL, "tools": own("find_person")}
    include = ["reasoning.encrypted_content"]
    first = client.responses.create(input="Where is Lena?", include=include, store=False, **asked)
    thought, call = (item.model_dump(exclude_none=True) for item in first.output)
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "hall"}
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": thought["encrypted_content"]}
    counts = [
        client.responses.create(
            input=[*user("Where is Lena?"), *before, call, result], **asked
        ).usage.input_tokens
        for before in ([thought], [sealed], [])
    ]
    chat = client.chat.completions.create(
        model=MODEL,
        tools=tools("find_person"),
        messages=[
            *user("Where is Lena?"),
            {
                "role": "assistant",
                "reasoning_content": thought["content"][0]["text"],
                "tool_calls": [
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": call["name"], "arguments": call["arguments"]},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "hall"},
        ],
    )
    assert counts[0] == counts[1] == chat.usage.prompt_tokens > counts[2]


def test_custom_tools_take_a_text(quiet):
    """A call of one is an item of its own kind, in one piece and streamed, and goes back as such."""
    custom = {"type": "custom", "name": "find_person", "description": "Where somebody is."}
    asked: dict[str, Any] = {"model": MODEL, "tools": [custom], "tool_choice": "required"}
    first = quiet.create(input="Where is Lena?", **asked)
    (call,) = first.output
    assert (call.type, call.name) == ("custom_tool_call", "find_person")
    assert isinstance(call.input, str)
    events = list(quiet.create(input="Where is Lena?", stream=True, **asked))
    (said,) = [each for each in events if each.type == "response.custom_tool_call_input.done"]
    assert said.input == call.input
    result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "In the hall."}
    history = [*user("Where is Lena?"), call.model_dump(exclude_none=True), result]
    second = quiet.create(input=history, model=MODEL, tools=[custom])
    assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens - 10


def test_a_reply_is_held_to_a_form_and_to_a_length(quiet):
    """`text.format`; a reply that is cut is incomplete, and says why."""
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Zoe", "Omar"]}},
        "required": ["name"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "name": "person", "schema": schema}}
    reply = quiet.create(model=MODEL, input="Hello, I am Zoe.", text=form)
    assert json.loads(reply.output_text)["name"] in {"Zoe", "Omar"}
    assert reply.text.format.name == "person"
    short = quiet.create(model=MODEL, input="Hello, I am Zoe.", max_output_tokens=2)
    assert short.status == short.output[0].status == "incomplete"
    assert short.incomplete_details.reason == "max_output_tokens"


def test_a_coding_agents_request_is_answered_and_what_is_left_out_is_named(instant):
    """A body with everything that Codex sends."""
    body: dict[str, Any] = {
        "model": MODEL,
        "instructions": SYSTEM,
        "input": [
            {
                "type": "message",
                "role": "developer",
                "content": [{"type": "input_text", "text": "Be brief."}],
            },
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "Where is Omar?"}],
            },
        ],
        "tools": [
            {**own("find_person")[0], "strict": False},
            {"type": "namespace", "name": "more", "tools": []},
            {"type": "web_search", "external_web_access": False},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "a-key",
        "client_metadata": {"session": "1"},
        "text": {"verbosity": "medium"},
        "stream": True,
    }
    reply = instant.post(RESPONSES, **body)
    assert reply.status_code == 200, reply.text
    for name in ("namespace", "web_search", "reasoning_effort"):
        assert name in reply.headers[WARNING_HEADER]
    events = events_of(reply.text)
    assert events[-1]["type"] == "response.completed"
    (call,) = events[-1]["response"]["output"]
    assert call["name"] == "find_person"


def test_an_answer_that_is_being_written_can_be_cancelled():
    """By its id, and by its salt alone: its stream ends with what there is. Before and after, it is said why not."""

    async def work(serving, app):
        body = {"input": "word " * 30_000, "stream": True, "cache_salt": "mine"}
        reply = Client(app, RESPONSES, body)
        await until(lambda: any(run.read_tokens for run in serving.runs))
        (run,) = serving.runs
        other = Client(app, f"{RESPONSES}/{run.reply_id}/cancel", {})
        await other.answer()
        assert other.status == 404
        own = Client(app, f"{RESPONSES}/{run.reply_id}/cancel?cache_salt=mine", {})
        await own.answer()
        assert own.status == 200
        await reply.answer()
        said = b"".join(each.get("body", b"") for each in reply.sent[1:]).decode()
        last = events_of(said)[-1]
        assert (last["type"], last["response"]["status"]) == ("response.incomplete", "cancelled")
        again = Client(app, f"{RESPONSES}/{run.reply_id}/cancel?cache_salt=mine", {})
        await again.answer()
        assert (again.status, b"cancelled" in again.sent[1]["body"]) == (400, True)
        await until(lambda: not busy(serving))

    served(work)


def test_a_stream_that_fails_says_so_in_its_response():
    """What runs out of time ends with `response.failed`, numbered behind what was told: it waits for a turn."""

    async def work(serving, app):
        async with AsyncExitStack() as taken:
            await serving.admission.slots(taken)  # the only one, for as long as it takes
            reply = Client(app, RESPONSES, {"input": "x", "stream": True})
            await reply.answer()
        said = b"".join(each.get("body", b"") for each in reply.sent[1:]).decode()
        events = events_of(said)
        assert events[-1]["type"] == "response.failed"
        assert events[-1]["response"]["error"]["message"]
        assert [each["sequence_number"] for each in events] == list(range(len(events)))
        await until(lambda: not busy(serving))

    served(work, "--decode-concurrency", "1", "--request-timeout", "1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input", []),
        ("input", 5),
        ("input", [{"role": "tool", "content": "x"}]),
        ("input", [{"role": "user"}]),
        ("input", [{"type": "function_call", "call_id": "1"}]),
        ("input", [{"type": "item_reference", "id": "x"}]),
        ("input", [{"type": 5}]),
        ("input", [{"type": 0, "role": "user", "content": "x"}]),
        ("tools", [{"name": "f"}]),
        ("tools", [{"type": "function"}]),
        ("tools", [{"type": "function", "name": "f", "parameters": []}]),
        ("tool_choice", {"type": "function"}),
        ("tool_choice", "required"),
        ("text", {"format": {"type": "json_schema"}}),
        ("text", {"format": {"type": "yaml"}}),
        ("background", True),
        ("conversation", "conv_1"),
        ("prompt", {"id": "pmpt_1"}),
        ("truncation", "some"),
        ("max_output_tokens", 0),
    ],
)
def test_what_cannot_be_followed_is_refused_with_its_name(server, name, value):
    """400, never a failure, and never a reply that leaves it out."""
    reply = server.post(RESPONSES, **{"input": "x", "max_output_tokens": 1, name: value})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"].split(".")[0] == name
