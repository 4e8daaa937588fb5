"""Log-probabilities: sorted, complete, finite, and spelling the text."""

from __future__ import annotations

import functools
import math
from typing import Any

import openai
import pytest
from bundled import load
from mlx_hybridcache_server.generation.pieces import TokenLogprob
from mlx_hybridcache_server.openai.logprobs import TokenNames
from replies import content
from servers import (
    CHAT,
    COMPLETIONS,
    INSTANT,
    user,
)


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


def test_a_token_that_cannot_come_has_openais_number():
    """JSON has no infinity, and clients read null as no number at all."""
    names = TokenNames(lambda token: b"x")
    entry = names.entry(TokenLogprob(1, -math.inf, ((1, -math.inf), (2, -1.5))))
    assert [entry["logprob"], *(each["logprob"] for each in entry["top_logprobs"])] == [
        *(-9999.0, -9999.0, -1.5)
    ]
