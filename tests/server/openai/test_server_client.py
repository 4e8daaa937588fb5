"""The server as OpenAI's official client sees it, and as server-sent events on the wire."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import signal
from typing import Any

import httpx2
import openai
import pytest
from bundled import chat, text
from replies import ENDLESS, tools
from servers import (
    CHAT,
    COMPLETIONS,
    INSTANT,
    OURS,
    Server,
    Stream,
    begin,
    raw_post,
    raw_status,
    read_all,
    read_stream,
    user,
)


def test_a_chat_answers_through_the_official_client(client):
    """Content, role, finish reason, and usage that adds up."""
    reply = client.chat.completions.create(
        model="default_model", messages=user("Hello, I am Zoe."), extra_body=INSTANT
    )
    (choice,) = reply.choices
    assert choice.message.content == "Hello Zoe, how can I help?"
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert (reply.object, reply.model) == ("chat.completion", "default_model")
    assert reply.id.startswith("chatcmpl-")
    assert reply.system_fingerprint
    usage = reply.usage
    prompt = chat(("user", "Hello, I am Zoe."), enable_thinking=False)
    assert usage.prompt_tokens == len(prompt)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_streamed_chat_is_the_same_in_pieces(client):
    """The deltas join to the reply that is not streamed, and its usage is the same."""
    asked: dict[str, Any] = {
        "model": "m",
        "messages": user("Hi, I am Kofi."),
        "extra_body": INSTANT,
    }
    asked["model"] = "default_model"
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    whole = client.chat.completions.create(**asked)
    joined = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert joined == whole.choices[0].message.content
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert finishes == [None] * (len(finishes) - 1) + ["stop"]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_the_clients_own_stream_reader_understands_the_stream(client):
    """`chat.completions.stream` builds the final message, calls included."""
    with client.chat.completions.stream(
        model="default_model",
        messages=user("Where is Omar?"),
        tools=tools("find_person"),
        extra_body=INSTANT,
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "find_person",
        {"person": "Omar"},
    )
    assert final.choices[0].finish_reason == "tool_calls"
    assert "chunk" in kinds


def test_concurrent_and_streamed_requests_of_the_async_client(server):
    """Four at once, each with its own answer, beside a stream."""
    names = ["Ada", "Hugo", "Nora", "Ivan"]

    async def ask() -> tuple[list[Any], str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            create = functools.partial(
                client.chat.completions.create, model="default_model", extra_body=INSTANT
            )
            stream = await create(messages=user("Hello, I am Raj."), stream=True)
            replies = asyncio.gather(*(create(messages=user(f"Hi, I am {n}.")) for n in names))
            streamed = ""
            async for chunk in stream:
                streamed += chunk.choices[0].delta.content or ""
            return await replies, streamed

    replies, streamed = asyncio.run(ask())
    assert [r.choices[0].message.content for r in replies] == [
        f"Hi {name}, how can I help?" for name in names
    ]
    assert streamed == "Hello Raj, how can I help?"


def test_legacy_completions_whole_and_streamed(client):
    """The same text both ways, with `cmpl-` ids."""
    asked = {"model": "default_model", "prompt": "The for statement is used to", "max_tokens": 12}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True))
    assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks)
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"
    assert whole.id.startswith("cmpl-")
    assert {whole.object, *(chunk.object for chunk in chunks)} == {"text_completion"}
    assert whole.usage.completion_tokens == 12


def test_models_are_listed_and_retrieved(client):
    """The served model, whose id is then understood as a model's name."""
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    assert model.object == "model"
    reply = client.chat.completions.create(
        model=model.id, messages=user("Hi, I am Lena."), max_tokens=2
    )
    assert reply.model == model.id
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nothing-like-it")
    assert caught.value.code == "model_not_found"


def test_refusals_are_the_clients_own_exceptions(client):
    """400 is BadRequestError with the field's name, 404 NotFoundError with its code."""
    ask = functools.partial(client.chat.completions.create, model="default_model")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(messages=user("Hi"), max_tokens=0)
    assert caught.value.param == "max_tokens"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(messages=[])
    assert caught.value.param == "messages"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=user("Hi"))
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(messages=user("Hi"), max_tokens=0, stream=True)
    assert caught.value.status_code == 400


# Events on the wire


def test_a_stream_is_server_sent_events(server):
    """As httpx2 reads them: JSON in each, `[DONE]` at the end, the role in the first delta."""
    body = {"messages": user("Repeat: lamp"), "stream": True, **INSTANT}
    with server.client.stream("POST", CHAT, json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "no-cache" in response.headers["cache-control"]
        *events, last = list(httpx2.EventSource(response))
    assert last.data == "[DONE]"
    assert {event.event for event in events} == {"message"}
    choices = [json.loads(event.data)["choices"][0] for event in events]
    assert choices[0]["delta"]["role"] == "assistant"
    assert all("role" not in choice["delta"] for choice in choices[1:])
    assert all(choice["index"] == 0 for choice in choices)


def test_a_prompt_that_takes_long_is_kept_alive_with_comments(server):
    """5,000 tokens in steps of 2,048: comments before the first event, up to the last token."""
    body = {"prompt": text(5000), "max_tokens": 1, "stream": True}
    stream = Stream(0, {})
    with server.client.stream("POST", COMPLETIONS, json=body) as response:
        kinds = list(read_stream(response.iter_lines(), stream))
    assert kinds.index("event") == kinds.count("comment") >= 2
    read, total = zip(
        *(map(int, re.findall(r"keepalive (\d+)/(\d+)", c)[0]) for c in stream.comments),
        strict=True,
    )
    assert list(read) == sorted(read)
    assert len(set(total)) == 1
    assert stream.done


def test_a_stream_that_is_shut_down_ends_with_an_error_event():
    """SIGTERM and SIGINT in the middle: an error, `[DONE]`, exit status 0; not streamed, 503."""
    server = Server(OURS)
    body = {"prompt": "a", "max_tokens": 100_000, **ENDLESS}
    for number in (signal.SIGTERM, signal.SIGINT):
        server.start()
        stream = Stream(0, {})
        whole = begin(server, raw_post(COMPLETIONS, json.dumps(body).encode()))
        with server.client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as response:
            kinds = read_stream(response.iter_lines(), stream)
            while len(stream.events) < 9:  # by then the request before it runs too
                next(kinds)
            server.process.send_signal(number)
            assert list(kinds)[-1] == "done"
        assert server.process.wait(30) == 0
        assert stream.events[-1]["error"]["type"] == "server_error"
        assert raw_status(read_all(whole)) == 503
        assert "Traceback" not in server.log
    server.close()
