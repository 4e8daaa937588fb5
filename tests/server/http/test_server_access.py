"""Who may ask, from where, and for how much: keys, origins, hosts and sizes."""

from __future__ import annotations

import re

import httpx2
import openai
import pytest
from bundled import text
from servers import (
    CHAT,
    COMPLETIONS,
    raw_exchange,
)


def test_a_key_is_asked_for_and_health_is_not_guarded(strict):
    """401 without it and with another; the right one answers."""
    for key in ("none", "a-ke", "a-key-", "ä"):
        headers = {"Authorization": f"Bearer {key}".encode()}
        for path in ("/v1/models", "/v1/cache", "/metrics"):
            refused = strict.client.get(path, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
    with openai.OpenAI(base_url=f"{strict.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert client.with_options(api_key="a-key").models.list().data
    assert httpx2.get(f"{strict.url}/health", trust_env=False).status_code == 200
    assert "a-key" not in strict.log


def test_two_slashes_open_nothing(strict):
    """What asks for a key asks for it under any spelling of its path."""
    for path in (b"/v1/models", b"//v1/models", b"////v1/cache"):
        sent = b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        assert raw_exchange(strict, sent).split()[1] == b"401", path


def test_prompts_and_bodies_have_limits(strict):
    """61 tokens of 60: 400; 4 KiB of JSON: 413; afterwards the next is served."""
    prompt = text(61)
    refused = strict.post(COMPLETIONS, prompt=prompt, max_tokens=1)
    assert refused.status_code == 400
    assert re.search(r"\b6\d\b.*\b60\b", refused.json()["error"]["message"])
    assert strict.post(COMPLETIONS, prompt="x" * 5000).status_code == 413
    chunks = iter([b'{"prompt": "', b"x" * 5000, b'"}'])
    assert strict.client.post(COMPLETIONS, content=chunks).status_code == 413
    assert strict.answer(COMPLETIONS, prompt=text(40), max_tokens=1)


def test_origins_and_hosts_that_may_ask(server, strict):
    """Loopback by default; with the flag those that it names."""
    preflight = {"Access-Control-Request-Method": "POST"}
    for asked, origin, allowed in [
        (server, "http://localhost:3000", True),
        (server, "http://127.0.0.1", True),
        (server, "http://[::1]:8000", True),
        (server, "https://localhost.elsewhere.example", False),
        (server, "null", False),
        (strict, "https://app.example", True),
        (strict, "https://app.example.elsewhere", False),
    ]:
        headers = {"Origin": origin}
        answer = asked.client.options(CHAT, headers={**headers, **preflight})
        assert answer.status_code == (204 if allowed else 403), origin
        given = answer.headers.get("access-control-allow-origin")
        assert (given in (origin, "*")) is allowed, origin
        assert asked.client.get("/v1/models", headers=headers).status_code == (
            200 if allowed else 403
        )
    preflight["Origin"] = "https://app.example"  # and no key: browsers send none with it
    preflight["Access-Control-Request-Headers"] = "authorization,content-type"
    answer = httpx2.options(f"{strict.url}{CHAT}", headers=preflight, trust_env=False)
    assert answer.status_code == 204
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    for host, status in [
        ("localhost", 200),
        (f"127.0.0.1:{server.port}", 200),
        ("[::1]:80", 200),
        ("elsewhere.example", 403),
        ("127.0.0.1.elsewhere.example", 403),
    ]:
        assert server.client.get("/v1/models", headers={"Host": host}).status_code == status, host
