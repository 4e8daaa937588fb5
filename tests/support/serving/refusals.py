"""Requests that are to be refused, and servers that are to be as well behind them as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from servers import (
    CHAT,
    INSTANT,
    Server,
    user,
)


@contextmanager
def unharmed(server: Server) -> Iterator[Server]:
    """Whatever is sent meanwhile, afterwards the next request is served and the server is healthy."""
    server.newly_logged()
    yield server
    reply = server.answer(CHAT, messages=user("Hello, I am Zoe."), **INSTANT)
    assert reply["choices"][0]["message"]["content"] == "Hello Zoe, how can I help?"
    assert server.healthy
    assert "Traceback" not in (log := server.newly_logged()), log


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
