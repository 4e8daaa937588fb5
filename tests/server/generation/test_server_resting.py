"""A model that nobody asks for is let go of, and comes back with what was cached."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from bundled import text
from mlx_hybridcache_server.generation import models
from mlx_hybridcache_server.generation.serving import Serving
from mlx_hybridcache_server.loading.idle import seconds_of
from mlx_hybridcache_server.settings import build_parser, read_settings
from serving.served_apps import COMPLETIONS, Client, until, within

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.errors import SettingError
from mlx_hybridcache.models import parameter_bytes

LONG = text(300, 900)
ALIVE = ("GET", "/health")
MODELS = ("GET", "/v1/models")
PROPS = ("GET", "/props")


def made(*flags: str) -> Serving:
    settings = read_settings(build_parser("serve"), ["--cache-ram", "64", *flags])
    return Serving(settings, models.load(settings, settings.model))


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    """A server whose model stays for an hour, unless a request says otherwise."""
    found = made("--cache-dir", str(tmp_path), "--idle-unload", "3600")
    yield found
    found.close()


async def asked(serving: Serving, **more: Any) -> dict[str, Any]:
    body = {"prompt": LONG, "max_tokens": 2, **more}
    status, reply = await Client(serving).ask(COMPLETIONS, **body)
    assert status == 200, reply
    return reply


def cached(reply: dict[str, Any]) -> int:
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])


async def state(serving: Serving) -> list[Any]:
    """What is told of the model: by /health, /v1/models and /props."""
    told = [(await Client(serving).ask(where))[1] for where in (ALIVE, MODELS, PROPS)]
    return [told[0].get("model"), told[1]["data"][0]["state"], told[2]["is_sleeping"]]


def test_a_model_that_was_let_go_of_comes_back_and_restores(serving: Serving) -> None:
    """keep_alive 0: its weights and all arrays are freed. The next request restores what a hot one would."""

    async def work() -> None:
        cold = await asked(serving)
        hot = await asked(serving, keep_alive=-1)
        assert await state(serving) == [None, "loaded", False]
        weights = parameter_bytes(serving.loaded.cache.info.model)
        model = weakref.ref(serving.loaded.cache.info.model)
        before = mx.get_active_memory()
        assert cached(await asked(serving, keep_alive=0)) == cached(hot) > 0
        await until(lambda: serving.slot.state == "unloaded")
        gc.collect()
        assert model() is None
        assert mx.get_active_memory() <= before - weights
        assert serving.loaded.cache.summary.held_bytes == 0
        assert await state(serving) == ["unloaded", "unloaded", True]
        status, figures = await Client(serving).ask(("GET", "/v1/cache"))
        assert (status, figures["tokens"]) == (200, 0)
        assert figures["disk"]["checkpoints"] > 0
        again = await asked(serving)
        assert cached(again) == cached(hot)
        assert [r["choices"][0]["text"] for r in (hot, again)] == [cold["choices"][0]["text"]] * 2
        assert await state(serving) == [None, "loaded", False]
        model = weakref.ref(serving.loaded.cache.info.model)
        await asked(serving, keep_alive=0)
        await until(lambda: serving.slot.state == "unloaded")
        gc.collect()
        assert model() is None, "one that was loaded again is let go of as well"

    within(work())


def test_requests_that_come_meanwhile_wait_and_are_answered(serving: Serving) -> None:
    """Eight, some while it goes and some when it is gone: it is loaded again, and each restores."""

    async def work() -> None:
        hot = (await asked(serving), await asked(serving, keep_alive=0))[1]
        while serving.slot.state == "loaded":
            await asyncio.sleep(0)
        early = [asyncio.create_task(asked(serving)) for _ in range(4)]
        await until(lambda: serving.slot.state != "changing" or any(t.done() for t in early))
        late = [asyncio.create_task(asked(serving)) for _ in range(4)]
        for reply in await asyncio.gather(*early, *late):
            assert cached(reply) == cached(hot)
        assert serving.slot.state == "loaded"

    within(work())


def test_nothing_is_let_go_of_while_a_reply_is_written(serving: Serving) -> None:
    """A stream goes on while another request says 0; then the model goes."""

    async def work() -> None:
        streaming = Client(serving)
        endless = {"prompt": "The", "max_tokens": 100_000, "logit_bias": {"700": 100}}
        stream = asyncio.create_task(streaming.ask(COMPLETIONS, **endless, stream=True))
        await until(lambda: len(streaming.sent) > 5)
        await asked(serving, keep_alive=0)
        seen = len(streaming.sent)
        await until(lambda: len(streaming.sent) > seen + 20)
        assert serving.slot.state == "loaded"
        streaming.leave()
        await stream
        await until(lambda: serving.slot.state == "unloaded")

    within(work())


def test_who_came_while_the_cache_was_written_keeps_the_model(serving: Serving) -> None:
    """The time was over, its files are being written, and a request comes: nothing is let go under it."""

    async def work() -> None:
        await asked(serving)
        serving.slot._idle._over()
        with ExitStack() as held:
            loaded = await serving.slot.any_model(held)
            assert serving.slot._resting is not None
            await serving.slot._resting
            assert serving.slot.state == "loaded"
            assert loaded.cache.is_alive

    within(work())


@pytest.mark.parametrize(("keep_alive", "state"), [(-1, "loaded"), (0, "unloaded")])
def test_who_came_and_went_while_the_cache_was_written_says_what_is_done(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, keep_alive: int, state: str
) -> None:
    """The time was over for the request before: for the one that came meanwhile it has yet to begin."""
    written = threading.Event()
    monkeypatch.setattr(HybridPromptCache, "flush", lambda *_: written.wait(60))

    async def work() -> None:
        await asked(serving, keep_alive=0)
        await until(lambda: serving.slot._resting is not None)
        await asked(serving, keep_alive=keep_alive)
        await until(lambda: serving.slot._idle.is_over == (keep_alive == 0))
        written.set()
        resting = serving.slot._resting
        assert resting is not None
        await resting
        await until(lambda: serving.slot.state != "changing")
        assert serving.slot.state == state

    within(work())


def test_a_start_without_requests_counts_too(tmp_path: Path) -> None:
    """--idle-unload 0: gone at once, and after each request again."""
    serving = made("--cache-dir", str(tmp_path), "--idle-unload", "0")

    async def work() -> None:
        serving.slot.watch_idleness()
        for _ in range(2):
            await until(lambda: serving.slot.state == "unloaded")
            await asked(serving)

    try:
        within(work())
    finally:
        serving.close()


def test_a_client_decides_only_where_the_server_lets_it(tmp_path: Path) -> None:
    """Without the flag keep_alive changes nothing; with it, what is no time is named and not followed."""
    serving = made("--cache-dir", str(tmp_path / "a"))
    other = made("--cache-dir", str(tmp_path / "b"), "--idle-unload", "3600")

    async def work() -> None:
        await asked(serving, keep_alive=0)
        assert serving.slot._idle._timer is None
        client = Client(other)
        await client.ask(COMPLETIONS, prompt="The", max_tokens=1, keep_alive="soon")
        headers = dict(client.sent[0]["headers"])
        assert b"keep_alive" in headers[b"x-mlx-hybridcache-warning"]
        assert other.slot._idle.seconds == 3600
        said = {"messages": [{"role": "user", "content": "The"}], "max_tokens": 1}
        await Client(other).ask(("POST", "/v1/messages"), **said, keep_alive="7m")
        assert other.slot._idle.seconds == 420
        await Client(other).ask(
            ("POST", "/v1/responses"), input="The", max_output_tokens=1, keep_alive=9
        )
        assert other.slot._idle.seconds == 9

    try:
        within(work())
    finally:
        serving.close()
        other.close()


def test_without_a_cache_directory_the_flag_is_refused() -> None:
    """All that is cached would be lost with the model."""
    with pytest.raises(SettingError, match="--cache-dir"):
        read_settings(build_parser("serve"), ["--idle-unload", "60"])


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        *((300, 300), (0, 0), ("5m", 300), ("1h30m", 5400), ("1.5s", 1.5), ("250ms", 0.25)),
        *(("30", 30), (-1, None), ("-1m", None), ("-1", None), (1e300, None), (0.5, 0.5)),
        *(("nan", None), ("inf", None), (10**400, None), (-(10**400), None)),
    ],
)
def test_times_are_written_as_for_ollama(said: Any, seconds: float | None) -> None:
    """Seconds, or with units; anything negative, or beyond any life, is for ever."""
    assert seconds_of(said) == seconds


@pytest.mark.parametrize("said", ["soon", "5 m", "", True, [], {}, "m", "5d", "1m" * 33, "9" * 65])
def test_what_is_no_time_is_none(said: Any) -> None:
    """It is not guessed at."""
    with pytest.raises(ValueError, match=r"time|float"):
        seconds_of(said)
