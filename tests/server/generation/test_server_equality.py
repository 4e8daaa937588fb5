"""A mixed workload with the cache on and off: every text, token and log-probability is equal."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import pytest
from bundled import load, text_tokens
from long import forms, in_full
from mlx_hybridcache_server.jsontext import without_halves
from servers import CHAT, COMPLETIONS, INSTANT, OURS, Server, running, user
from texts import strict
from texts.histories import history

from mlx_hybridcache.demo.functions import FUNCTIONS, Function, values

SEED = 1162
LENGTH = 12
EXACTLY = [] if mx.default_device() == mx.cpu else ["--exact"]
"""On Metal the shape of a slice can change the last bits; exact mode makes every run slice alike."""

Message = dict[str, Any]
Request = tuple[str, dict[str, Any]]
Family = Generator[Request, dict[str, Any], None]
"""Yields requests, one built on another's reply, which it is sent."""


def document(rng: random.Random, low: int, high: int) -> str:
    """A stretch of Python's language reference, `low` to `high` tokens long."""
    _, tokenizer = load()
    start = rng.randint(0, 5_000)
    return str(tokenizer.decode(list(text_tokens(6_200)[start : start + rng.randint(low, high)])))


def reply_of(reply: dict[str, Any]) -> Message:
    """The message as a client sends it back."""
    message: Message = reply["choices"][0]["message"]
    return {name: value for name, value in message.items() if value is not None}


def conversation(rng: random.Random) -> Family:
    """Turns that build on replies, then an edit, another ending, the same again, a retry."""
    thinking = {} if rng.random() < 0.5 else INSTANT
    system = [{"role": "system", "content": document(rng, 40, 150)}] if rng.random() < 0.7 else []
    question = document(rng, 100, 400)
    messages: list[Message] = [*system, *user(f"{question}\n\nHow does it begin?")]
    for following in ("Note that the lamp of Ada is red.", "Which colour is the lamp of Ada?"):
        reply = yield CHAT, {"messages": messages, **thinking}
        messages = [*messages, reply_of(reply), *user(following)]
    yield CHAT, {"messages": messages, **thinking}
    yield CHAT, {"messages": messages, **thinking, "seed": 7}  # regenerated
    edited = [*messages[:-2], *user("No: note that it is green."), messages[-1]]
    yield CHAT, {"messages": edited, **thinking}
    ending = [*system, *user(f"{question}\n\nSum it up, please.")]
    yield CHAT, {"messages": ending, **thinking}
    yield CHAT, {"messages": messages[:-1], **thinking, "stream": True}


def tool_loop(rng: random.Random) -> Family:
    """A call, its result, a further question, another question over the same tools."""
    first, second = rng.sample(FUNCTIONS, 2)
    declared = [
        function.declaration()
        for function in [first, second, *rng.sample(FUNCTIONS, rng.randint(0, 4))]
    ]
    shared: dict[str, Any] = {"tools": declared, **INSTANT}
    messages: list[Message] = user(asked(first, rng))
    reply = yield CHAT, {"messages": messages, **shared, "max_tokens": 48}
    calls = reply["choices"][0]["message"].get("tool_calls") or []
    messages = [*messages, reply_of(reply)]
    for call in calls:
        found = json.dumps(values(first.results, rng))
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": found})
    reply = yield CHAT, {"messages": messages, **shared}
    messages = [*messages, reply_of(reply), *user(asked(second, rng))]
    yield CHAT, {"messages": messages, **shared, "stream": True}
    yield CHAT, {"messages": user(asked(second, rng)), **shared}
    yield CHAT, {"messages": user("Hello, I am Zoe."), **shared, "tool_choice": "auto"}


def asked(function: Function, rng: random.Random) -> str:
    return rng.choice(function.requests).format(**values(function.arguments, rng))


