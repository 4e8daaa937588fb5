"""Bodies, headers and bytes that are none: refused, and the next request is served."""

from __future__ import annotations

import json

import pytest
from servers import (
    CHAT,
    COMPLETIONS,
    INSTANT,
    Server,
    raw_exchange,
    raw_post,
    raw_status,
    user,
)
from serving.refusals import unharmed


@pytest.fixture
def server(server):
    with unharmed(server):
        yield server


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
    """405 for a known path, 404 for others, 501 for what is known and not made here; all as JSON."""
    for method, path, status in [
        ("GET", CHAT, 405),
        ("PUT", COMPLETIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/v1", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/v1/models/%2e%2e%2fetc%2fpasswd", 404),
        ("POST", "/v1/images/generations", 404),
        ("POST", "/v1/embeddings", 501),
    ]:
        response = server.client.request(method, path)
        assert response.status_code == status, path
        assert response.json()["error"]["message"]
