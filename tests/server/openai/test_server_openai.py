"""The server as OpenAI's official client sees it, and as server-sent events on the wire."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import httpx2
import openai
import pytest
from bundled import chat, load, text
from prometheus_client.parser import text_string_to_metric_families
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
    run_to_its_end,
    running,
    user,
)

from mlx_hybridcache import Reason
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.demo.functions import FUNCTIONS

FUNCTION = {function.name: function.declaration() for function in FUNCTIONS}
ENDLESS = {"logit_bias": {"700": 100}}
"""Makes the model write one token for ever."""


@pytest.fixture(scope="module")
def server():
    with running(OURS) as server:
        yield server


@pytest.fixture(scope="module")
def strict():
    """With a key, an origin, small limits, and leave to load other models."""
    flags = ["--max-prompt-tokens", "60", "--max-body-bytes", "4KiB", "--show-prompts"]
    flags += ["--allowed-origins", "https://app.example", "--cache-ram", "64"]
    flags += ["--allow-model-switching"]
    with running(OURS, *flags, MLX_HYBRIDCACHE_API_KEY="a-key") as server:
        server.client.headers["Authorization"] = "Bearer a-key"
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def tools(*names: str) -> list[dict[str, Any]]:
    return [FUNCTION[name] for name in names]


def content(reply: dict[str, Any], index: int = 0) -> str:
    return str(reply["choices"][index]["message"]["content"])


def cached(reply: dict[str, Any]) -> int:
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])


# The official client


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


def test_a_key_is_asked_for_and_health_is_not_guarded(strict):
    """401 without it and with another; the right one answers."""
    for key in ("none", "a-ke", "a-key-", "ä"):
        headers = {"Authorization": f"Bearer {key}".encode()}
        for path in ("/v1/models", "/v1/cache", "/metrics"):
            refused = strict.client.get(path, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
    with openai.OpenAI(base_url=f"{strict.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert client.with_options(api_key="a-key").models.list().data
    assert httpx2.get(f"{strict.url}/health", trust_env=False).status_code == 200
    assert "a-key" not in strict.log


def test_prompts_and_bodies_have_limits(strict):
    """61 tokens of 60: 400; 4 KiB of JSON: 413; afterwards the next is served."""
    prompt = text(61)
    refused = strict.post(COMPLETIONS, prompt=prompt, max_tokens=1)
    assert refused.status_code == 400
    assert re.search(r"\b6\d\b.*\b60\b", refused.json()["error"]["message"])
    assert strict.post(COMPLETIONS, prompt="x" * 5000).status_code == 413
    chunks = iter([b'{"prompt": "', b"x" * 5000, b'"}'])
    assert strict.client.post(COMPLETIONS, content=chunks).status_code == 413
    assert strict.answer(COMPLETIONS, prompt=text(40), max_tokens=1)


def test_origins_and_hosts_that_may_ask(server, strict):
    """Loopback by default; with the flag those that it names."""
    preflight = {"Access-Control-Request-Method": "POST"}
    for asked, origin, allowed in [
        (server, "http://localhost:3000", True),
        (server, "http://127.0.0.1", True),
        (server, "http://[::1]:8000", True),
        (server, "https://localhost.elsewhere.example", False),
        (server, "null", False),
        (strict, "https://app.example", True),
        (strict, "https://app.example.elsewhere", False),
    ]:
        headers = {"Origin": origin}
        answer = asked.client.options(CHAT, headers={**headers, **preflight})
        assert answer.status_code == (204 if allowed else 403), origin
        given = answer.headers.get("access-control-allow-origin")
        assert (given in (origin, "*")) is allowed, origin
        assert asked.client.get("/v1/models", headers=headers).status_code == (
            200 if allowed else 403
        )
    preflight["Origin"] = "https://app.example"  # and no key: browsers send none with it
    preflight["Access-Control-Request-Headers"] = "authorization,content-type"
    answer = httpx2.options(f"{strict.url}{CHAT}", headers=preflight, trust_env=False)
    assert answer.status_code == 204
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    for host, status in [
        ("localhost", 200),
        (f"127.0.0.1:{server.port}", 200),
        ("[::1]:80", 200),
        ("elsewhere.example", 403),
        ("127.0.0.1.elsewhere.example", 403),
    ]:
        assert server.client.get("/v1/models", headers={"Host": host}).status_code == status, host


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


# Log-probabilities


def assert_well_formed(entries: list[dict[str, Any]], most: int) -> None:
    """Entries in OpenAI's shape, each token beside the likeliest."""
    for entry in entries:
        top = entry["top_logprobs"]
        assert len(top) == most
        assert [t["logprob"] for t in top] == sorted((t["logprob"] for t in top), reverse=True)
        assert sum(math.exp(t["logprob"]) for t in top) <= 1 + 1e-5
        assert len({t["id"] for t in top}) == most
        for told in (entry, *top):
            assert bytes(told["bytes"]).decode(errors="replace") == told["token"]
        if most:
            assert (entry["id"], entry["logprob"]) == (top[0]["id"], top[0]["logprob"])


