"""Requests that ended mlx_lm.server, and worse: refused or answered, and the next is served."""

from __future__ import annotations

import json
from typing import Any

import pytest
from bundled import load, text
from servers import (
    CHAT,
    COMPLETIONS,
    INSTANT,
    raw_exchange,
    raw_post,
    raw_status,
    user,
)
from serving.refusals import assert_refused, unharmed

from mlx_hybridcache.demo import BUNDLED_MODEL


@pytest.fixture
def server(server):
    with unharmed(server):
        yield server


@pytest.mark.parametrize("stop", [5, [5], [[]], {"a": 1}, True, ["a", None], [["a"]]])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_that_are_none_are_refused(server, stop, stream):
    """`stop: 5` and `stop: [5]` end mlx_lm.server's generation for good."""
    body = {"messages": user("Hi"), "stop": stop, "stream": stream}
    assert assert_refused(server, CHAT, **body)["param"] == "stop"


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], ["a", ""], [["a"]], [1, "a"], [-1], [10**6], [2**70], [1.5], None, 5]
)
def test_prompts_that_are_none_are_refused(server, prompt):
    """Empty, mixed, or ids that the vocabulary does not have."""
    assert assert_refused(server, COMPLETIONS, prompt=prompt)["param"] == "prompt"


def test_a_list_of_prompts_is_answered(server):
    """`["a", "b"]` ends mlx_lm.server; here each gets its choice."""
    reply = server.answer(COMPLETIONS, prompt=["a", "b"], max_tokens=2)
    assert len(reply["choices"]) == 2


def test_a_prompt_that_was_read_before_is_answered(server):
    """Exactly, three times; then less its last token, less two, less all but one."""
    _, tokenizer = load()
    ids = tokenizer.encode(text(60, 3000), add_special_tokens=False)
    whole = [server.answer(COMPLETIONS, prompt=ids, max_tokens=3) for _ in range(3)]
    assert whole[0]["choices"] == whole[1]["choices"] == whole[2]["choices"]
    for length in (len(ids) - 1, len(ids) - 2, 1):
        replies = [
            server.answer(COMPLETIONS, prompt=ids[:length], max_tokens=3, **salt)
            for salt in ({}, {"cache_salt": f"cold-{length}"})
        ]
        assert replies[0]["choices"] == replies[1]["choices"]


def test_a_prompt_with_its_reply_less_the_last_token_is_answered(server):
    """The caches of a finished reply stand one token further than such a prompt may use."""
    _, tokenizer = load()
    ids = tokenizer.encode("The pass statement", add_special_tokens=False)
    reply = server.answer(CHAT, messages=user("Hi"), logprobs=True, max_tokens=8)
    entries = reply["choices"][0]["logprobs"]["content"]
    first = server.answer(COMPLETIONS, prompt=ids, max_tokens=8, logprobs=0)
    told = first["choices"][0]["text"]
    written = tokenizer.encode(told, add_special_tokens=False)
    for extra in range(len(written) + 1):
        assert server.answer(COMPLETIONS, prompt=ids + written[:extra], max_tokens=1)
    assert len(entries) == 8


@pytest.mark.parametrize(
    "ids", [["99999999"], ["3072"], ["-1"], [str(2**64)], ["a"], [""], ["1.5"]]
)
def test_a_bias_outside_the_vocabulary_is_refused(server, ids):
    """It is a segmentation fault in mlx_lm.server."""
    body = {"prompt": "a", "logit_bias": dict.fromkeys(ids, 1)}
    assert assert_refused(server, COMPLETIONS, **body)["param"] == "logit_bias"


ODD_IDS = ["9" * 5000, "0" * 5000 + "5", "²", "\u0665"]


@pytest.mark.parametrize("id_", ODD_IDS, ids=["digits", "zeros", "squared", "arabic"])
def test_a_bias_for_what_python_reads_as_a_number_is_refused(server, id_):
    """`int()` refuses 5,000 digits and `²`, which `str.isdigit` takes; an id is neither."""
    error = assert_refused(server, COMPLETIONS, prompt="a", logit_bias={id_: 1})
    assert error["param"] == "logit_bias"
    assert len(error["message"]) < 2100


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 2**64 - 1, 0])
def test_any_seed_of_64_bits_is_one(server, seed):
    """-1 drops the connection of mlx_lm.server."""
    body = {"prompt": "def", "max_tokens": 4, "temperature": 1, "seed": seed}
    texts = {server.answer(COMPLETIONS, **body)["choices"][0]["text"] for _ in range(2)}
    assert len(texts) == 1


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**30, 1.5, "1", [1], True])
def test_other_seeds_are_refused(server, seed):
    """Too large, too small, no whole number."""
    assert assert_refused(server, COMPLETIONS, prompt="def", seed=seed)["param"] == "seed"


def test_a_draft_model_on_a_hybrid_is_refused(server):
    """mlx_lm.server drops the connection: a recurrent state cannot take tokens back."""
    body = {"messages": user("Hello, I am Zoe."), "draft_model": str(BUNDLED_MODEL), **INSTANT}
    assert assert_refused(server, CHAT, **body)["param"] == "draft_model"


# Wrong types and sizes, in every field

