"""Which model a request gets, and keeps: those who hold one, those who wait, and what cannot be loaded."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from bundled import text
from mlx_hybridcache_server.generation import models
from mlx_hybridcache_server.generation.serving import Serving
from mlx_hybridcache_server.loading.leases import Leases
from mlx_hybridcache_server.settings import build_parser, read_settings
from serving.served_apps import COMPLETIONS, Client, until, within

from mlx_hybridcache.demo import BUNDLED_MODEL

ENDLESS = {"prompt": "The", "max_tokens": 100_000, "logit_bias": {"700": 100}, "stream": True}
WARM, CACHE, CLEAR = (
    ("POST", "/v1/cache/warm"),
    ("GET", "/v1/cache"),
    ("DELETE", "/v1/cache"),
)


# The queue alone


class Stage:
    """Something of which one is there, and that is switched as it is told to."""

    def __init__(self) -> None:
        self.there = "a"
        self.switches: list[str] = []
        self.missing: set[str] = set()
        self.used: list[str] = []
        self.leases: Leases[str] = Leases(lambda wanted: wanted == self.there, self._switch)
        self.users: dict[str, int] = {}

    async def _switch(self, wanted: str) -> None:
        assert not any(self.users.values()), "it is switched under those who use it"
        await asyncio.sleep(0)
        self.switches.append(wanted)
        if wanted in self.missing:
            raise LookupError(wanted)
        self.there = wanted

    async def use(self, wanted: str, turns: int = 3) -> None:
        with ExitStack() as held:
            await self.leases.take(wanted, held)
            self.used.append(wanted)
            self.users[wanted] = self.users.get(wanted, 0) + 1
            held.callback(self._leave, wanted)
            for _ in range(turns):
                await asyncio.sleep(0)
                assert self.there == wanted, "what one held was taken away"

    def _leave(self, wanted: str) -> None:
        self.users[wanted] -= 1


def test_a_stream_of_those_who_want_what_is_there_keeps_nothing_away() -> None:
    """A hundred want a, one new each turn; the b that comes behind ten of them is the eleventh."""

    async def work() -> None:
        stage, tasks = Stage(), []
        for n in range(100):
            if n == 10:
                tasks.append(asyncio.create_task(stage.use("b")))
            tasks.append(asyncio.create_task(stage.use("a")))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert stage.used.index("b") == 10
        assert stage.switches == ["b", "a"]

    within(work())


def test_two_that_take_turns_are_not_switched_for_each_request() -> None:
    """Fifty a's and fifty b's, alternating, all at once: one a, every b, and the other a's."""

    async def work() -> None:
        stage = Stage()
        await asyncio.gather(*(stage.use("ab"[n % 2]) for n in range(100)))
        assert stage.switches == ["b", "a"]
        assert len(stage.used) == 100

    within(work())


def test_what_cannot_be_had_is_told_to_those_who_want_it_only() -> None:
    """Two want what is missing, and hear so; it was tried once, and the others go on."""

    async def work() -> None:
        stage = Stage()
        stage.missing.add("x")
        wanted = ["a", "x", "b", "x", "a"]
        ended = await asyncio.gather(*map(stage.use, wanted), return_exceptions=True)
        assert [isinstance(one, LookupError) for one in ended] == [False, True, False, True, False]
        assert stage.switches.count("x") == 1

    within(work())


@pytest.mark.parametrize("seed", range(100))
def test_nothing_is_held_by_those_who_stopped_waiting(seed: int) -> None:
    """Forty of four kinds come, one of them missing; a third is cancelled at some moment; the rest is served."""

    async def work() -> None:
        draw, stage = random.Random(seed), Stage()
        stage.missing.add("x")
        tasks, cancelled = [], set()
        for _ in range(40):
            wanted = draw.choice("aabbcx")
            tasks.append((wanted, asyncio.create_task(stage.use(wanted, draw.randrange(4)))))
            for _ in range(draw.randrange(3)):
                await asyncio.sleep(0)
            if draw.random() < 0.4:
                _, task = draw.choice(tasks)
                if task.cancel():
                    cancelled.add(task)
        for wanted, task in tasks:
            try:
                await task
            except LookupError:
                assert wanted == "x"
            except asyncio.CancelledError:
                assert task in cancelled
        await stage.use("b")
        await stage.use("c")
        assert stage.there == "c"

    within(work())


