"""The server without its sockets: what a client that does not listen holds, and what models are listed."""

import asyncio
import json
from pathlib import Path

import huggingface_hub
import pytest
from bundled import text
from in_process import CHAT, Client, served
from mlx_hybridcache_server import app as app_module
from mlx_hybridcache_server.app import build_app
from mlx_hybridcache_server.generation import models
from mlx_hybridcache_server.generation.merge import merged
from mlx_hybridcache_server.generation.serving import Serving
from mlx_hybridcache_server.settings import build_parser, read_settings

ENDLESS = {"prompt": "The", "max_tokens": 100_000, "logit_bias": {"700": 100}, "stream": True}


@pytest.fixture
def serving():
    """One request at a time, two seconds each."""
    flags = ["--decode-concurrency", "1", "--request-timeout", "2"]
    settings = read_settings(build_parser("serve"), flags)
    made = Serving(settings, models.load(settings, settings.model))
    yield made
    made.close()


def scope():
    """A request as uvicorn would announce it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
        "root_path": "",
    }


async def call(app, body, *, listens=True):
    """The messages of one reply; a client that does not listen takes three."""
    sent, asked = [], asyncio.Queue()
    asked.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})

    async def send(message):
        sent.append(message)
        if not listens and len(sent) > 3:
            await asyncio.Event().wait()

    await app(scope(), asked.get, send)
    return sent


async def served_beside_a_deaf_one(serving):
    """The status of a request that comes while a stream's client takes nothing; then that client's."""
    app = build_app(serving)
    deaf = asyncio.create_task(call(app, ENDLESS, listens=False))
    while not serving.generations:
        await asyncio.sleep(0.01)
    try:
        statuses = []
        for _ in range(3):
            messages = await call(app, {"prompt": "def", "max_tokens": 2})
            statuses.append(messages[0]["status"])
        assert not serving.admission.is_full
        cache = serving.loaded.cache
        while cache.load.writing or cache.summary.running_bytes:  # the worker's own last turn
            await asyncio.sleep(0.01)
        return statuses
    finally:
        deaf.cancel()
        await asyncio.gather(deaf, return_exceptions=True)


def test_a_client_that_does_not_listen_loses_its_place_when_its_time_is_over(serving):
    """One slot: the request behind it waits for at most two seconds, the next ones for nothing."""
    assert asyncio.run(served_beside_a_deaf_one(serving))[1:] == [200, 200]


def test_a_client_that_takes_nothing_for_a_while_loses_its_reply(serving, monkeypatch):
    """A tenth of a second here, a minute else: the place is free before the time limit frees it."""
    monkeypatch.setattr(app_module, "STALLED_SECONDS", 0.1)
    assert asyncio.run(served_beside_a_deaf_one(serving)) == [200, 200, 200]


async def readers_at_once(serving, prompts):
    """The most prompts that were being read at any moment, and the most that waited."""
    app = build_app(serving)
    calls = [asyncio.create_task(call(app, {"prompt": p, "max_tokens": 2})) for p in prompts]
    reading, waiting = [], []
    while not all(each.done() for each in calls):
        reading.append(sum(one.report is None for one in serving.generations))
        waiting.append(serving.admission.waiting)
        await asyncio.sleep(0.002)
    assert [(await each)[0]["status"] for each in calls] == [200] * len(calls)
    return max(reading), max(waiting)


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_prompts_are_read_at_once_than_were_allowed(most):
    """--prompt-concurrency: of three prompts of 600 tokens the others wait."""
    flags = ["--prompt-concurrency", str(most)]
    settings = read_settings(build_parser("serve"), flags)
    serving = Serving(settings, models.load(settings, settings.model))
    try:
        prompts = [text(600, start=start) for start in (1_000, 9_000, 17_000)]
        assert asyncio.run(readers_at_once(serving, prompts)) == (most, 3 - most)
    finally:
        serving.close()


def hub_cache(folder: Path) -> Path:
    """A hub cache with a sharded model, one in a single file, and one that is none."""
    files = {
        "org/sharded": [
            "config.json",
            "tokenizer_config.json",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
        ],
        "org/single": ["config.json", "tokenizer_config.json", "model.safetensors"],
        "org/other": ["config.json", "weights.bin"],
    }
    for name, names in files.items():
        repository = folder / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        (repository / "blobs").mkdir()
        for each in names:
            blob = repository / "blobs" / each
            blob.write_text("x")
            (snapshot / each).symlink_to(blob)
    return folder


def test_downloaded_models_are_listed_sharded_or_in_one_file(tmp_path, monkeypatch):
    """What has weights, a config and a tokenizer; nothing at all without a hub cache."""
    cache = hub_cache(tmp_path / "hub")
    scan = huggingface_hub.scan_cache_dir
    monkeypatch.setattr(models, "scan_cache_dir", lambda: scan(cache))
    assert models.downloaded() == ["org/sharded", "org/single"]
    monkeypatch.setattr(models, "scan_cache_dir", lambda: scan(tmp_path / "none"))
    assert models.downloaded() == []


def test_an_error_in_one_reply_ends_the_stream_of_all():
    """The other one has more to say, which is not waited for."""

    class Run:
        def __init__(self, *items):
            self._items = items

        async def pieces(self):
            for item in self._items:
                if isinstance(item, Exception):
                    raise item
                yield item

    async def work():
        return [item async for _, item in merged([Run(1, 2), Run(3, ValueError("why"))])]

    with pytest.raises(ValueError, match="why"):
        asyncio.run(work())


def test_the_servers_limit_of_reasoning_holds_whatever_a_request_allows():
    """--max-thinking-tokens 4 beside a budget of 1,000: four, and the marker that ends them."""

    async def work(serving, app):
        body = {"messages": [{"role": "user", "content": "Where is Lena?"}], "max_tokens": 60}
        asked = await Client(app, CHAT, {**body, "thinking_budget": 1000}).answer()
        return asked.reply["usage"]["completion_tokens_details"]["reasoning_tokens"]

    assert 0 < served(work, "--max-thinking-tokens", "4") <= 6
