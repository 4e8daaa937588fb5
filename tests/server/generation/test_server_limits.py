"""What the server does when there is too much to do, over HTTP, with real clients at once."""

import threading
import time
from contextlib import contextmanager

import pytest
from bundled import never_ending, text
from prometheus_client.parser import text_string_to_metric_families
from servers import COMPLETIONS, OURS, Stream, read_stream, running

LONG = {"prompt": text(2500, start=700), "max_tokens": 4}
ENDLESS = {"prompt": "The", "max_tokens": 100_000, "temperature": 1, "logit_bias": never_ending()}


@pytest.fixture(scope="module")
def narrow():
    """One request at a time, one that waits, and two seconds for each."""
    flags = ("--decode-concurrency", "1", "--max-queue", "1", "--request-timeout", "2")
    with running(OURS, *flags) as server:
        yield server


def metrics(server):
    """Every sample without labels, and those of `refused` by why."""
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    found = {s.name.removeprefix("mlx_hybridcache_"): s.value for s in samples if not s.labels}
    refused = {s.labels["why"]: s.value for s in samples if s.name.endswith("refused_total")}
    return found, refused


def wait_until(server, name, value):
    until = time.monotonic() + 60
    while metrics(server)[0][name] != value:
        assert time.monotonic() < until, f"{name} never became {value}"
        time.sleep(0.02)


@contextmanager
def endless(server, seed):
    """A stream that runs until the block ends; its events are kept."""
    stream = Stream(0, {})
    told = threading.Event()

    def listen():
        body = {**ENDLESS, "seed": seed, "stream": True}
        with server.client.stream("POST", COMPLETIONS, json=body) as response:
            stream.status = response.status_code
            for kind in read_stream(response.iter_lines(), stream):
                if kind == "event":
                    told.set()

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        yield stream, told
    finally:
        listener.join()


def test_a_full_queue_is_answered_with_429_and_a_time_to_wait(narrow):
    """One runs, one waits, the third is told to come again; then all is well."""
    _, refused = metrics(narrow)
    with endless(narrow, 1) as (first, told):
        told.wait(60)
        with endless(narrow, 2) as (second, _):
            wait_until(narrow, "queued", 1)
            third = narrow.post(COMPLETIONS, prompt="x", max_tokens=1)
            assert third.status_code == 429
            assert int(third.headers["Retry-After"]) > 0
            assert third.json()["error"]["code"] == "queue_full"
            assert third.json()["error"]["type"] == "rate_limit_error"
    assert metrics(narrow)[1].get("queue", 0) == refused.get("queue", 0) + 1
    assert first.status == second.status == 200
    assert narrow.answer(COMPLETIONS, prompt="x", max_tokens=1)["choices"]


def test_a_stream_that_takes_too_long_ends_with_an_event(narrow):
    """After two seconds: what was written, an error with code timeout, and [DONE]."""
    with endless(narrow, 3) as (stream, _):
        pass
    assert stream.done
    assert len(stream.choices) > 1
    assert stream.events[-1]["error"]["code"] == "timeout"


def test_a_reply_that_takes_too_long_is_a_504(narrow):
    """Not streamed: the status says it."""
    response = narrow.post(COMPLETIONS, **ENDLESS)
    assert response.status_code == 504
    assert "--request-timeout" in response.json()["error"]["message"]


def test_what_was_read_before_the_time_was_over_is_kept(narrow):
    """A prompt that takes longer than two seconds gets further with each try: here the first of these
    that does, from 9,000 tokens on.
    """
    for length in (9_000, 18_000, 36_000, 72_000):
        prompt = text(length, start=3000 + length // 9)
        response = narrow.post(COMPLETIONS, prompt=prompt, max_tokens=1)
        if response.status_code != 200:
            break
    tries = 1
    while response.status_code != 200:
        assert response.status_code == 504
        assert tries < 12
        tries += 1
        response = narrow.post(COMPLETIONS, prompt=prompt, max_tokens=1)
    assert tries > 1, "even the longest was read in two seconds"
    assert response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_eight_agents_with_one_system_prompt_read_it_once():
    """Over HTTP, all at once: the metrics say how many tokens were read in total."""
    system = text(2000, start=20_000)
    with running(OURS) as server:
        replies = {}

        def ask(agent):
            messages = [
                {"role": "system", "content": system},
                {"role": "user", "content": f"I am number {agent}."},
            ]
            replies[agent] = server.answer("/v1/chat/completions", messages=messages, max_tokens=4)

        agents = [threading.Thread(target=ask, args=(agent,)) for agent in range(8)]
        for agent in agents:
            agent.start()
        for agent in agents:
            agent.join()
        found, _ = metrics(server)
        asked = sum(reply["usage"]["prompt_tokens"] for reply in replies.values())
        assert found["restored_tokens_total"] + found["replayed_tokens_total"] == asked
        assert asked > 16_000
        # Those that come before the first is at it for a slice may have begun for themselves.
        assert found["replayed_tokens_total"] < 2000 + 8 * 60
        assert found["hit_ratio"] == pytest.approx(found["restored_tokens_total"] / asked)
        alone = {}
        for agent in range(8):
            ask(agent)
            alone[agent] = replies[agent]["choices"][0]["message"]
        assert all(replies[agent]["choices"][0]["message"] == alone[agent] for agent in range(8))


def test_several_choices_share_one_reading():
    """Four of a prompt of 2,500 tokens: it is read once, and counted once."""
    with running(OURS) as server:
        reply = server.answer(COMPLETIONS, **LONG, n=4, temperature=1, seed=5)
        found, _ = metrics(server)
        assert len(reply["choices"]) == 4
        assert found["replayed_tokens_total"] == reply["usage"]["prompt_tokens"] + 3
        seeds = [server.answer(COMPLETIONS, **LONG, temperature=1, seed=5 + i) for i in range(4)]
        assert [choice["text"] for choice in reply["choices"]] == [
            one["choices"][0]["text"] for one in seeds
        ]


def test_exact_mode_says_at_its_start_what_it_costs_others():
    """Its slices stay whole; and it answers."""
    with running(OURS, "--exact", "--prefill-step-size", "512") as server:
        assert "whole slices of 512 tokens" in server.log
        assert server.answer(COMPLETIONS, **LONG)["choices"]


def test_prompts_are_private_in_the_log(narrow):
    """Neither a request that is answered nor one that is refused leaves its text there."""
    narrow.answer(COMPLETIONS, prompt="unmistakable words", max_tokens=1)
    narrow.post(COMPLETIONS, prompt="unmistakable words", max_tokens=1, stop=5)
    assert "restored" in narrow.log
    assert "unmistakable" not in narrow.log