def test_who_stops_waiting_lets_those_behind_go_on() -> None:
    """One has a; the b that waits for it leaves, and the a behind that b has it too, beside the first."""

    async def work() -> None:
        stage = Stage()
        with ExitStack() as held:
            await stage.leases.take("a", held)
            leaves = asyncio.create_task(stage.use("b"))
            await asyncio.sleep(0)
            behind = asyncio.create_task(stage.use("a"))
            await asyncio.sleep(0)
            assert stage.used == []
            leaves.cancel()
            await behind
        assert stage.used == ["a"]

    within(work())


def test_who_waits_is_refused_when_the_server_stops() -> None:
    """One holds a, two wait for b: both hear it, and the one that holds it goes on."""

    async def work() -> None:
        stage = Stage()
        waiting = [asyncio.create_task(stage.use(name, 50)) for name in "abb"]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        stage.leases.refuse(RuntimeError("stopping"))
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(one) for one in ended] == [type(None), RuntimeError, RuntimeError]

    within(work())


# The server, without its sockets


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(BUNDLED_MODEL, folder)
    return str(folder)


@pytest.fixture
def serving() -> Iterator[Serving]:
    flags = ["--allow-model-switching", "--cache-ram", "64", "--request-timeout", "30"]
    settings = read_settings(build_parser("serve"), flags)
    made = Serving(settings, models.load(settings, settings.model))
    yield made
    made.close()


def said(reply: dict[str, Any]) -> str:
    return str(reply["choices"][0]["text"])


def test_requests_for_two_models_at_once_are_all_answered(serving: Serving, other: str) -> None:
    """Forty of many kinds, drawn: each gets 200, its own model, and the whole of the reply it gets alone."""

    async def one(n: int, whole: str) -> None:
        draw = random.Random(n)
        names = {} if draw.random() < 0.5 else {"model": other}
        where = draw.choice([COMPLETIONS, COMPLETIONS, COMPLETIONS, WARM, CACHE, CLEAR])
        body = {"prompt": "The old house", **names} if where in (COMPLETIONS, WARM) else {}
        more = {"max_tokens": 6} if where == COMPLETIONS else {}
        status, reply = await Client(serving).ask(where, **body, **more)
        assert status == 200, (where, reply)
        if where == COMPLETIONS:
            assert said(reply) == whole
            assert reply["model"] == names.get("model", reply["model"])

    async def work() -> None:
        alone = await Client(serving).ask(COMPLETIONS, prompt="The old house", max_tokens=6)
        await asyncio.gather(*(one(n, said(alone[1])) for n in range(40)))

    within(work())


def test_a_switch_waits_for_the_whole_of_a_reply(serving: Serving, other: str) -> None:
    """A stream is under way when another model is asked for: nothing is loaded until its client leaves."""

    async def work() -> None:
        first = serving.loaded
        streaming, asking = Client(serving), Client(serving)
        stream = asyncio.create_task(streaming.ask(COMPLETIONS, **ENDLESS))
        await until(lambda: len(streaming.sent) > 5)
        answer = asyncio.create_task(
            asking.ask(COMPLETIONS, prompt="The", max_tokens=2, model=other)
        )
        behind = asyncio.create_task(Client(serving).ask(COMPLETIONS, prompt="The", max_tokens=2))
        seen = len(streaming.sent)
        await until(lambda: len(streaming.sent) > seen + 20)
        assert serving.loaded is first
        assert first.cache.is_alive
        assert not behind.done(), "it waits in order"
        streaming.leave()
        await stream
        status, reply = await answer
        assert (status, reply["model"]) == (200, other)
        assert (await behind)[0] == 200

    within(work())


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_stops_waiting_for_its_model(
    serving: Serving, other: str, streams: bool
) -> None:
    """It waited behind a stream; the next request for the model that is there is answered beside that."""

    async def work() -> None:
        streaming, leaving = Client(serving), Client(serving)
        stream = asyncio.create_task(streaming.ask(COMPLETIONS, **ENDLESS))
        await until(lambda: len(streaming.sent) > 5)
        gone = asyncio.create_task(
            leaving.ask(COMPLETIONS, prompt="The", max_tokens=2, model=other, stream=streams)
        )
        await until(lambda: serving.slot._leases._waiting)
        leaving.leave()
        assert (await gone)[0] == 499
        assert not serving.slot._leases._waiting
        status, reply = await Client(serving).ask(COMPLETIONS, prompt="The", max_tokens=2)
        assert status == 200
        assert reply["model"] != other
        streaming.leave()
        await stream

    within(work())


