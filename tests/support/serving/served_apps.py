"""Asks a server in this process, without its sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

from mlx_hybridcache_server.app import build_app
from mlx_hybridcache_server.generation.serving import Serving

COMPLETIONS = ("POST", "/v1/completions")
PATIENCE_SECONDS = 60


def within(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, PATIENCE_SECONDS))


class Client:
    """One connection, which goes away when it is told to."""

    def __init__(self, serving: Serving):
        self._app = build_app(serving)
        self.sent: list[dict[str, Any]] = []
        self._asked: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def ask(self, where: tuple[str, str], **body: Any) -> tuple[int, dict[str, Any]]:
        method, path = where
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "scheme": "http",
            "root_path": "",
        }
        self._asked.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
        await self._app(scope, self._asked.get, self._send)
        text = b"".join(message.get("body", b"") for message in self.sent[1:])
        is_stream = text.startswith((b"data:", b":"))
        return self.sent[0]["status"], {} if is_stream else json.loads(text)

    def leave(self) -> None:
        self._asked.put_nowait({"type": "http.disconnect"})

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        await asyncio.sleep(0)


async def until(holds: Any) -> None:
    while not holds():
        await asyncio.sleep(0.005)
