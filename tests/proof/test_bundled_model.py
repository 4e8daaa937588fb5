"""The bundled model: it loads as any model does, was trained as its scripts say, and does its job."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from bundled import load
from bundled_model import evaluate
from bundled_model.architecture import SHAPE
from bundled_model.corpus import documents, split
from bundled_model.data import encode_text
from bundled_model.fast_math import cross_entropy, silu
from bundled_model.gated_delta import chunked_gated_delta, training_forms
from bundled_model.ngrams import NGrams
from bundled_model.train import SMOKE, Run, Settings, load_data, weights_of
from long import forms, mostly_long
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.gated_delta import gated_delta_ops, normalize_qk
from mlx_lm.utils import quantize_model

from mlx_hybridcache.demo import BUNDLED_MODEL

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Local time in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
USER = {"role": "user", "content": "What time is it in Oslo?"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "get_time", "arguments": {"city": "Oslo"}}}],
}
RESULT = {"role": "tool", "content": '{"hour": "10:15"}'}
REPLY = {"role": "assistant", "content": "It is 10:15 in Oslo."}
NEXT = {"role": "user", "content": "And in Lima?"}
THINKING = {**REPLY, "reasoning_content": "The result says 10:15."}


def rendered(*messages: dict[str, Any], **options: Any) -> str:
    """The chat template's text, with the reply opened unless an option says otherwise."""
    options = {"add_generation_prompt": True, **options}
    return load()[1].apply_chat_template(list(messages), tokenize=False, **options)


def tokens_of(*messages: dict[str, Any], **options: Any) -> list[int]:
    return load()[1].encode(rendered(*messages, **options), add_special_tokens=False)


@cache
def replies(kind: str, thinking: bool | None, count: int = 10) -> dict[str, int]:
    """How many of `count` greedy replies to held-out prompts pass each check."""
    model, tokenizer = load()
    passed: dict[str, int] = {}
    for dialogue in evaluate.held_out_dialogues(count, kind, thinking):
        reply = evaluate.greedy(model, tokenizer, dialogue)
        for name, held in evaluate.judge(tokenizer, dialogue, reply).items():
            passed[name] = passed.get(name, 0) + held
    return passed


def test_the_model_directory_is_small():
    """The whole directory takes at most 8 MB of the wheel."""
    assert sum(path.stat().st_size for path in BUNDLED_MODEL.iterdir()) <= 8_000_000


def test_it_is_a_hybrid_of_three_recurrent_layers_to_one():
    """`mlx_lm.load` gives Gated-DeltaNet three times, then attention, and a mixture in each."""
    model, _ = load()
    assert model.args.model_type == "qwen3_next"
    assert [layer.is_linear for layer in model.layers] == [True, True, True, False]
    assert all(layer.mlp.num_experts == 8 for layer in model.layers)
    assert {p.dtype for p in weights_of(model).values()} == {mx.float32}


def test_the_config_is_the_shape_that_the_script_trains():
    """config.json and `SHAPE` agree in every entry."""
    config = json.loads((BUNDLED_MODEL / "config.json").read_text())
    assert {name: config[name] for name in SHAPE} == SHAPE


def test_mlx_lm_finds_reasoning_and_tool_calls():
    """mlx-lm infers both from the vocabulary and the template; two tokens end a reply."""
    _, tokenizer = load()
    assert tokenizer.has_thinking
    assert tokenizer.has_tool_calling
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert tokenizer.eos_token_ids == set(ends)


@pytest.mark.parametrize("tag", ["<|im_start|>", "<think>", "</think>", "<tool_call>"])
def test_each_marker_is_one_token(tag: str):
    """A marker inside text is one token of its own, and decoding gives it back."""
    _, tokenizer = load()
    ids = tokenizer.encode(f"a{tag}b", add_special_tokens=False)
    assert len(ids) == 3
    assert tokenizer.decode(ids) == f"a{tag}b"


def test_any_text_survives_the_tokenizer():
    """Byte-level: signs that training never saw come back as they were."""
    _, tokenizer = load()
    text = "def f(x):\n\treturn  x  # Grüße, 日本語 🙂\r\n\n  42"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_history_without_reasoning_renders_token_for_token():
    """Turn by turn, also over calls and results, each prompt begins with the one before."""
    turns = [USER, CALL, RESULT, REPLY, NEXT]
    whole = tokens_of(*turns, tools=[TOOL])
    for end, opened in ((1, True), (2, False), (3, True), (4, False)):
        part = tokens_of(*turns[:end], tools=[TOOL], add_generation_prompt=opened)
        assert whole[: len(part)] == part


