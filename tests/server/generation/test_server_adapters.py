"""Requests that name an adapter: those of several take turns on one model, and none loses what is cached."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from bundled import text
from mlx.utils import tree_flatten
from mlx_hybridcache_server.generation import models
from mlx_hybridcache_server.generation.serving import Serving
from mlx_hybridcache_server.settings import build_parser, read_settings
from mlx_lm.tuner.utils import linear_to_lora_layers
from serving.served_apps import COMPLETIONS, Client, until, within

from mlx_hybridcache.demo import BUNDLED_MODEL

TEXTS = ("text", "thinking", "content", "reasoning", "reasoning_content")
SETTINGS = {"rank": 2, "scale": 4.0, "dropout": 0.0}
ENDLESS = {"prompt": "The", "max_tokens": 100_000, "logit_bias": {"700": 100}, "stream": True}
BODY = {"prompt": text(300, 900), "max_tokens": 6}


def write_adapter(folder: Path, seed: int) -> str:
    model = mlx_lm.load(str(BUNDLED_MODEL))[0]
    linear_to_lora_layers(model, 2, SETTINGS)
    draw = np.random.default_rng(seed)
    weights = {
        name: mx.array(draw.normal(size=array.shape).astype(np.float32)) * 0.1
        for name, array in tree_flatten(model.parameters())
        if "lora" in name
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": SETTINGS}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str | None]:
    root = tmp_path_factory.mktemp("adapters")
    return [None, *(write_adapter(root / name, seed) for seed, name in enumerate("ab"))]


def made(*flags: str) -> Serving:
    every = ["--allow-model-switching", "--cache-ram", "64", "--request-timeout", "60", *flags]
    settings = read_settings(build_parser("serve"), every)
    return Serving(settings, models.load(settings, settings.model))


@pytest.fixture
def serving() -> Iterator[Serving]:
    served = made()
    yield served
    served.close()


async def ask(serving: Serving, adapter: str | None, **body: Any) -> tuple[str, int]:
    """Its text, and how many tokens of its prompt were restored."""
    named = {} if adapter is None else {"adapters": adapter}
    status, reply = await Client(serving).ask(COMPLETIONS, **{**BODY, **body}, **named)
    assert status == 200, reply
    told = reply["usage"].get("prompt_tokens_details") or {}
    return str(reply["choices"][0]["text"]), int(told.get("cached_tokens", 0))


def written(shaped: Any) -> str:
    """The one text in a reply of any protocol, be it an answer or the beginning of a thought."""
    found: set[str] = set()

    def look(at: Any, key: str = "") -> None:
        if isinstance(at, str) and key in TEXTS:
            found.add(at)
        if isinstance(at, dict):
            for name, value in at.items():
                look(value, name)
        elif isinstance(at, list):
            for value in at:
                look(value, key)

    look(shaped)
    (only,) = found - {""}
    return only


@pytest.fixture(scope="module")
def alone(adapters: list[str | None]) -> dict[str | None, str]:
    """What a server of its own replies, begun with `--adapter-path`."""
    found: dict[str | None, str] = {}
    for adapter in adapters:
        flags = (
            [] if adapter is None else ["--model", str(BUNDLED_MODEL), "--adapter-path", adapter]
        )
        served = made(*flags)
        found[adapter] = asyncio.run(ask(served, None))[0]
        served.close()
    assert len({*found.values()}) == len(adapters)
    return found


def test_adapters_alternate_and_all_stay_hot(
    serving: Serving, adapters: list[str | None], alone: dict[str | None, str]
) -> None:
    """Two and none, three times around: one model, one cache, each prompt read once for each."""

    async def work() -> None:
        cache = serving.loaded.cache
        for turn in range(3):
            for adapter in adapters:
                reply, restored = await ask(serving, adapter)
                assert reply == alone[adapter]
                assert (restored > 290) == (turn > 0)
                assert serving.loaded.cache is cache

    within(work())


def test_what_is_read_ahead_kept_and_dropped_is_an_adapters_own(
    serving: Serving, adapters: list[str | None], alone: dict[str | None, str]
) -> None:
    """Warming it for one adapter read it for the model as it came, and dropping forgot that one's."""
    _, one, other = adapters

    async def act(name: str, adapter: str | None) -> tuple[int, dict[str, Any]]:
        where = ("POST", f"/v1/cache/{name}")
        return await Client(serving).ask(where, prompt=BODY["prompt"], adapters=adapter)

    async def work() -> None:
        for name in ("warm", "pin"):
            status, told = await act(name, one)
            assert (status, told["position"] > 290) == (200, True), told
        assert (await act("drop", other))[0] == 404, "nothing is stored for that one"
        assert (await act("drop", one))[0] == 409, "it is pinned"
        reply, restored = await ask(serving, one)
        assert (reply, restored > 290) == (alone[one], True)
        assert (await ask(serving, None))[1] < 290

    within(work())


