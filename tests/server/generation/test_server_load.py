"""Four or eight clients at once, with cancels: every reply equals the one that is read alone without the cache."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from bundled import load, never_ending, text_tokens
from long import forms, in_full
from prometheus_client.parser import text_string_to_metric_families
from servers import CHAT, COMPLETIONS, INSTANT, OURS, Server, running, user

from mlx_hybridcache.demo.functions import FUNCTIONS, Function, values

SEED = 1604
FEW, MANY = (3, 9), (8, 25)
"""Clients, and the requests of each."""

LENGTH = 8

GONE_WHILE_READ, GONE_WHILE_WRITTEN, GONE_UNSTREAMED = "while read", "while written", "unstreamed"
LEAVES = (GONE_WHILE_READ, GONE_WHILE_WRITTEN, GONE_UNSTREAMED, GONE_WHILE_READ)
"""Each client leaves four of its requests, in an order and at places of its own."""

ENDLESS = {"max_tokens": 500, "logit_bias": never_ending()}
"""A reply that ends by its client's leaving only: the end token never comes."""

PATIENCE_SECONDS = 0.4
"""After which a client closes the connection of a request that is not streamed."""

Body = dict[str, Any]
Script = Generator[tuple[str, Body], dict[str, Any] | None, None]
"""Yields requests and is sent their replies."""


@dataclass(frozen=True)
class Asked:
    """A request as one of the clients sent it. A reply of None: its client left."""

    path: str
    body: Body
    leaving: str | None
    reply: dict[str, Any] | None


def words(start: int, count: int) -> str:
    """A stretch of Python's language reference."""
    _, tokenizer = load()
    return str(tokenizer.decode(list(text_tokens(17_000)[start : start + count])))


def agents(rng: random.Random) -> Script:
    """Short questions behind one of three system prompts that all clients share."""
    which = rng.randrange(3)
    system = {"role": "system", "content": words(1_000 * which, (60, 150, 280)[which])}
    for name in rng.sample(["Ada", "Hugo", "Nora", "Ivan", "Maya"], 3):
        thinking = {} if rng.random() < 0.5 else INSTANT
        yield CHAT, {"messages": [system, *user(f"Hi, I am {name}.")], **thinking}


def conversation(rng: random.Random) -> Script:
    """A client's own: turns that build on replies, then another ending of the first."""
    question = words(rng.randint(3_000, 6_000), rng.randint(20, 250))
    messages = user(f"{question}\n\nHow does it begin?")
    for following in ("Note that the lamp of Ada is red.", "Which colour is the lamp of Ada?"):
        reply = yield CHAT, {"messages": messages, **INSTANT}
        said = (reply or {}).get("message", {}).get("content") or "It begins."
        messages = [*messages, {"role": "assistant", "content": said}, *user(following)]
    yield CHAT, {"messages": messages, **INSTANT}
    yield CHAT, {"messages": user(f"{question}\n\nSum it up, please.")}


def tools(rng: random.Random) -> Script:
    """A call over functions that all clients share, with room to be written, and its result."""
    declared = [function.declaration() for function in FUNCTIONS[:3]]
    shared = {"tools": declared, **INSTANT}
    function = rng.choice(FUNCTIONS[:3])
    question = user(asked(function, rng))
    reply = yield CHAT, {"messages": question, **shared, "max_tokens": 40}
    for call in (reply or {}).get("message", {}).get("tool_calls") or ():
        called = {"role": "assistant", "content": "", "tool_calls": [{**call, "id": "call_1"}]}
        found = json.dumps(values(function.results, rng))
        result = {"role": "tool", "tool_call_id": "call_1", "content": found}
        yield CHAT, {"messages": [*question, called, result], **shared}


def asked(function: Function, rng: random.Random) -> str:
    return rng.choice(function.requests).format(**values(function.arguments, rng))