@pytest.mark.parametrize(
    "reply",
    [
        THINKING,
        {**REPLY, "reasoning": "The result says 10:15."},
        {**REPLY, "content": "<think>\nSo it is.\n</think>\n\nIt is 10:15 in Oslo."},
    ],
)
def test_reasoning_is_stripped_from_past_turns(reply: dict[str, Any]):
    """Whether it came as a field (of either name) or in the text, a later user message removes it."""
    assert "<think>" in rendered(USER, reply, add_generation_prompt=False)
    assert rendered(USER, reply, NEXT) == rendered(USER, REPLY, NEXT)


def test_reasoning_since_the_last_question_is_kept():
    """In a tool loop the model still sees why it called."""
    call = {**CALL, "reasoning_content": "I need the time."}
    assert "<think>\nI need the time.\n</think>" in rendered(USER, call, RESULT, tools=[TOOL])
    assert "<think>" not in rendered(USER, call, RESULT, REPLY, NEXT, tools=[TOOL])


def test_thinking_is_switched_off_by_an_empty_block():
    """`enable_thinking=False` ends the prompt with a closed block; the default leaves it open."""
    opened = rendered(USER)
    assert opened.endswith("<|im_start|>assistant\n")
    assert rendered(USER, enable_thinking=True) == opened
    assert rendered(USER, enable_thinking=False) == opened + "<think>\n\n</think>\n\n"


def test_tools_are_declared_in_the_system_turn():
    """With and without a system message there is one system turn, and it declares the tool."""
    for messages in ([USER], [{"role": "system", "content": "Be brief."}, USER]):
        text = rendered(*messages, tools=[TOOL])
        assert text.count("<|im_start|>system\n") == 1
        assert '"name": "get_time"' in text.split("<|im_end|>")[0]


def test_a_rendered_call_is_read_back_by_the_parser():
    """mlx-lm's parser gives the name and the arguments that the template wrote."""
    found = evaluate.parsed_call(load()[1], rendered(CALL, add_generation_prompt=False))
    assert found == {"name": "get_time", "arguments": {"city": "Oslo"}}


def test_neighbouring_results_share_a_turn():
    """Two tool messages make one user turn with two responses."""
    text = rendered(USER, CALL, RESULT, RESULT, tools=[TOOL])
    assert text.count("<tool_response>") == 2
    assert text.count("<|im_start|>user") == 2


@pytest.mark.parametrize("length", [1, 31, 32, 33, 150])
def test_the_chunked_form_computes_what_mlx_lm_does(length: int):
    """Outputs, state and gradients within 1e-4, two value heads to a key head."""
    mx.random.seed(length)
    q, k = (mx.random.normal((2, length, 1, 32)) for _ in range(2))
    q, k = normalize_qk(q, k, inv_scale=32**-0.5, eps=1e-6)
    v, state = mx.random.normal((2, length, 2, 16)), mx.random.normal((2, 2, 16, 32))
    g = mx.random.uniform(0.2, 1.0, (2, length, 2))
    beta = mx.random.uniform(0.0, 1.0, (2, length, 2))
    arguments = (q, k, v, g, beta, state)
    for mine, theirs in zip(
        chunked_gated_delta(*arguments), gated_delta_ops(*arguments), strict=True
    ):
        assert mx.abs(mine - theirs).max() < 1e-4

    def gradients(form: Any) -> Any:
        return mx.grad(lambda *a: (form(*a)[0] ** 2).sum(), argnums=(0, 1, 2, 3, 4, 5))(*arguments)

    if length < 40:
        for mine, theirs in zip(
            gradients(chunked_gated_delta), gradients(gated_delta_ops), strict=True
        ):
            assert mx.abs(mine - theirs).max() < 1e-4


def test_the_model_in_training_forms_is_the_model():
    """The same logits within 1e-3 at 19 of 20 tokens, and mlx-lm's own forms afterwards.

    Not at all of them: where two experts score alike, the last bits choose.
    """
    model, tokenizer = load()
    tokens = mx.array(tokenizer.encode(evaluate.__doc__ * 5))[None]
    plain = model(tokens)
    with training_forms() as balance:
        differences = mx.abs(model(tokens) - plain).max(axis=-1)
        assert (differences < 1e-3).mean() > 0.95
        assert len(balance.terms) == 4
    assert mx.array_equal(model(tokens), plain)


def test_fast_functions_have_the_gradients_of_the_plain_ones():
    """SiLU and weighted cross entropy against MLX's, values and gradients."""
    mx.random.seed(1)
    logits, weights = mx.random.normal((20, 50)) * 3, mx.random.uniform(0, 1, (20,))
    targets = mx.random.randint(0, 50, (20,))

    def plain(x: mx.array) -> mx.array:
        return (weights * nn.losses.cross_entropy(nn.silu(x), targets)).sum()

    def fast(x: mx.array) -> mx.array:
        return cross_entropy(silu(x), targets, weights)

    (a, da), (b, db) = mx.value_and_grad(plain)(logits), mx.value_and_grad(fast)(logits)
    assert abs(a - b) < 1e-3
    assert mx.abs(da - db).max() < 1e-4