def test_messages_and_responses_name_adapters_too(
    serving: Serving, adapters: list[str | None]
) -> None:
    """Each says what a chat with that adapter does, hot the second time; under a name of Anthropic's too."""
    said = [{"role": "user", "content": text(300, 900)}]
    limit = {"max_tokens": 6, "temperature": 0.0}

    async def chat(named: dict[str, str]) -> str:
        status, reply = await Client(serving).ask(
            ("POST", "/v1/chat/completions"), messages=said, **limit, **named
        )
        assert status == 200, reply
        return written(reply["choices"][0]["message"])

    async def message(named: dict[str, str], model: str) -> tuple[str, int]:
        body = {"model": model, "messages": said, **limit, **named}
        status, reply = await Client(serving).ask(("POST", "/v1/messages"), **body)
        assert status == 200, reply
        return written(reply["content"]), reply["usage"]["cache_read_input_tokens"]

    async def response(named: dict[str, str]) -> str:
        body = {"input": said, "max_output_tokens": 6, "temperature": 0.0}
        status, reply = await Client(serving).ask(("POST", "/v1/responses"), **body, **named)
        assert status == 200, reply
        return written(reply["output"])

    async def work() -> None:
        cache = serving.loaded.cache
        for adapter in (*adapters, None, adapters[1]):
            named = {} if adapter is None else {"adapters": adapter}
            expected = await chat(named)
            for model in ("claude-sonnet-4", "default_model"):
                await chat({"adapters": str(adapters[2])})  # which is not to be left in the model
                reply, restored = await message(named, model)
                assert serving.loaded.adapter == adapter
                assert reply == expected
                assert restored > 290
            await chat({"adapters": str(adapters[2])})
            assert await response(named) == expected
            assert serving.loaded.adapter == adapter
        assert serving.loaded.cache is cache

    within(work())


def test_many_at_once_each_get_their_own(
    serving: Serving, adapters: list[str | None], alone: dict[str | None, str]
) -> None:
    """Forty, drawn; some leave before they are answered."""

    async def one(n: int) -> None:
        draw = random.Random(n)
        adapter = draw.choice(adapters)
        if draw.random() < 0.2:
            leaving = asyncio.create_task(ask(serving, adapter))
            await asyncio.sleep(draw.random() / 10)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
        else:
            assert (await ask(serving, adapter))[0] == alone[adapter]

    async def work() -> None:
        cache = serving.loaded.cache
        await asyncio.gather(*(one(n) for n in range(40)))
        assert serving.loaded.cache is cache

    within(work())


def test_another_adapter_waits_for_the_whole_of_a_reply(
    serving: Serving, adapters: list[str | None], alone: dict[str | None, str]
) -> None:
    """A stream is under way: the weights change when its client has left."""

    async def work() -> None:
        streaming = Client(serving)
        stream = asyncio.create_task(streaming.ask(COMPLETIONS, **ENDLESS))
        await until(lambda: len(streaming.sent) > 5)
        answer = asyncio.create_task(ask(serving, adapters[1]))
        seen = len(streaming.sent)
        await until(lambda: len(streaming.sent) > seen + 20)
        assert serving.loaded.adapter is None
        streaming.leave()
        await stream
        assert (await answer)[0] == alone[adapters[1]]

    within(work())


