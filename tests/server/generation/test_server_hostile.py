"""Requests that ended mlx_lm.server, and worse: refused or answered, and the next is served."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import httpx2
import pytest
from bundled import load, text
from servers import (
    CHAT,
    COMPLETIONS,
    INSTANT,
    OURS,
    Server,
    begin,
    raw_exchange,
    raw_post,
    raw_status,
    running,
    user,
)

from mlx_hybridcache.demo import BUNDLED_MODEL


@pytest.fixture(scope="module")
def process():
    with running(OURS) as server:
        yield server


@pytest.fixture
def server(process):
    """Whatever a test sent, afterwards the next request is served and the server is healthy."""
    process.newly_logged()
    yield process
    reply = process.answer(CHAT, messages=user("Hello, I am Zoe."), **INSTANT)
    assert reply["choices"][0]["message"]["content"] == "Hello Zoe, how can I help?"
    assert process.healthy
    assert "Traceback" not in (log := process.newly_logged()), log


def assert_refused(server: Server, path: str, /, status: int = 400, **body: Any) -> dict[str, Any]:
    """The request gets a 4xx with OpenAI's error object; returns it."""
    response = server.post(path, **body)
    assert response.status_code == status, f"{body}: {response.status_code} {response.text}"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert isinstance(error, dict)
    return error


# What ends mlx_lm.server


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


@pytest.mark.parametrize("ids", [["99999999"], ["-1"], [str(2**64)], ["a"], [""], ["1.5"]])
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
    "stop": [5, {}, "", [""], ["a"] * 17],
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


# Broken bytes


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b'"text"',
        b"null",
        b"5",
        b"\xff\xfe{",
        b'{"messages": [{"role": "user", "content": "\xc3\x28"}]}',
        b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b"[" * 100_000,
        b'{"messages":' * 50_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages": [{"role": "user", "content": "Hi", "x": ' + b"[" * 900 + b"]" * 900 + b"}]"
        b', "logit_bias": 5}',
        b"\x00" * 1000,
        b'{"messages": [{"role": "user", "content": "Hi"}]} trailing',
    ],
    ids=lambda body: repr(body[:24]),
)
def test_bodies_that_are_no_json_object_are_refused(server, body):
    """Cut, nested a hundred thousand deep, not UTF-8, not an object."""
    for path in (CHAT, COMPLETIONS, "/v1/cache/warm", "/v1/cache/pin"):
        assert raw_status(raw_exchange(server, raw_post(path, body))) == 400


@pytest.mark.parametrize(
    "host", ["[", "[::1", "[]", "]", "[zz]", "[v1.x]", "\xbd", "a@[", "9" * 5000]
)
def test_a_host_or_origin_that_is_no_url_is_refused(server, host):
    """`urlsplit` raises for `//[`, before any key is looked at: 403 with a sentence, no traceback."""
    for name, value in (("Host", host), ("Origin", f"http://{host}")):
        for method in ("GET", "OPTIONS"):
            lines = [f"{method} /health HTTP/1.1", "Connection: close", f"{name}: {value}"]
            lines += ["Host: 127.0.0.1"] * (name != "Host")
            sent = "\r\n".join([*lines, "", ""]).encode("latin-1")
            received = raw_exchange(server, sent)
            assert raw_status(received) == 403, (name, host)
            error = json.loads(received.partition(b"\r\n\r\n")[2])["error"]
            assert error["type"] == "permission_error"


def refusal(server: Server, path: str, body: bytes) -> str:
    """The sentence with which these bytes are refused."""
    received = raw_exchange(server, raw_post(path, body))
    assert raw_status(received) == 400, received
    return str(json.loads(received.partition(b"\r\n\r\n")[2])["error"]["message"])


@pytest.mark.parametrize("field", ["temperature", "unheard_of", "seed"])
def test_what_is_not_json_is_refused_in_any_field(server, field):
    """NaN, and numbers of 5,000 digits: what Python's reader takes, or cannot take."""
    for odd, said in (("NaN", "NaN"), ("-Infinity", "-Infinity"), ("9" * 5000, "more digits")):
        body = f'{{"prompt": "a", "max_tokens": 1, "{field}": [{odd}]}}'.encode()
        assert said in refusal(server, COMPLETIONS, body)
    nested = b'{"prompt": "a", "unheard_of": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert "nested too deeply" in refusal(server, COMPLETIONS, nested)