@pytest.mark.parametrize("most", [0, 1, 5, 20])
def test_logprobs_are_sorted_complete_and_spell_the_text(server, most):
    """At temperature 0 the token is the first of its top; all bytes together are the reply."""
    body = {"messages": user("Which is the last of saw, rope, tent?"), **INSTANT}
    reply = server.answer(CHAT, **body, logprobs=True, top_logprobs=most)
    entries = reply["choices"][0]["logprobs"]["content"]
    assert len(entries) == reply["usage"]["completion_tokens"]
    assert_well_formed(entries, most)
    spelled = b"".join(bytes(entry["bytes"]) for entry in entries).decode()
    assert spelled.removesuffix("<|im_end|>") == content(reply)
    stream = server.stream(CHAT, **body, logprobs=True, top_logprobs=most)
    assert stream.joined()["logprobs"]["content"] == entries


def test_logprobs_are_parsed_by_the_official_client(client):
    """Twenty per token, and none when none were asked for."""
    ask = functools.partial(
        client.chat.completions.create,
        model="default_model",
        messages=user("Repeat: rope"),
        extra_body=INSTANT,
    )
    entries = ask(logprobs=True, top_logprobs=20).choices[0].logprobs.content
    assert {len(entry.top_logprobs) for entry in entries} == {20}
    assert ask().choices[0].logprobs is None
    with pytest.raises(openai.BadRequestError) as caught:
        ask(logprobs=True, top_logprobs=21)
    assert caught.value.param == "top_logprobs"