WRONG: dict[str, list[Any]] = {
    "model": [5, ["a"], {}, True, "../../etc", "a" * 5000, "\x00"],
    "messages": [None, "Hi", {}, [], [5], [None], ["Hi"], [[]], [{}], [{"role": 5}]],
    "stream": [1, "true", [], {}],
    "stream_options": [1, "x", [], {"include_usage": 1}, {"include_usage": "yes"}],
    "max_tokens": [0, -1, "5", 1.5, True, [], {}],
    "max_completion_tokens": [0, -1, "5", 1.5, True, []],
    "temperature": [-1, -1e-9, "1", True, [], {}],
    "top_p": [-0.1, 1.1, "1", True, []],
    "top_k": [-1, 1.5, "1", True],
    "min_p": [-0.1, 1.1, "0"],
    "xtc_probability": [-1, 2, "0"],
    "xtc_threshold": [-1, 2, "0"],
    "repetition_penalty": [-1, "1", True],
    "repetition_context_size": [-1, 1.5, "1"],
    "presence_penalty": ["1", [], True],
    "presence_context_size": [-1, 1.5],
    "frequency_penalty": ["1", {}, True],
    "frequency_context_size": [-1, 1.5],
    "logit_bias": [[], "a", 5, {"1": "x"}, {"1": None}, {"1": []}, {"1": True}],
    "logprobs": ["yes", 5, []],
    "top_logprobs": [-2, 21, 1.5, "5", True],
    "stop": [5, {}, [5], ["a"] * 17],
    "n": [0, -1, 9, 1.5, "1", True],
    "tools": [5, "x", {}, [5], ["x"], [{}], [{"type": "function"}], [{"function": {}}]],
    "tool_choice": [5, "always", [], {}, {"type": "function"}, {"function": {"name": 5}}],
    "parallel_tool_calls": [1, "no", []],
    "chat_template_kwargs": [5, "x", []],
    "role_mapping": [5, "x", [], {"user": 5}],
    "continue_final_message": [1, "x"],
    "add_generation_prompt": [1, "x"],
    "cache_salt": [5, [], {}],
    "draft_model": [5, []],
    "num_draft_tokens": [-1, 1.5, "1"],
    "adapters": [5, []],
    "response_format": [5, "text", [], {}, {"type": "json_schema"}, {"type": "xml"}],
    "reasoning_effort": [5, []],
}


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_value_is_refused_and_named(server, field):
    """400 (or 404 for a model's name), and `param` says which field it was."""
    for value in WRONG[field]:
        body = {"messages": user("Hi"), "max_tokens": 2, **INSTANT, field: value}
        status = 404 if field == "model" and isinstance(value, str) else 400
        error = assert_refused(server, CHAT, status, **body)
        assert error["param"].partition(".")[0] == field, value


CONTENTS: list[Any] = [
    5,
    {},
    True,
    [5],
    [{}],
    [{"type": "text"}],
    [{"type": "text", "text": 5}],
    [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/cat.png"}}],
    [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
    [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}],
    [{"type": "file", "file": {"file_id": "a"}}],
]


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_a_content_that_is_no_text_is_refused_where_it_is_asked_about(server, content):
    """Numbers, parts without text, images, sounds, files; parts leave a sentence in a history."""
    for role in ("user", "system", "assistant", "tool"):
        messages = [*user("Hi"), {"role": role, "content": content}]
        if isinstance(content, list) and role != "user":
            assert server.answer(CHAT, messages=messages, max_tokens=1)
            continue
        error = assert_refused(server, CHAT, messages=messages, max_tokens=2)
        assert error["param"].partition(".")[0] == "messages"


@pytest.mark.parametrize(
    "calls",
    [
        5,
        "x",
        {},
        [5],
        [{}],
        [{"function": 5}],
        [{"function": {}}],
        [{"function": {"name": 5, "arguments": "{}"}}],
        [{"function": {"name": "f", "arguments": "{"}}],
        [{"function": {"name": "f", "arguments": 5}}],
    ],
    ids=str,
)
def test_tool_calls_in_the_history_that_are_none(server, calls):
    """Refused, or rendered as they are: never a failure of the server's own."""
    messages = [*user("Hi"), {"role": "assistant", "content": None, "tool_calls": calls}]
    response = server.post(CHAT, messages=[*messages, *user("Hi")], max_tokens=2)
    assert response.status_code in (200, 400)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"messages": []},
        {"conversation": 5},
        {"tools": 5},
        {"tokenize": False},
        {"add_generation_prompt": 5},
        {"return_tensors": "pt"},
        {"chat_template": "{{ 1 / 0 }}"},
        {"chat_template": "{% for i in range(10**12) %}x{% endfor %}"},
        {"return_dict": True},
        {"continue_final_message": True},
        {"padding": "max_length", "max_length": 10**9},
        {"": 1},
        {"enable_thinking": {"a": [1]}},
    ],
    ids=str,
)
def test_template_arguments_cannot_take_over_the_rendering(server, kwargs):
    """Names that the server itself passes to the template are refused or have no effect."""
    response = server.post(CHAT, messages=user("Hi"), max_tokens=2, chat_template_kwargs=kwargs)
    assert response.status_code in (200, 400), response.text


def test_numbers_as_large_as_they_come(server):
    """A large limit is a limit; infinities and what no float holds are refused."""
    hello = user("Hello, I am Zoe.")
    large = server.answer(CHAT, messages=hello, max_tokens=10**9, top_k=10**9, **INSTANT)
    assert large["choices"][0]["finish_reason"] == "stop"
    for given in (
        '{"messages": %s, "temperature": 1e999}',
        '{"messages": %s, "temperature": NaN}',
        '{"messages": %s, "presence_penalty": Infinity}',
        '{"messages": %s, "presence_penalty": -Infinity}',
        '{"messages": %s, "max_tokens": 1e3}',
        '{"messages": %s, "max_tokens": ' + "9" * 5000 + "}",
        '{"messages": %s, "logit_bias": {"5": NaN}}',
        '{"messages": %s, "temperature": ' + "9" * 400 + "}",
    ):
        body = (given.replace("%s", json.dumps(hello))).encode()
        assert raw_status(raw_exchange(server, raw_post(CHAT, body))) == 400, given[:80]