def test_half_a_character_is_refused_where_a_model_does_not_read_it(server):
    """Under such a salt something was stored, and then no page could name a prefix by its key."""
    for field in ('"cache_salt"', '"model"', '"reasoning_effort"', '"\\udfff"'):
        body = f'{{"messages": [{{"role": "user", "content": "Hi"}}], {field}: "a\\ud800"}}'
        assert "surrogate pair" in refusal(server, CHAT, body.encode())
    named = '{"type": "function", "function": {"name": "\\ud800"}}'
    body = f'{{"messages": [], "tools": [{named}], "tool_choice": {named}}}'
    assert "surrogate pair" in refusal(server, CHAT, body.encode())
    raw = b'{"prompt": "a", "max_tokens": 1, "cache_salt": "\xed\xa0\x80"}'
    assert "UTF-8" in refusal(server, COMPLETIONS, raw)
    whole = b'{"prompt": "a", "max_tokens": 1, "cache_salt": "\\ud83d\\ude00"}'
    assert raw_status(raw_exchange(server, raw_post(COMPLETIONS, whole))) == 200
    body = json.dumps({"key": "f" * 32}).encode()
    assert raw_status(raw_exchange(server, raw_post("/v1/cache/drop", body))) == 404


def test_arguments_of_a_past_call_that_are_nested_too_deeply_are_text(server):
    """The JSON within the JSON: what cannot be read is rendered as it stands, or refused."""
    calls = [{"function": {"name": "f", "arguments": "[" * 2000}}]
    messages = [*user("Hi"), {"role": "assistant", "content": None, "tool_calls": calls}]
    response = server.post(CHAT, messages=messages, max_tokens=1)
    assert response.status_code in (200, 400), response.text


def test_lone_surrogates_and_control_characters_are_text(server):
    """Valid JSON, odd text: answered, whole and streamed; what a client cut reads as U+FFFD."""
    for odd in ("\\ud800", "\\u0000", "\\udfff\\ud800", "\\uffff", "\U0001f600" * 3, "\\u202e"):
        for stream in ("true", "false"):
            body = f'{{"prompt": "a{odd}b", "max_tokens": 2, "stream": {stream}}}'.encode()
            assert raw_status(raw_exchange(server, raw_post(COMPLETIONS, body))) == 200
    tool = {"type": "function", "function": {"name": "f", "description": "cut: \ud83d"}}
    cut = {"messages": user("cut: \ud83d"), "tools": [tool], "max_tokens": 1}
    assert server.answer(CHAT, **json.loads(json.dumps(cut).replace("\\ud83d", "\\ufffd")))
    body = json.dumps(cut).encode()
    assert raw_status(raw_exchange(server, raw_post(CHAT, body))) == 200


def test_special_tokens_in_the_text_are_read(server):
    """A user who writes the template's own markers gets a reply."""
    odd = "<|im_end|>\n<|im_start|>system\n<tool_call>{</tool_call></think><think>"
    assert server.answer(CHAT, messages=user(odd), max_tokens=3)
    assert server.answer(COMPLETIONS, prompt=odd, max_tokens=3)


def test_headers_that_lie_about_the_body(server):
    """No length, two, negative, no number, too short: each is answered with a 4xx or the reply."""
    body = json.dumps({"messages": user("Hi"), "max_tokens": 1, **INSTANT}).encode()
    for length, expected in (("", {400, 411}), ("-1", {400}), ("x", {400}), ("5", {400})):
        sent = raw_post(CHAT, body, Content_Length=length)
        assert raw_status(raw_exchange(server, sent, wait_seconds=5)) in expected, length
    large = raw_post(CHAT, b"{", Content_Length=str(10**15))
    assert raw_status(raw_exchange(server, large, wait_seconds=5)) == 413
    both = raw_post(CHAT, body, Transfer_Encoding="chunked")
    assert raw_status(raw_exchange(server, both, wait_seconds=1)) in {0, 400}
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    chunked = raw_post(CHAT, chunks, Content_Length="", Transfer_Encoding="chunked")
    assert raw_status(raw_exchange(server, chunked)) == 200
    broken = raw_post(CHAT, b"zz\r\n", Content_Length="", Transfer_Encoding="chunked")
    assert raw_status(raw_exchange(server, broken, wait_seconds=1)) in {0, 400}
    other = raw_post(CHAT, body, Content_Type="text/plain; charset=utf-16")
    assert raw_status(raw_exchange(server, other)) in {200, 400, 415}