@pytest.mark.long
def test_training_resumes_to_the_same_weights(tmp_path):
    """Two steps, a checkpoint, two more in a new run: bit for bit as four without a break."""
    settings = Settings(steps=4, **SMOKE)
    data = load_data(settings, BUNDLED_MODEL)
    losses: list[float] = []
    whole, first, second = (Run(settings, data) for _ in range(3))
    whole.advance(4, lambda figures: losses.append(figures["loss"]))
    first.advance(2, lambda figures: None)
    first.save(tmp_path / "checkpoint-000002")
    second.restore(tmp_path / "checkpoint-000002")
    second.advance(4, lambda figures: None)
    assert losses[-1] < losses[0]
    ours, theirs = weights_of(second.model), weights_of(whole.model)
    assert all(mx.array_equal(ours[name], theirs[name]) for name in theirs)

    other = Run(replace(settings, clip=2.0), data)
    with pytest.raises(ValueError, match="use the same settings"):
        other.restore(tmp_path / "checkpoint-000002")


def test_the_split_keeps_held_out_questions_out_of_training():
    """No last question of a training dialogue is among the held-out ones; files fall on one side."""
    training, held_out = split(documents())
    assert not {d.name for d in training} & {d.name for d in held_out}
    assert all(d.held_out for d in evaluate.held_out_dialogues(50))


@cache
def fitted_ngrams() -> NGrams:
    """What the model is held against, from as many documents."""
    sample = split(documents(), Settings().seed)[0][:250]
    return NGrams.fit(encode_text(load()[1], sample).tolist(), SHAPE["vocab_size"])


@pytest.mark.parametrize("kind", mostly_long(["reference", "library"], ["reference"]))
def test_held_out_text_is_predicted_better_than_by_ngrams(kind: str):
    """By at least 0.3 nats per token better than the bigram, itself better than the unigram."""
    model, tokenizer = load()
    rows = evaluate.held_out_rows(tokenizer, kind, 8)
    unigram, bigram = fitted_ngrams().losses(rows)
    assert evaluate.model_loss(model, rows) < bigram - 0.3 < unigram - 0.3


@pytest.mark.parametrize("thinking", mostly_long([True, False], [False]))
def test_function_prompts_give_a_parseable_call(thinking: bool):
    """At least 9 of 10, of a declared function, and the reply ends by itself."""
    passed = replies("call", thinking)
    assert passed["parseable call"] >= 9
    assert passed["ends by itself"] >= 9


@pytest.mark.parametrize("kind", mostly_long(["chat", "call"], ["chat"]))
def test_reasoning_is_closed_and_the_reply_ends(kind: str):
    """At least 9 of 10 close `</think>`, and at least 9 end by themselves."""
    passed = replies(kind, True)
    assert passed["closes its reasoning"] >= 9
    assert passed["ends by itself"] >= 9


@pytest.mark.parametrize("kind", mostly_long(["chat", "result"], ["result"]))
def test_plain_replies_end_by_themselves(kind: str):
    """At least 9 of 10 without reasoning."""
    assert replies(kind, False)["ends by itself"] >= 9


@pytest.mark.parametrize("ages", forms((1, 200), (1, 64, 1000)))
def test_a_stale_recurrent_state_changes_the_logits(ages: tuple[int, ...]):
    """One token too old is visible, and so are 64 and 1,000."""
    model, tokenizer = load()
    tokens = evaluate.held_out_rows(tokenizer, "library", 4).reshape(-1).tolist()
    changes = evaluate.stale_state(model, tokens[: ages[-1] + 200], ages)
    assert min(changes.values()) > 0.01


def test_it_runs_quantized_to_8_bits():
    """Groups of 64 fit every linear layer, and the logits stay close."""
    import mlx_lm

    model, tokenizer, config = mlx_lm.load(str(BUNDLED_MODEL), return_config=True)
    tokens = mx.array(tokenizer.encode("def main(argv=None):"))[None]
    plain = model(tokens)
    model, config = quantize_model(model, config, group_size=64, bits=8)
    quantized = [m for m in model.modules() if hasattr(m, "bits")]
    assert {m.group_size for m in quantized} == {64}
    small = model(tokens, cache=make_prompt_cache(model))
    assert np.abs(np.array(small - plain)).max() < 0.5
