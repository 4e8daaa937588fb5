"""A server without sockets, on an event loop of its own."""

import asyncio
import json
import logging

from mlx_hybridcache_server.app import build_app
from mlx_hybridcache_server.generation import models
from mlx_hybridcache_server.generation.serving import Serving
from mlx_hybridcache_server.log import LIMITED
from mlx_hybridcache_server.main import main
from mlx_hybridcache_server.settings import build_parser, read_settings

COMPLETIONS, CHAT, WARM = "/v1/completions", "/v1/chat/completions", "/v1/cache/warm"
ENDLESS = {"prompt": "The", "max_tokens": 100_000, "logit_bias": {"700": 100}}


def served(work, *flags):
    """What `work(serving, app)` returns, on an event loop of its own, with two minutes for it."""
    settings = read_settings(build_parser("serve"), [*flags])
    serving = Serving(settings, models.load(settings, settings.model))

    async def run():
        async with asyncio.timeout(120):
            return await work(serving, build_app(serving))

    try:
        return asyncio.run(run())
    finally:
        serving.close()


def started(*argv):
    """What `main` returns. Logging, which it sets up for the whole process, is then as it was."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    filters = {name: logging.getLogger(name).filters[:] for name in LIMITED}
    try:
        return main([*argv, "--port", "0"], "serve")
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
        for name, before in filters.items():
            logging.getLogger(name).filters[:] = before


class Client:
    """One request. It leaves when told to."""

    def __init__(self, app, path, body=None, method="POST", headers=()):
        self.sent = []
        self._app, self._method = app, method
        self._path, _, self._query = path.partition("?")
        self._headers = [(b"host", b"localhost"), *headers]
        self._coming = asyncio.Queue()
        if body is not None:
            self.send(body if isinstance(body, bytes) else json.dumps(body).encode())
        self.task = asyncio.create_task(self._ask())

    def send(self, body, *, more=False):
        self._coming.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leave(self):
        self._coming.put_nowait({"type": "http.disconnect"})

    async def _ask(self):
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": self._method,
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": self._query.encode(),
            "headers": self._headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "scheme": "http",
            "root_path": "",
        }
        await self._app(scope, self._coming.get, self._sent)

    async def _sent(self, message):
        self.sent.append(message)

    async def answer(self):
        await self.task
        return self

    @property
    def status(self):
        return self.sent[0]["status"] if self.sent else None

    @property
    def headers(self):
        return dict(self.sent[0]["headers"])

    @property
    def reply(self):
        return json.loads(b"".join(message.get("body", b"") for message in self.sent[1:]))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def busy(serving):
    """What anything that runs or waits would still hold."""
    load, summary = serving.loaded.cache.load, serving.loaded.cache.summary
    return (
        serving.admission.taken
        or serving.admission.waiting
        or serving.runs
        or serving.generations
        or load.reading + load.waiting + load.writing
        or summary.running_bytes
    )