def completion(rng: random.Random) -> Family:
    """A text, made longer by its reply, shorter, changed at its end and in its middle."""
    words = document(rng, 300, 1100).split(" ")
    reply = yield COMPLETIONS, {"prompt": " ".join(words)}
    longer = " ".join(words) + reply["choices"][0]["text"] + " and then"
    yield COMPLETIONS, {"prompt": longer, "stream": True}
    yield COMPLETIONS, {"prompt": " ".join(words[: -len(words) // 4])}
    yield COMPLETIONS, {"prompt": " ".join([*words[:-3], "something", "else"]), "seed": 3}
    middle = len(words) // 2
    yield COMPLETIONS, {"prompt": " ".join([*words[:middle], "changed", *words[middle + 1 :]])}


def shared_beginning(rng: random.Random) -> Family:
    """Short questions behind one system message, thinking and not."""
    system = {"role": "system", "content": document(rng, 40, 250)}
    for name in ("Ada", "Hugo", "Nora", "Ivan", "Maya"):
        thinking = {} if rng.random() < 0.5 else INSTANT
        yield CHAT, {"messages": [system, *user(f"Hi, I am {name}.")], **thinking}


def odd_history(rng: random.Random) -> Family:
    """A conversation as clients really send them, each time that it asks for the next reply."""
    found = history(rng.randint(0, 10**6))
    messages = without_halves(found.messages)
    for count in found.questions()[:3]:
        yield CHAT, {"messages": messages[:count], **INSTANT}


KINDS = [conversation] * 5 + [tool_loop] * 5 + [completion] * 4 + [shared_beginning] * 4
STRICT_KINDS = [tool_loop, odd_history, odd_history, odd_history, conversation]
SOME_KINDS = [conversation, tool_loop, completion, shared_beginning]


def essence(reply: dict[str, Any]) -> dict[str, Any]:
    """All that must be equal: the choice, with the ids of calls left out, and the token counts."""
    choice = json.loads(json.dumps(reply["choices"][0]))
    for call in choice.get("message", {}).get("tool_calls") or ():
        del call["id"]
    counts = {name: reply["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
    return {**choice, **counts}


def ask(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The reply; a stream in the shape of one that is not streamed."""
    if not body.get("stream"):
        return server.answer(path, **body)
    stream = server.stream(path, **body, stream_options={"include_usage": True})
    assert stream.done
    return {"choices": [stream.joined()], "usage": stream.usage}


Replies = list[tuple[str, dict[str, Any], dict[str, Any]]]


def compared(kinds: list[Any], *flags: str) -> Replies:
    """Each request's kind and its two replies: from the cache, and from a server that has none."""
    rng, found = random.Random(SEED), []
    waiting: list[tuple[str, Family, dict[str, Any] | None]] = [
        (kind.__name__, kind(random.Random(rng.random())), None) for kind in kinds
    ]
    rng.shuffle(waiting)
    with (
        running(OURS, *EXACTLY, *flags) as hot,
        running(OURS, *EXACTLY, *flags, "--prompt-cache-size", "0") as cold,
        ThreadPoolExecutor(2) as both,
    ):
        while waiting:  # the families take turns, so that the cache holds all of them
            kind, family, reply = waiting.pop(0)
            try:
                path, request = family.send(reply) if reply else next(family)
            except StopIteration:
                continue
            top = {"logprobs": True, "top_logprobs": 5} if path == CHAT else {"logprobs": 5}
            body = {"max_tokens": LENGTH, "temperature": 0, **top, **request}
            asking = [both.submit(ask, server, path, body) for server in (hot, cold)]
            replies = [one.result() for one in asking]
            found.append((kind, *replies))
            waiting.append((kind, family, replies[0]))
    return found


@pytest.fixture(scope="module", params=forms(SOME_KINDS, KINDS))
def replies(request: pytest.FixtureRequest) -> Replies:
    return compared(request.param)


@pytest.mark.parametrize("kinds", forms(STRICT_KINDS[:2], STRICT_KINDS))
def test_a_strict_template_changes_nothing_about_it(kinds: list[Any]) -> None:
    """A loop of calls in XML, odd histories, a conversation: hot as cold, half restored, or a quarter of
    the first two.
    """
    replies = compared(kinds, "--model", str(strict.directory()))
    for number, (kind, hot, cold) in enumerate(replies):
        assert essence(hot) == essence(cold), f"request {number}, {kind}"
    assert not any(cached(cold) for _, _, cold in replies)
    asked = sum(hot["usage"]["prompt_tokens"] for _, hot, _ in replies)
    assert sum(cached(hot) for _, hot, _ in replies) > asked / (2 if len(kinds) > 2 else 4)
    assert {kind for kind, _, _ in replies} == {kind.__name__ for kind in kinds}


def test_replies_from_the_cache_equal_replies_without_it(replies):
    """22 or 100 requests: texts, calls, tokens, every float of every log-probability, finish reasons."""
    assert len(replies) in (22, 100)
    for number, (kind, hot, cold) in enumerate(replies):
        assert essence(hot) == essence(cold), f"request {number}, {kind}"
        assert hot["choices"][0]["logprobs"]


def cached(reply: dict[str, Any]) -> int:
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_the_cache_was_used_and_switched_off(replies):
    """More than half of all prompt tokens were restored, in each kind of workload some; cold, none."""
    assert not any(cached(cold) for _, _, cold in replies)
    restored, asked = Counter[str](), Counter[str]()
    for kind, hot, _ in replies:
        restored[kind] += cached(hot)
        asked[kind] += hot["usage"]["prompt_tokens"]
    assert restored.total() > asked.total() / 2
    assert all(restored[kind] > asked[kind] / 4 for kind in asked)
    assert asked.total() < 60_000


@pytest.mark.parametrize("replies", [in_full(KINDS)], indirect=True)
def test_the_workload_is_what_it_says(replies):
    """Prompts of 50 to 1,500 tokens, calls and reasoning among the replies, not all alike."""
    lengths = [hot["usage"]["prompt_tokens"] for _, hot, _ in replies]
    assert 50 <= min(lengths) < 100
    assert 700 < max(lengths) <= 1500
    reasons = Counter(hot["choices"][0]["finish_reason"] for _, hot, _ in replies)
    assert reasons.keys() == {"stop", "length", "tool_calls"}
    assert len({json.dumps(essence(hot)["logprobs"]) for _, hot, _ in replies}) > 60
