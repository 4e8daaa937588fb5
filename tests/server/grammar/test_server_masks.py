"""The mask of the next token: it keeps what is allowed, follows drafts, and ends with an error."""

from __future__ import annotations

import json
import random

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from bundled import load
from mlx_hybridcache_server.errors import ApiError
from mlx_hybridcache_server.grammar.constrain import masked
from mlx_lm.generate import GenerationResponse, stream_generate
from mlx_lm.models import llama
from texts.constraints import (
    a_schema,
    allowed,
    by_schema,
    chat,
    made,
    tokens_of,
)

from mlx_hybridcache.worker.turns import PAUSE


def test_a_mask_keeps_its_tokens_and_nothing_of_the_padding():
    """Bits 0, 31 and 40 of 41; rows 41 to 47 belong to no token."""
    words = np.array([1 | 1 << 31, 1 << 8 | 1 << 9], dtype=np.uint32).view(np.int32)
    for dtype in (mx.float32, mx.bfloat16):
        out = masked(mx.ones((1, 48), dtype), words, 41)
        assert out.dtype == dtype
        assert np.flatnonzero(np.array(out[0].astype(mx.float32)) == 1).tolist() == [0, 31, 40]
        assert np.isneginf(np.array(out[0].astype(mx.float32))).sum() == 45


def test_only_new_tokens_move_a_reply_on_and_it_ends_when_it_is_complete():
    """The prompt is not part of it; behind the last brace only the end may come."""
    _, tokenizer = load()
    guide = made(chat(response_format=by_schema({"const": {"a": 1}}))).start()
    prompt, reply = tokens_of('{"a": 2}'), tokens_of('{"a": 1}')
    for count in range(len(reply)):
        assert reply[count] in allowed(guide, prompt + reply[:count])
    assert allowed(guide, prompt + reply) == tokenizer.eos_token_ids
    end = [min(tokenizer.eos_token_ids)]
    assert len(allowed(guide, prompt + reply + end)) == 3100  # computed ahead, and never looked at


def test_tokens_that_are_taken_back_are_forgotten():
    """As drafts are; also behind the end of a reply."""
    _, tokenizer = load()
    wanted = made(chat(response_format=by_schema({"type": "array", "items": {"type": "boolean"}})))
    guide, straight = wanted.start(), wanted.start()
    prompt, one, other = [5], tokens_of("[true, false]"), tokens_of("[false]")
    end = [min(tokenizer.eos_token_ids)]
    whole = prompt + one + end
    for count in range(1, len(whole) + 1):
        allowed(guide, whole[:count])
    for count in range(1, len(prompt + other) + 1):
        taken_back = allowed(guide, (prompt + other)[:count])
        assert taken_back == allowed(straight, (prompt + other)[:count])
    assert allowed(guide, prompt + one) == tokenizer.eos_token_ids
    assert allowed(guide, prompt + one + end + other)  # drafted behind an end that is then refused
    straight = wanted.start()
    allowed(straight, prompt)
    assert allowed(guide, prompt + one[:-1]) == allowed(straight, prompt + one[:-1])


def test_drafted_tokens_are_counted_up_to_the_first_that_is_not_allowed():
    """As often as asked, and nothing is taken; behind the end nobody looks."""
    _, tokenizer = load()
    guide = made(chat(response_format=by_schema({"const": {"a": 1}}))).start()
    right, wrong = tokens_of('{"a": 1}'), tokens_of("a")
    end = [min(tokenizer.eos_token_ids)]
    allowed(guide, [5])
    for _ in range(2):
        assert guide.may_follow(right) == len(right)
        assert guide.may_follow([*right[:2], *wrong]) == 2
        assert guide.may_follow(wrong) == 0
    assert right[0] in allowed(guide, [5])
    allowed(guide, [5, *right, *end])
    assert guide.may_follow(wrong) == len(wrong)


def test_a_draft_of_what_is_no_token_of_the_tokenizer_costs_nothing():
    """A model's 3,100 rows are more than its 3,072 tokens: a prompt of ids may hold the others, and so may a draft."""
    guide = made(chat(response_format=by_schema({"const": {"a": 1}}))).start()
    right = tokens_of('{"a": 1}')
    before = allowed(guide, [5])
    assert guide.may_follow([*right[:2], 3090, *right[2:]]) == 2
    assert guide.may_follow([3090]) == 0
    assert allowed(guide, [5]) == before


def test_a_drafted_reply_is_held_to_its_schema():
    """Two Llamas of random weights, the one drafting for the other, with 128 rows of padding."""
    _, tokenizer = load()
    args = llama.ModelArgs("llama", 64, 2, 128, 2, 1e-5, vocab_size=3200, tie_word_embeddings=True)
    mx.random.seed(0)
    model, draft = llama.Model(args), llama.Model(args)
    schema = a_schema(random.Random(12))
    for drafter, count in ((None, {}), (draft, {"num_draft_tokens": 3}), (model, {})):
        guide = made(chat(response_format=by_schema(schema))).start()
        options = {"logits_processors": [guide], "draft_model": drafter, **count}
        steps = stream_generate(model, tokenizer, [1, 2, 3], max_tokens=120, **options)
        replies = list(guide.watching(lambda responses: responses)(steps))
        assert replies[-1].finish_reason == "stop"
        jsonschema.validate(json.loads("".join(reply.text for reply in replies)), schema)


def test_a_reply_that_cannot_go_on_ends_with_an_error():
    """A constant that holds a marker leaves nothing that could follow: the reader is told, in time."""
    _, tokenizer = load()
    guide = made(chat(response_format=by_schema({"const": "a<think>"}))).start()
    tokens = [5]
    while (may := allowed(guide, tokens)) != tokenizer.eos_token_ids:
        tokens.append(min(may))
    good = len(tokens) - 1
    assert good > 2
    responses = iter([PAUSE, *[response()] * (good + 1)])
    read = guide.watching(lambda steps: steps)(responses)
    assert len([next(read) for _ in range(1 + good)]) == 1 + good
    with pytest.raises(ApiError, match="nothing may follow"):
        next(read)


def response() -> GenerationResponse:
    """One of mlx-lm's responses."""
    return GenerationResponse("x", 1, mx.zeros(1), False, 1, 1.0, 1, 1.0, 0.0, None)


def test_a_token_that_was_not_allowed_is_an_error():
    """Whatever chose it: the reply is not silently something else."""
    guide = made(chat(response_format={"type": "json_object"})).start()
    allowed(guide, [5])
    _, tokenizer = load()
    assert allowed(guide, [5, *tokens_of("}")]) == tokenizer.eos_token_ids
    with pytest.raises(ApiError, match="could not be kept"):
        next(guide.watching(lambda steps: steps)(iter([response()])))