def test_a_token_that_is_half_a_character_has_its_bytes(server):
    """Forced to write the first byte of a two-byte character, the reply shows the byte in `bytes`."""
    _, tokenizer = load()
    half = next(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\ufffd")
    body = {"messages": user("Hi"), "max_tokens": 3, "logit_bias": {str(half): 100}, **INSTANT}
    reply = server.answer(CHAT, **body, logprobs=True)
    entries = reply["choices"][0]["logprobs"]["content"]
    assert [entry["id"] for entry in entries] == [half] * 3
    assert all(len(entry["bytes"]) == 1 and entry["bytes"][0] > 127 for entry in entries)
    assert set(content(reply)) == {"\ufffd"}


@pytest.mark.parametrize("most", [0, 3, True])
def test_legacy_logprobs_have_offsets_into_the_text(server, most):
    """`tokens[i]` stands at `text_offset[i]`; each of `top_logprobs` has the asked number."""
    body = {"prompt": "The while statement is", "max_tokens": 10, "logprobs": most}
    reply = server.answer(COMPLETIONS, **body)
    choice = reply["choices"][0]
    told = choice["logprobs"]
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert choice["text"][offset : offset + len(token)] == token
    assert "".join(told["tokens"]) == choice["text"]
    assert len(told["token_logprobs"]) == 10
    assert all(logprob <= 0 for logprob in told["token_logprobs"])
    if most is True:
        assert told["top_logprobs"] is None
    elif most:
        for token, logprob, top in zip(
            told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
        ):
            assert top[token] == logprob == max(top.values())
            assert len(top) <= most
    streamed = server.stream(COMPLETIONS, **body).joined()["logprobs"]
    assert streamed["tokens"] == told["tokens"]
    assert streamed["token_logprobs"] == told["token_logprobs"]
    assert streamed["text_offset"] == told["text_offset"]


# Where a reply stops

PROMPT = {"prompt": "The for statement is used to", "max_tokens": 40}


@pytest.fixture(scope="module")
def unstopped(server):
    """A greedy reply, and where its tokens end in the text."""
    reply = server.answer(COMPLETIONS, **PROMPT, logprobs=0)["choices"][0]
    told = reply["logprobs"]
    ends = [o + len(t) for o, t in zip(told["text_offset"], told["tokens"], strict=True)]
    return reply["text"], ends


def stops(text: str, ends: list[int]) -> list[str]:
    """Stop texts inside one token, across two and three, and exactly one token."""
    starts = [0, *ends[:-1]]
    found = []
    for i in range(4, 16, 2):
        a, b, c = starts[i], ends[i], ends[i + 1]
        found += [text[a:b], text[b - 1 : b + 1], text[a : c + 1]]
        if b - a > 2:
            found.append(text[a + 1 : b - 1])
    return sorted({stop for stop in found if stop.strip()})


def test_a_reply_ends_before_the_stop_text_however_it_is_tokenized(server, unstopped):
    """Cut by hand from the greedy reply: the same text, `stop`, whole and streamed."""
    text, ends = unstopped
    chosen = stops(text, ends)
    assert len(chosen) >= 12
    for stop in chosen:
        expected, end = text.partition(stop)[0], text.index(stop) + len(stop)
        reply = server.answer(COMPLETIONS, **PROMPT, stop=stop)
        assert (reply["choices"][0]["text"], reply["choices"][0]["finish_reason"]) == (
            expected,
            "stop",
        ), stop
        read = next(i for i, token_end in enumerate(ends) if token_end >= end) + 1
        assert reply["usage"]["completion_tokens"] == read, stop
        stream = server.stream(COMPLETIONS, **PROMPT, stop=[stop]).joined()
        assert (stream["text"], stream["finish_reason"]) == (expected, "stop"), stop


def test_of_several_stop_texts_the_first_to_appear_ends_the_reply(server, unstopped):
    """In whatever order they are given; one that never comes changes nothing."""
    text, ends = unstopped
    early, late = text[ends[5] : ends[6]] + text[ends[6]], text[ends[20] : ends[21]]
    expected = text[: min(text.index(early), text.index(late))]
    for stop in ([late, early, "never"], ["never", early, late]):
        choice = server.answer(COMPLETIONS, **PROMPT, stop=stop)["choices"][0]
        assert choice["text"] == expected
    never = server.answer(COMPLETIONS, **PROMPT, stop=["\x00", text[-9:] + "never"])["choices"][0]
    assert (never["text"], never["finish_reason"]) == (text, "length")


def test_a_reply_that_ends_within_a_stop_text_is_complete(server):
    """What was held back because a stop text might come is sent when the model ends."""
    body = {"messages": user("Hello, I am Zoe."), "stop": "help?!", **INSTANT}
    assert content(server.answer(CHAT, **body)) == "Hello Zoe, how can I help?"
    stream = server.stream(CHAT, **body).joined()
    assert stream["message"]["content"] == "Hello Zoe, how can I help?"
    assert stream["finish_reason"] == "stop"


def test_stop_texts_in_chats_end_reply_and_stream_alike(server):
    """In the middle of a word, across words, in the first one."""
    whole = "I am a very small demo model. Greetings to Oslo, Zoe!"
    body = {"messages": user("Zoe from Oslo asks: Who are you?"), **INSTANT}
    assert content(server.answer(CHAT, **body)) == whole
    for stop in ("ery", "y s", "am a ", "I", "demo model. G", "Zoe!"):
        choice = server.answer(CHAT, **body, stop=stop)["choices"][0]
        assert (choice["message"]["content"] or "") == whole.partition(stop)[0], stop
        assert choice["finish_reason"] == "stop"
        streamed = server.stream(CHAT, **body, stop=stop).joined()["message"]
        assert streamed.get("content", "") == whole.partition(stop)[0], stop


def test_the_length_is_a_limit_to_the_token(server):
    """1, 2, 7: so many completion tokens and `length`; `max_completion_tokens` wins."""
    for count in (1, 2, 7):
        reply = server.answer(COMPLETIONS, prompt="def f(", max_tokens=count)
        assert reply["usage"]["completion_tokens"] == count
        assert reply["choices"][0]["finish_reason"] == "length"
    both = server.answer(COMPLETIONS, prompt="def f(", max_tokens=9, max_completion_tokens=3)
    assert both["usage"]["completion_tokens"] == 3


# What is sampled


def test_a_seed_gives_the_same_text_cold_hot_and_among_others(server):
    """At temperature 1: one seed, one text; three seeds, three texts."""
    body = {"prompt": "class Lamp:", "max_tokens": 16, "temperature": 1.0}
    texts = [
        [server.answer(COMPLETIONS, **body, seed=seed)["choices"][0]["text"] for _ in range(2)]
        for seed in (3, 4, -5)
    ]
    assert all(first == again for first, again in texts)
    assert len({first for first, _ in texts}) == 3

    async def together() -> list[str]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
            replies = await asyncio.gather(
                *(client.post(COMPLETIONS, json={**body, "seed": seed}) for seed in (3, 4, -5))
            )
            return [reply.json()["choices"][0]["text"] for reply in replies]

    assert asyncio.run(together()) == [first for first, _ in texts]


def test_without_a_seed_replies_differ(server):
    """Five samples at temperature 1 are not all one."""
    body = {"prompt": "class Lamp:", "max_tokens": 16, "temperature": 1.0}
    texts = {server.answer(COMPLETIONS, **body)["choices"][0]["text"] for _ in range(5)}
    assert len(texts) > 1


def test_a_bias_of_100_forces_a_token(server):
    """Six times the token of id 700, and -100 forbids what would have come."""
    _, tokenizer = load()
    body = {"prompt": "for x in range", "max_tokens": 6}
    forced = server.answer(COMPLETIONS, **body, logit_bias={"700": 100})["choices"][0]["text"]
    assert forced == tokenizer.decode([700] * 6)
    plain = server.answer(CHAT, messages=user("Hi"), logprobs=True, max_tokens=1, **INSTANT)
    first = plain["choices"][0]["logprobs"]["content"][0]["id"]
    other = server.answer(
        CHAT,
        messages=user("Hi"),
        logprobs=True,
        max_tokens=1,
        logit_bias={str(first): -100},
        **INSTANT,
    )
    assert other["choices"][0]["logprobs"]["content"][0]["id"] != first


def test_a_bias_for_no_token_is_refused(server):
    """Ids from -1 down and from the vocabulary's size up, and words."""
    for wrong in ("-1", "1000000", str(2**70), "lamp", ""):
        refused = server.post(COMPLETIONS, prompt="a", max_tokens=1, logit_bias={wrong: 1})
        assert refused.status_code == 400, wrong
        assert refused.json()["error"]["param"] == "logit_bias"
    assert server.healthy


NULLABLE = """
    stream stream_options max_tokens max_completion_tokens temperature top_p top_k min_p
    xtc_probability xtc_threshold repetition_penalty repetition_context_size presence_penalty
    presence_context_size frequency_penalty frequency_context_size logit_bias logprobs
    top_logprobs stop seed n tools tool_choice parallel_tool_calls role_mapping
    continue_final_message add_generation_prompt cache_salt draft_model num_draft_tokens
    adapters response_format reasoning_effort model
"""


def test_null_is_the_default_for_every_field(server):
    """All of them null at once: the reply without any."""
    plain = server.answer(CHAT, messages=user("Hi, I am Mei."), **INSTANT)
    null = server.answer(
        CHAT, messages=user("Hi, I am Mei."), **INSTANT, **dict.fromkeys(NULLABLE.split())
    )
    assert null["choices"] == plain["choices"]
    assert null["model"] == plain["model"]
    nothing = server.answer(CHAT, messages=user("Hi, I am Mei."), chat_template_kwargs=None)
    assert nothing["choices"][0]["message"]["reasoning"]


# Several choices


def test_n_choices_are_as_many_samples(server):
    """Three with one seed, whole and streamed; greedy ones are equal."""
    body = {"prompt": "class Lamp:", "max_tokens": 12, "temperature": 1.0, "seed": 5, "n": 3}
    body["logprobs"] = 0
    reply = server.answer(COMPLETIONS, **body)
    texts = [choice["text"] for choice in reply["choices"]]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert len(set(texts)) > 1
    counts = [len(choice["logprobs"]["tokens"]) for choice in reply["choices"]]
    assert reply["usage"]["completion_tokens"] == sum(counts)
    stream = server.stream(COMPLETIONS, **body)
    assert [stream.joined(i)["text"] for i in range(3)] == texts
    greedy = server.answer(CHAT, messages=user("Hello, I am Zoe."), n=2, **INSTANT)
    assert content(greedy) == content(greedy, 1) == "Hello Zoe, how can I help?"


def test_several_prompts_are_answered_in_order(server):
    """Strings, ids, and ids one by one give the same texts; n choices for each."""
    _, tokenizer = load()
    prompts = ["def f(", "import", "for x in"]
    ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    alone = [
        server.answer(COMPLETIONS, prompt=prompt, max_tokens=5)["choices"][0]["text"]
        for prompt in prompts
    ]
    for given in (prompts, ids):
        reply = server.answer(COMPLETIONS, prompt=given, max_tokens=5)
        assert [choice["text"] for choice in reply["choices"]] == alone
        assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
        assert reply["usage"]["prompt_tokens"] == sum(map(len, ids))
        stream = server.stream(COMPLETIONS, prompt=given, max_tokens=5)
        assert [stream.joined(i)["text"] for i in range(3)] == alone
    single = server.answer(COMPLETIONS, prompt=ids[0], max_tokens=5)["choices"]
    assert [choice["text"] for choice in single] == alone[:1]
    twice = server.answer(COMPLETIONS, prompt=prompts, n=2, max_tokens=5)["choices"]
    assert [choice["text"] for choice in twice] == [alone[i // 2] for i in range(6)]


def test_echo_puts_the_prompt_in_front(server):
    """Whole and streamed; with `logprobs` it is refused with a sentence."""
    body = {"prompt": "def f(", "max_tokens": 5}
    plain = server.answer(COMPLETIONS, **body)["choices"][0]["text"]
    assert server.answer(COMPLETIONS, **body, echo=True)["choices"][0]["text"] == "def f(" + plain
    assert server.stream(COMPLETIONS, **body, echo=True).joined()["text"] == "def f(" + plain
    refused = server.post(COMPLETIONS, **body, echo=True, logprobs=1)
    assert refused.status_code == 400
    assert "echo" in refused.json()["error"]["message"]


# Tools and reasoning


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


# The cache, as requests see it


def test_what_was_read_is_told_in_usage_and_timings(server):
    """Cold nothing, again all but one; `cache_n + prompt_n` is the prompt, in streams too."""
    prompt = text(300, 900)
    body = {"prompt": prompt, "max_tokens": 3}
    replies = [server.answer(COMPLETIONS, **body) for _ in range(2)]
    stream = server.stream(COMPLETIONS, **body, stream_options={"include_usage": True})
    last = stream.events[-1]
    for reply, expected in zip([*replies, last], [0, 1, 1], strict=True):
        count, timings = reply["usage"]["prompt_tokens"], reply["timings"]
        assert cached(reply) == timings["cache_n"] == (count - 1 if expected else 0)
        assert timings["cache_n"] + timings["prompt_n"] == count
        assert timings["predicted_n"] == reply["usage"]["completion_tokens"] == 3
        assert timings["prompt_ms"] > 0
        assert timings["predicted_ms"] > 0
    without = server.stream(COMPLETIONS, **body).events[-1]
    assert without["timings"]["cache_n"] == cached(replies[1])
    assert replies[0]["choices"] == replies[1]["choices"]


def test_salts_share_and_reveal_nothing(server):
    """The same prompt under another salt, and under none: 0 cached, reason `cold`."""
    body = {"messages": user(f"Read this.\n{text(200, 1300)}"), "max_tokens": 2, **INSTANT}
    for salt in ({"cache_salt": "a"}, {"cache_salt": "b"}, {}, {"cache_salt": ""}):
        reply = server.answer(CHAT, **body, **salt)
        report = server.client.get("/v1/cache/recent").json()["data"][0]
        if salt == {"cache_salt": ""}:
            assert cached(reply) > 0  # no salt
        else:
            assert cached(reply) == 0
            assert report["matched_tokens"] <= 1 or not salt
            assert report["reason"] in {Reason.COLD, Reason.BRANCH}
            assert report["reason"] == Reason.COLD or not salt
            assert "namespace" not in report["sentence"]
    again = server.answer(CHAT, **body, cache_salt="a")
    assert cached(again) == again["usage"]["prompt_tokens"] - 1


def test_recent_reports_say_what_happened_and_show_no_text(server):
    """Newest first: reason, counts, and the kind of thing that changed; text only on request."""
    prompt = text(250, 1700) + " Today is {}. The word is xylophone."
    for date in ("2026-01-31", "2026-02-01"):
        server.answer(COMPLETIONS, prompt=prompt.format(date), max_tokens=1)
    answer = server.client.get("/v1/cache/recent")
    newest, before = answer.json()["data"][:2]
    assert newest["endpoint"].endswith("/completions")
    assert before["reason"] in {Reason.COLD, Reason.BRANCH}
    assert newest["reason"] == Reason.BRANCH
    assert newest["restored_tokens"] + newest["replayed_tokens"] == newest["prompt_tokens"]
    assert newest["diverged_at"] == newest["matched_tokens"] > 250
    assert newest["restored_tokens"] > 150
    assert newest["changed"] == "date"
    assert newest["created"] >= before["created"]
    assert newest["sentence"]
    assert newest["id"] != before["id"]
    assert "xylophone" not in answer.text


def test_texts_are_shown_only_when_started_so_and_never_for_salted_requests(strict):
    """With --show-prompts the prompt's text around the change, without a salt."""
    prompt = "The lamp of Ada is red. The lamp of Zoe is {}, and so on and on."
    for colour, salt in (("blue", {}), ("pink", {}), ("grey", {"cache_salt": "s"})):
        strict.answer(COMPLETIONS, prompt=prompt.format(colour), max_tokens=1, **salt)
    salted, shown = strict.client.get("/v1/cache/recent").json()["data"][:2]
    assert "pink" in json.dumps(shown["text"])
    assert not salted.get("text")
    assert "grey" not in json.dumps(salted)


def test_prompts_are_not_logged(server):
    """At the default level neither the prompt nor the reply is in the log."""
    server.answer(COMPLETIONS, prompt="A quixotic marmalade", max_tokens=3)
    server.post(COMPLETIONS, prompt="A quixotic marmalade", max_tokens=0)
    assert "marmalade" not in server.log


def test_statistics_and_clearing(server):
    """Held bytes are what is stored and running; after DELETE nothing is stored."""
    server.answer(COMPLETIONS, prompt=text(100, 2100), max_tokens=2)
    told = server.client.get("/v1/cache").json()
    assert told["held_bytes"] == sum(
        told[name] for name in ("rows_bytes", "snapshot_bytes", "running_bytes")
    )
    assert 0 < told["held_bytes"] <= told["budget_bytes"]
    assert told["checkpoints"] > 0
    assert told["tokens"] >= 100
    assert server.client.delete("/v1/cache").status_code == 200
    told = server.client.get("/v1/cache").json()
    assert (told["rows_bytes"], told["snapshot_bytes"], told["tokens"]) == (0, 0, 0)
    reply = server.answer(COMPLETIONS, prompt=text(100, 2100), max_tokens=2)
    assert cached(reply) == 0


def test_the_budget_is_what_was_asked_for(strict):
    """--cache-ram 64 counts MiB, as in llama.cpp."""
    assert strict.client.get("/v1/cache").json()["budget_bytes"] == 64 * 2**20


def test_a_warmed_prefix_is_hot_for_the_first_request(server):
    """A system message and tools are read ahead; the first question reads only itself."""
    system = {"role": "system", "content": text(200, 2300)}
    shared = {"tools": tools("get_time"), **INSTANT}
    warmed = server.client.post("/v1/cache/warm", json={"messages": [system], **shared})
    assert warmed.status_code == 200
    position = warmed.json()["position"]
    assert position > 200
    question = [system, *user("What time is it in Oslo?")]
    reply = server.answer(CHAT, messages=question, **shared)
    assert cached(reply) >= position - 1
    assert reply["choices"][0]["finish_reason"] == "tool_calls"
    raw = text(150, 2600)
    assert server.client.post("/v1/cache/warm", json={"prompt": raw}).status_code == 200
    assert cached(server.answer(COMPLETIONS, prompt=raw + " and", max_tokens=1)) >= 100
    salted = {"prompt": text(150, 2800), "cache_salt": "s"}
    assert server.client.post("/v1/cache/warm", json=salted).status_code == 200
    assert cached(server.answer(COMPLETIONS, prompt=salted["prompt"], max_tokens=1)) == 0
    assert cached(server.answer(COMPLETIONS, **salted, max_tokens=1)) > 100
    assert server.client.post("/v1/cache/warm", json={}).status_code == 400


def test_pins_are_set_and_taken_back(server):
    """Pinning reads what is not stored; unpinning what is not stored is 404."""
    body = {"prompt": text(150, 3000)}
    pinned = server.client.post("/v1/cache/pin", json=body)
    assert pinned.status_code == 200
    assert cached(server.answer(COMPLETIONS, **body, max_tokens=1)) > 100
    assert server.client.request("DELETE", "/v1/cache/pin", json=body).status_code == 200
    unknown = {"prompt": "never seen " + text(50, 3300)}
    assert server.client.request("DELETE", "/v1/cache/pin", json=unknown).status_code == 404


def test_metrics_are_prometheus(server):
    """They parse, and requests and cached tokens are counted."""

    def read() -> dict[str, float]:
        answer = server.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(answer.text):
            assert family.documentation
            for sample in family.samples:
                if not sample.name.endswith(("_created", "_bucket")):
                    totals[sample.name] = totals.get(sample.name, 0) + sample.value
        return totals

    before = read()
    replies = [server.answer(COMPLETIONS, prompt=text(80, 3400), max_tokens=2) for _ in range(2)]
    after = read()
    restored = cached(replies[1])
    for name, grown in {
        "requests_total": 3,  # the first reading of the metrics is one
        "prompts_total": 2,
        "restored_tokens_total": restored,
        "replayed_tokens_total": 160 - restored,
        "generated_tokens_total": 4,
        "time_to_first_token_seconds_count": 2,
    }.items():
        full = f"mlx_hybridcache_{name}"
        assert after[full] - before.get(full, 0) == grown, name


# Starting and stopping


def test_what_cannot_be_served_ends_the_start_with_one_line(tmp_path):
    """Unknown model, port in use, nonsense: exit status 2, a sentence, no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken, ThreadPoolExecutor(2) as both:
        port = str(taken.getsockname()[1])
        refused = {
            port: ["--port", port],
            "nothing": ["--model", str(tmp_path / "nothing")],
            "nobody/has-this": ["--model", "nobody/has-this"],
            "--adapter-path": ["--adapter-path", str(tmp_path)],
        }
        all_ended = both.map(
            lambda flags: run_to_its_end("--log-level", "ERROR", *flags), refused.values()
        )
        for said, ended in zip(refused, all_ended, strict=True):
            assert ended.returncode == 2, ended
            assert ended.stdout == ""
            (line,) = ended.stderr.splitlines()
            assert line.startswith("mlx_hybridcache.server: ")
            assert said in line


def test_both_entry_points_know_the_same_flags():
    """`mlx-hybridcache serve --help` and `python -m mlx_hybridcache.server --help`."""
    helps = [
        subprocess.run(
            [sys.executable, "-m", *entry, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for entry in (["mlx_hybridcache.cli", "serve"], [OURS])
    ]
    flags = [set(re.findall(r"--[a-z][a-z-]+", shown)) for shown in helps]
    assert flags[0] == flags[1]
    assert "--model" in flags[0]


def test_one_line_says_where_it_listens(server):
    """`Listening on http://127.0.0.1:PORT`, once."""
    assert server.log.count(f"Listening on http://127.0.0.1:{server.port}") == 1


def test_unused_prompt_tokens_are_those_of_the_template(server):
    """The prompt is what the chat template gives, tools included."""
    _, tokenizer = load()
    rendered = tokenizer.apply_chat_template(
        user("Hi"), tools=tools("get_time"), tokenize=False, add_generation_prompt=True
    )
    expected = len(tokenizer.encode(rendered, add_special_tokens=False))
    reply = server.answer(CHAT, messages=user("Hi"), tools=tools("get_time"), max_tokens=1)
    assert reply["usage"]["prompt_tokens"] == expected


def test_neighbouring_prompts_restore_from_each_other(server):
    """Longer, shorter and changed endings of one text: each restores most of it."""
    base = text(400, 3600)
    server.answer(COMPLETIONS, prompt=base, max_tokens=1)
    asked = [base + " and more", text(350, 3600), text(380, 3600) + " but other"]
    replies = [server.answer(COMPLETIONS, prompt=prompt, max_tokens=1) for prompt in asked]
    for reply in replies:
        assert cached(reply) >= 0.5 * reply["usage"]["prompt_tokens"]
    assert all(a["usage"] != b["usage"] for a, b in pairwise(replies))