def test_bytes_that_are_no_http(server):
    """The connection is closed or answered with 400; others are served."""
    for sent in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"\r\n\r\n\r\n", b"A" * 200_000):
        assert raw_status(raw_exchange(server, sent, wait_seconds=1)) in {0, 400, 404, 431}
    lines = b"".join(b"X-%d: %s\r\n" % (i, b"a" * 60) for i in range(5000))
    sent = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + lines + b"\r\n"
    assert raw_status(raw_exchange(server, sent, wait_seconds=2)) in {0, 200, 400, 431}


def test_methods_and_paths_that_are_not_there(server):
    """405 for a known path, 404 for others, all as JSON."""
    for method, path, status in [
        ("GET", CHAT, 405),
        ("PUT", COMPLETIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/v1", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/v1/models/%2e%2e%2fetc%2fpasswd", 404),
        ("POST", "/v1/embeddings", 404),
    ]:
        response = server.client.request(method, path)
        assert response.status_code == status, path
        assert response.json()["error"]["message"]


# Clients that go away


def running_bytes(server: Server) -> int:
    return int(server.client.get("/v1/cache").json()["running_bytes"])


def wait_until_idle(server: Server) -> None:
    """Until no request holds memory; by then abandoned ones must have ended."""
    idle = threading.Event()
    for _ in range(300):
        if running_bytes(server) == 0:
            return
        idle.wait(0.05)
    raise AssertionError("an abandoned request still runs")


def test_a_body_that_never_comes_whole_blocks_nobody(server):
    """Ten connections that sent half of their body, and ten that sent half a header."""
    body = json.dumps({"messages": user("Hi"), "max_tokens": 1}).encode()
    half = raw_post(CHAT, body)[: -len(body) // 2]
    waiting = [begin(server, sent) for sent in [half, half[:40]] * 10]
    assert server.answer(CHAT, messages=user("Hi"), max_tokens=1)
    for connection in waiting:
        connection.close()


def test_a_client_that_vanishes_in_the_middle_of_a_stream_ends_its_request(server):
    """Of 100,000 tokens asked for, the rest is not generated."""
    body = {"prompt": "a", "max_tokens": 100_000, "stream": True, "logit_bias": {"700": 100}}
    for _ in range(3):
        with server.client.stream("POST", COMPLETIONS, json=body) as response:
            lines = response.iter_lines()  # dropping it would close the connection
            next(line for line in lines if line.startswith("data:"))
            assert running_bytes(server) > 0
    wait_until_idle(server)


def test_a_client_that_vanishes_while_its_prompt_is_read_leaves_its_checkpoints(server):
    """Asked again, part of the prompt is there; not streamed, it goes away too."""
    prompt = text(5000)
    body = {"prompt": prompt, "max_tokens": 1}
    with server.client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as response:
        next(line for line in response.iter_lines() if line.startswith(": keepalive"))
    wait_until_idle(server)
    connection = begin(server, raw_post(COMPLETIONS, json.dumps(body | {"max_tokens": 9}).encode()))
    connection.close()
    wait_until_idle(server)
    reply = server.answer(COMPLETIONS, **body)
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] >= 1024


def test_a_client_that_reads_slowly_delays_nobody(server):
    """A stream that nobody reads does not keep others from being served."""
    body = {"prompt": "a", "max_tokens": 3000, "stream": True, "logit_bias": {"700": 100}}
    connection = begin(server, raw_post(COMPLETIONS, json.dumps(body).encode()))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    assert server.answer(CHAT, messages=user("Hi"), max_tokens=1)
    connection.close()
    wait_until_idle(server)


def test_many_hostile_requests_at_once_and_good_ones_between(server):
    """Thirty at a time, a third of them good: those are answered, all the others refused."""
    statuses: dict[int, list[int]] = {200: [], 400: []}

    def ask(number: int) -> None:
        wrong = number % 3 != 0
        body = {"messages": user(f"Hi, I am number {number}."), "max_tokens": 2, **INSTANT}
        if wrong:
            body["stop"] = number
        with httpx2.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            statuses[400 if wrong else 200].append(client.post(CHAT, json=body).status_code)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == {200: [200] * 10, 400: [400] * 20}
