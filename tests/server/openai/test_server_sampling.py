"""Where a reply stops, what is sampled, and several choices."""

from __future__ import annotations

import asyncio

import httpx2
import pytest
from bundled import load
from replies import content
from servers import (
    CHAT,
    COMPLETIONS,
    INSTANT,
    user,
)

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