def completion(rng: random.Random) -> Script:
    """Raw text: one of four beginnings that clients share, longer by its reply, then shorter."""
    start, count = 7_000 + 200 * rng.randrange(4), rng.randint(60, 350)
    prompt = words(start, count)
    reply = yield COMPLETIONS, {"prompt": prompt}
    text = (reply or {}).get("text") or " and so on"
    yield COMPLETIONS, {"prompt": f"{prompt}{text} and then"}
    yield COMPLETIONS, {"prompt": words(start, count * 3 // 4)}


KINDS = (agents, agents, conversation, tools, completion)


def documents(number: int) -> Iterator[tuple[str, Body]]:
    """Two long texts, several slices each: the client's own, and one of two that all share."""
    own, shared = words(10_000 + 800 * number, 650), words(1_500 * (number % 2), 1_150)
    yield CHAT, {"messages": user(f"{own}\n\nWhat is this about?"), **INSTANT}
    yield COMPLETIONS, {"prompt": shared}


class Client:
    """One of several: `count` requests, seeded. What it leaves it asks again, this time to the end."""

    def __init__(self, server: Server, number: int, count: int) -> None:
        self._server = server
        self._count = count
        self._rng = rng = random.Random(SEED + number)
        self._documents = documents(number)
        # Leaving and asking again are two requests; so the places are that far apart.
        places = sorted(rng.sample(range(0, count - 1, 2), len(LEAVES)))
        self._leaving = list(zip(places, LEAVES, strict=True))
        self.asked: list[Asked] = []

    def run(self) -> list[Asked]:
        """Ask all of them, one after the other."""
        requests = self._requests()
        following = next(requests)
        while True:
            reply = self._ask(*following)
            if len(self.asked) == self._count:
                return self.asked
            following = requests.send(reply)

    def _requests(self) -> Generator[tuple[str, Body, str | None], dict[str, Any] | None, None]:
        while True:
            script = self._rng.choice(KINDS)(self._rng)
            path, body = next(script)
            while True:
                how = self._leaves_now()
                if how == GONE_WHILE_READ:
                    long = next(self._documents)
                    yield *long, how
                    yield *long, None
                elif how is not None:
                    yield path, body, how
                reply = yield path, body, None
                try:
                    path, body = script.send(reply)
                except StopIteration:
                    break

    def _leaves_now(self) -> str | None:
        is_due = self._leaving and len(self.asked) >= self._leaving[0][0]
        return self._leaving.pop(0)[1] if is_due else None

    def _ask(self, path: str, body: Body, leaving: str | None) -> dict[str, Any] | None:
        top = {"logprobs": True, "top_logprobs": 3} if path == CHAT else {"logprobs": 3}
        whole = {"max_tokens": LENGTH, "temperature": 0, **top, **body}
        reply = None
        if leaving is not None:
            leaving = leave(self._server, path, {**whole, **ENDLESS}, leaving)
        elif self._rng.random() < 0.5:
            stream = self._server.stream(path, **whole, stream_options={"include_usage": True})
            assert stream.done
            reply = {**stream.joined(), "usage": stream.usage}
        else:
            found = self._server.answer(path, **whole)
            reply = {**found["choices"][0], "usage": found["usage"]}
        self.asked.append(Asked(path, whole, leaving, reply))
        return reply


def leave(server: Server, path: str, body: Body, how: str) -> str:
    """Ask and close the connection: at the first sign of reading, at the second event, or soon.

    Returns at which it was: a text that others have read before has no reading to tell of.
    """
    if how == GONE_UNSTREAMED:
        with pytest.raises(httpx2.ReadTimeout):
            server.client.post(path, json=body, timeout=PATIENCE_SECONDS)
        return how
    events = 0
    with server.client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if how == GONE_WHILE_READ and line.startswith(":"):
                return how
            events += line.startswith("data: {")
            if events == 2:
                return GONE_WHILE_WRITTEN
    raise AssertionError("the reply ended before its client could leave")


def essence(reply: dict[str, Any]) -> dict[str, Any]:
    """All that must be equal, streamed or not: what was said, tokens, floats, the end, the counts."""
    logprobs = dict(reply["logprobs"])
    message = {name: value for name, value in reply.get("message", {}).items() if value}
    calls = [call["function"] for call in message.pop("tool_calls", ())]
    counts = {name: reply["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
    return {
        "text": reply.get("text") or None,
        "message": message,
        "calls": calls,
        "logprobs": logprobs,
        "finish_reason": reply["finish_reason"],
        **counts,
    }


def gauges(server: Server) -> dict[str, float]:
    """Every metric without labels."""
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if not sample.labels]
    return {sample.name.removeprefix("mlx_hybridcache_"): sample.value for sample in samples}


BUSY = ("queued", "reading", "following", "writing")


def busy(found: dict[str, float]) -> float:
    """Requests that wait or run."""
    return sum(found[name] for name in BUSY)


@dataclass
class Outcome:
    """What many requests at once left behind, and the replies without the cache."""

    clients: int
    asked: list[Asked]
    cold: dict[str, dict[str, Any]]
    busiest: float
    afterwards: dict[str, float]
    held: dict[str, Any]
    healthy: bool


def key(one: Asked) -> str:
    """Requests that ask the same, streamed or not."""
    return json.dumps([one.path, one.body], sort_keys=True)


@pytest.fixture(scope="module", params=forms(FEW, MANY))
def outcome(request: pytest.FixtureRequest) -> Iterator[Outcome]:
    clients, each = request.param
    load()  # before the clients would do it all at once
    text_tokens(17_000)
    with running(OURS) as server:
        busiest = 0.0
        with ThreadPoolExecutor(clients) as pool:
            asking = [pool.submit(Client(server, number, each).run) for number in range(clients)]
            while not all(client.done() for client in asking):
                busiest = max(busiest, busy(gauges(server)))
                time.sleep(0.1)
        found = [one for client in asking for one in client.result()]
        until = time.monotonic() + 20
        while busy(gauges(server)) or server.client.get("/v1/cache").json()["running_bytes"]:
            if time.monotonic() > until:
                break  # the test says what is left
            time.sleep(0.02)
        afterwards, held = gauges(server), server.client.get("/v1/cache").json()
        healthy = server.healthy
        cold: dict[str, dict[str, Any]] = {}
        for one in found:
            if one.reply is not None and key(one) not in cold:
                reply = server.answer(one.path, **one.body, cache_prompt=False)
                cold[key(one)] = {**reply["choices"][0], "usage": reply["usage"]}
        yield Outcome(clients, found, cold, busiest, afterwards, held, healthy)


def answered(outcome: Outcome) -> Iterator[tuple[Asked, dict[str, Any]]]:
    """Each request that was not left, with its reply."""
    for one in outcome.asked:
        if one.reply is not None:
            yield one, one.reply


def cached(reply: dict[str, Any]) -> int:
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_every_reply_under_load_equals_one_without_the_cache(outcome):
    """Texts, reasoning, calls, tokens, each float of every log-probability, finish reasons."""
    for one, reply in answered(outcome):
        assert essence(reply) == essence(outcome.cold[key(one)]), one.body
        assert reply["logprobs"]


def test_the_cache_was_used_by_the_one_and_not_by_the_other(outcome):
    """Of the whole workload a third of all prompts' tokens came from the cache, of the short one a tenth;
    without it none.
    """
    asked = sum(reply["usage"]["prompt_tokens"] for _, reply in answered(outcome))
    least = asked / (3 if outcome.clients == 8 else 10)
    assert sum(cached(reply) for _, reply in answered(outcome)) > least
    assert not any(cached(reply) for reply in outcome.cold.values())


@pytest.mark.parametrize("outcome", [in_full(MANY)], indirect=True)
def test_the_workload_is_what_it_says(outcome):
    """200 requests of eight clients at once, 32 of them left; short and long, calls and reasoning."""
    assert len(outcome.asked) == 200
    left = Counter(one.leaving for one in outcome.asked if one.leaving)
    assert left[GONE_UNSTREAMED] == 8
    assert left[GONE_WHILE_READ] >= 8  # of 16: half of those texts are read by others too
    assert left[GONE_WHILE_READ] + left[GONE_WHILE_WRITTEN] == 24
    assert outcome.busiest >= outcome.clients / 2
    lengths = [reply["usage"]["prompt_tokens"] for _, reply in answered(outcome)]
    assert min(lengths) < 60
    assert 1_100 < max(lengths) <= 1_200
    assert Counter(one.path for one in outcome.asked)[COMPLETIONS] > 30
    reasons = {reply["finish_reason"] for _, reply in answered(outcome)}
    assert reasons == {"stop", "length", "tool_calls"}
    assert len(outcome.cold) > 100


def test_afterwards_nothing_is_left_running(outcome):
    """No request waits, reads or writes, none holds memory, and the server says that it is well."""
    assert {name: outcome.afterwards[name] for name in BUSY} == dict.fromkeys(BUSY, 0)
    assert outcome.held["running_bytes"] == 0
    assert outcome.healthy


def test_every_client_that_left_was_noticed(outcome):
    """Four replies of each client were given up, whatever stage they were at."""
    left = sum(one.leaving is not None for one in outcome.asked)
    assert left == 4 * outcome.clients
    assert outcome.afterwards["cancelled_total"] == left