def test_waiting_for_a_model_is_part_of_the_requests_time(other: str) -> None:
    """--request-timeout 1, a stream in front: 504, and the place is free."""
    flags = ["--allow-model-switching", "--request-timeout", "1", "--cache-ram", "64"]
    settings = read_settings(build_parser("serve"), flags)
    serving = Serving(settings, models.load(settings, settings.model))

    async def work() -> None:
        with ExitStack() as held:
            await serving.slot.any_model(held)
            body = {"prompt": "The", "max_tokens": 2, "model": other}
            status, reply = await Client(serving).ask(COMPLETIONS, **body)
            assert (status, reply["error"]["code"]) == (504, "timeout")
        assert serving.admission.taken == 0
        assert not serving.slot._leases._waiting

    try:
        within(work())
    finally:
        serving.close()


@pytest.mark.parametrize("kind", ["nothing", "no weights", "no config", "broken weights"])
def test_what_cannot_be_loaded_leaves_the_old_model_with_its_cache(
    serving: Serving, other: str, tmp_path: Path, kind: str
) -> None:
    """Two ask for it and hear why; a prompt that was read before is restored afterwards."""
    folder = tmp_path / "broken"
    if kind != "nothing":
        shutil.copytree(other, folder)
        weights = next(folder.glob("*.safetensors"))
        if kind == "no weights":
            weights.unlink()
        elif kind == "no config":
            (folder / "config.json").write_text("{}")
        else:
            weights.write_bytes(weights.read_bytes()[:1000])

    async def work() -> None:
        first, body = serving.loaded, {"prompt": text(300, 900), "max_tokens": 2}
        whole = await Client(serving).ask(COMPLETIONS, **body)
        asked = [
            Client(serving).ask(COMPLETIONS, **body, model=name)
            for name in (str(folder), str(folder))
        ]
        for status, reply in await asyncio.gather(*asked):
            assert (status, reply["error"]["code"]) == (404, "model_not_found")
            assert str(folder) in reply["error"]["message"]
        assert serving.loaded is first
        status, again = await Client(serving).ask(COMPLETIONS, **body)
        assert status == 200
        assert said(again) == said(whole[1])
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0

    within(work())


def test_a_model_that_fails_when_the_old_one_has_gone_brings_that_back(
    serving: Serving, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cache cannot be made. Once the old one cannot be either: an error each time, and 503 for /health."""

    async def work() -> None:
        real, broken = models.HybridPromptCache, [other]

        def made(model: Any, tokenizer: Any, **more: Any) -> Any:
            if broken:
                raise models.SettingError("it has no room")
            return real(model, tokenizer, **more)

        def breaks_once(model: Any, tokenizer: Any, **more: Any) -> Any:
            monkeypatch.setattr(models, "HybridPromptCache", real)
            raise models.SettingError("it has no room")

        first = serving.loaded
        monkeypatch.setattr(models, "HybridPromptCache", breaks_once)
        body = {"prompt": "The", "max_tokens": 2}
        status, reply = await Client(serving).ask(COMPLETIONS, **body, model=other)
        assert (status, reply["error"]["message"]) == (400, "it has no room")
        assert serving.loaded is not first
        status, reply = await Client(serving).ask(COMPLETIONS, **body)
        assert (status, reply["model"]) == (200, first.id)

        monkeypatch.setattr(models, "HybridPromptCache", made)
        for name in (other, first.id, None):
            status, reply = await Client(serving).ask(COMPLETIONS, **body, model=name)
            assert (status, reply["error"]["message"]) == (400, "it has no room")
        assert (await Client(serving).ask(("GET", "/health")))[0] == 503
        assert (await Client(serving).ask(CACHE))[0] == 200
        broken.clear()
        assert (await Client(serving).ask(COMPLETIONS, **body))[0] == 200
        assert (await Client(serving).ask(("GET", "/health")))[0] == 200

    within(work())


def test_a_server_that_stops_while_a_model_is_loaded_ends_it_too(
    serving: Serving, other: str
) -> None:
    """Who waits for it hears 503; no worker thread of either model is left."""

    async def work() -> None:
        asking = asyncio.create_task(
            Client(serving).ask(COMPLETIONS, prompt="The", max_tokens=2, model=other)
        )
        await until(lambda: serving.slot._leases.is_switching)
        assert (await Client(serving).ask(("GET", "/health")))[0] == 200
        serving.stop()
        status, reply = await asking
        assert (status, reply["error"]["code"]) == (503, "shutting_down")

    within(work())
    serving.close()
    assert not serving.loaded.cache.is_alive
    assert serving.slot._loading is not None
    loaded = serving.slot._loading
    assert loaded.exception() is not None or not loaded.result().cache.is_alive