def test_another_adapter_waits_for_what_a_client_has_left_behind(
    serving: Serving, adapters: list[str | None], alone: dict[str | None, str]
) -> None:
    """The lease is given back, and the request ends a moment later."""

    async def work() -> None:
        left = serving.loaded.cache.stream_generate(
            "The", 100_000, sampler=lambda _: mx.array([700])
        )
        next(left)
        answer = asyncio.create_task(ask(serving, adapters[1]))
        await asyncio.sleep(0.1)
        assert not answer.done()
        left.close()
        assert (await answer)[0] == alone[adapters[1]]

    within(work())


@pytest.mark.parametrize("kind", ["nothing", "broken weights", "another model's"])
def test_an_adapter_that_cannot_be_used_costs_nothing(
    serving: Serving, adapters: list[str | None], tmp_path: Path, kind: str
) -> None:
    """Who asked is told; the others' prompts stay."""
    folder = tmp_path / "broken"
    if kind != "nothing":
        write_adapter(folder, 5)
        weights = folder / "adapters.safetensors"
        if kind == "broken weights":
            weights.write_bytes(weights.read_bytes()[:1000])
        else:
            mx.save_safetensors(str(weights), {"model.layers.0.lora_a": mx.zeros((2, 2))})

    async def work() -> None:
        cache = serving.loaded.cache
        await ask(serving, adapters[1])
        status, reply = await Client(serving).ask(COMPLETIONS, **BODY, adapters=str(folder))
        assert (status, reply["error"]["code"]) == (404, "model_not_found")
        assert str(folder) in reply["error"]["message"]
        assert (await ask(serving, adapters[1]))[1] > 290
        assert serving.loaded.cache is cache

    within(work())


def test_a_full_fine_tune_is_a_model_of_its_own(serving: Serving, tmp_path: Path) -> None:
    """It replaces weights, so that the model is loaded with it; and without it for who comes next."""
    folder = Path(write_adapter(tmp_path / "full", 1))
    name, array = min(tree_flatten(serving.loaded.cache.info.model.parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), {name: array * 1.5})
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "full"}')

    async def work() -> None:
        cache = serving.loaded.cache
        plain, _ = await ask(serving, None)
        await ask(serving, str(folder))
        assert serving.loaded.cache is not cache
        assert serving.loaded.is_changed
        assert (await ask(serving, None))[0] == plain
        assert not serving.loaded.is_changed

    within(work())


def test_a_server_with_an_adapter_of_its_own_has_it_for_who_names_none(
    adapters: list[str | None], alone: dict[str | None, str]
) -> None:
    """`--adapter-path` a; b in its place for who asks for it."""
    served = made("--model", str(BUNDLED_MODEL), "--adapter-path", str(adapters[1]))

    async def work() -> None:
        for turn in range(2):
            for named, expected in ((None, adapters[1]), (adapters[2], adapters[2])):
                reply, restored = await ask(served, named)
                assert reply == alone[expected]
                assert (restored > 290) == (turn > 0)

    within(work())
    served.close()


def test_a_model_that_was_let_go_comes_back_with_what_an_adapter_has_in_files(
    adapters: list[str | None], alone: dict[str | None, str], tmp_path: Path
) -> None:
    """Loaded again for a request that names it."""
    served = made("--cache-dir", str(tmp_path / "cache"), "--idle-unload", "0.2")

    async def work() -> None:
        served.slot.watch_idleness()
        await ask(served, adapters[1])
        await until(lambda: served.slot.state == "unloaded")
        reply, restored = await ask(served, adapters[1])
        assert reply == alone[adapters[1]]
        assert restored > 290

    within(work())
    served.close()
