"""`bench page`: what the live page costs the server, the model's thread and the browser.

A server in this process, whose event loop has a thread of its own, holds many small conversations. While
a browser watches with one list of them unfolded, every second one conversation goes on. What the
loop's thread spent is compared with the same changes unwatched.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx2
import numpy as np
import uvicorn
from mlx_hybridcache_server.app import build_app
from mlx_hybridcache_server.generation.models import load
from mlx_hybridcache_server.generation.serving import Serving
from mlx_hybridcache_server.schema.requests import WatchBody
from mlx_hybridcache_server.settings import Settings, build_parser, read_settings
from mlx_hybridcache_server.watching.watch import Watcher
from rich.console import Console

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.store.budget import StoreStats
from mlx_hybridcache.tokens import Namespace

from .kit.chromium import launched, missing
from .kit.machine import machine, one_line
from .kit.tables import Figure, show_figures, write_json

CONVERSATIONS, UPDATES = 1_000, 30
TRUNK = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
"""Tokens that all conversations begin with, so that the tree has one row with as many below it."""

TOKENS = 40
BOUNDARIES = (12, 20, 28)
UNFOLDED = 30
"""Rows that the page shows of a list before it is asked for more."""

SERVER_MS, SCRIPT_MS = 2.0, 100.0


@dataclass(slots=True)
class Costs:
    """Per update, in milliseconds; of the worker per summary."""

    watched_ms: float
    unwatched_ms: float
    made_ms: list[float]
    told_runs: list[int]
    events: int
    asked_of_worker: int
    outlines_ms: float
    stats_ms: float
    script_ms: list[float] = field(default_factory=list)
    browser_script_ms: float | None = None
    browser_layout_ms: float | None = None

    @property
    def server_ms(self) -> float:
        """What watching adds on the event loop's thread: the update made, written and sent."""
        return self.watched_ms - self.unwatched_ms

    def figures(self) -> list[Figure]:
        """Beside what is promised."""
        found = [
            Figure("server's CPU for an update", self.server_ms, "ms", SERVER_MS, False),
            Figure("of that, making it, median", _median(self.made_ms), "ms", SERVER_MS, False),
            Figure("calls to the worker by a page", self.asked_of_worker, "", 0, True),
            Figure("runs told in an update, most", max(self.told_runs), "", 3, True),
        ]
        if self.script_ms:
            found.append(
                Figure(
                    "scripting for an update, longest", max(self.script_ms), "ms", SCRIPT_MS, False
                )
            )
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench page`."""
    parser.add_argument("--model", help="directory, or owner/name (default: the bundled model)")
    parser.add_argument(
        "--conversations", type=int, default=CONVERSATIONS, help="in the store (%(default)s)"
    )
    parser.add_argument("--updates", type=int, default=UPDATES, help="watched (%(default)s)")
    parser.add_argument("--no-browser", action="store_true", help="measure the server alone")


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, print, write. 1 when a counted figure misses its target; timings never fail it."""
    found = machine()
    console.print(one_line(found), highlight=False)
    why = "--no-browser" if args.no_browser else missing()
    if why:
        console.print(f"Without a browser: {why}.", highlight=False)
    settings = read_settings(build_parser("bench page"), ["--model", args.model])
    with console.status("reading conversations") as status, _served(settings) as (serving, server):
        cache = serving.loaded.cache
        draw = random.Random(1)
        prompts = [_prompt(draw, cache) for _ in range(args.conversations)]
        for number, prompt in enumerate(prompts):
            cache.prefill(prompt, max_tokens=1, boundaries=BOUNDARIES).release()
            status.update(f"reading conversation {number + 1}")
        status.update("watching")
        changes = _Changes(cache, prompts, draw)
        costs = _measure(serving, server, changes, args.updates, browses=not why)
        held = cache.stats()
    _tell(console, held, costs)
    figures = costs.figures()
    show_figures(console, figures)
    write_json(
        args.json,
        {
            "command": "page",
            "machine": found,
            "conversations": held.conversations,
            "nodes": held.nodes,
            "updates": args.updates,
            "costs": asdict(costs),
            "figures": [figure.as_json() for figure in figures],
        },
    )
    return int(any(figure.counted and not figure.kept for figure in figures))


def _tell(console: Console, held: StoreStats, costs: Costs) -> None:
    console.print(
        f"{held.conversations:,} conversations in {held.nodes:,} nodes, {held.checkpoints:,} checkpoints. "
        f"An event loop that is not watched spends {costs.unwatched_ms:.2f} ms in the same time, one "
        f"that is {costs.watched_ms:.2f}. With each summary the worker spends {costs.outlines_ms:.3f} ms on "
        f"outlines, watched or not, beside {costs.stats_ms:.2f} ms on its figures.",
        highlight=False,
    )
    if costs.browser_script_ms is not None:
        console.print(
            f"The browser's own account: {costs.browser_script_ms:.1f} ms of scripting and "
            f"{costs.browser_layout_ms:.1f} ms of layout for an update; the page's: median "
            f"{_median(costs.script_ms):.1f} ms.",
            highlight=False,
        )


def _prompt(draw: random.Random, cache: HybridPromptCache) -> list[int]:
    most = cache.info.vocabulary - 1
    return [*TRUNK, *(draw.randrange(most) for _ in range(TOKENS - len(TRUNK)))]


class _Loop(uvicorn.Server):
    """A server on a thread of its own, which tells what that thread has spent."""

    loop: asyncio.AbstractEventLoop
    url: str

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def spent_ms(self) -> float:
        """CPU of the loop's thread so far."""

        async def spent() -> float:
            return time.thread_time()

        return 1e3 * asyncio.run_coroutine_threadsafe(spent(), self.loop).result()


@contextmanager
def _served(settings: Settings) -> Iterator[tuple[Serving, _Loop]]:
    serving = Serving(settings, load(settings, settings.model))
    config = uvicorn.Config(build_app(serving), log_config=None, access_log=False, lifespan="off")
    server, bound = _Loop(config), socket.socket()
    bound.bind(("127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield serving, server
    finally:
        serving.stop()
        server.should_exit = True
        thread.join()
        serving.close()


class _Changes:
    """Conversations that go on, one every second."""

    def __init__(self, cache: HybridPromptCache, prompts: list[list[int]], draw: random.Random):
        self._cache, self._prompts, self._draw = cache, prompts, draw

    def one(self) -> list[int]:
        """Some conversation reads a few tokens more."""
        prompt = self._draw.choice(self._prompts)
        prompt += [self._draw.randrange(self._cache.info.vocabulary) for _ in range(8)]
        self._cache.prefill(prompt, max_tokens=1).release()
        return prompt

    def every_second(self, count: int, sleep: Callable[[float], object] = time.sleep) -> None:
        """So many, a second apart."""
        for _ in range(count):
            began = time.monotonic()
            self.one()
            sleep(max(0.0, began + 1.0 - time.monotonic()))


def _measure(
    serving: Serving, server: _Loop, changes: _Changes, updates: int, *, browses: bool
) -> Costs:
    cache = serving.loaded.cache
    trunk = Watcher(serving, WatchBody()).update()["tree"]["runs"][0]["key"]
    body = WatchBody(open={trunk: UNFOLDED})
    made_ms, told = _made(serving, changes, body, updates)
    outlines_ms, stats_ms = _published(cache, changes, updates)
    before = server.spent_ms()
    changes.every_second(updates)
    unwatched_ms = (server.spent_ms() - before) / updates
    costs = Costs(0.0, unwatched_ms, made_ms, told, 0, 0, outlines_ms, stats_ms)
    with _noting_calls(cache) as others:
        if browses:
            _browse(server, changes, updates, costs)
        else:
            _stream(server, changes, updates, costs, body)
    costs.asked_of_worker = len(others)
    return costs


def _made(
    serving: Serving, changes: _Changes, body: WatchBody, count: int
) -> tuple[list[float], list[int]]:
    """What making an update takes, and how many runs it tells of."""
    watcher, spent, told = Watcher(serving, body), [], []
    watcher.update()
    for _ in range(count):
        changes.one()
        began = time.thread_time()
        update = watcher.update()
        json.dumps(update)
        spent.append(1e3 * (time.thread_time() - began))
        told.append(len(update["tree"]["runs"]))
    return spent, told


def _published(cache: HybridPromptCache, changes: _Changes, count: int) -> tuple[float, float]:
    """What outlines and figures take of the worker's time behind one request, medians."""
    memory, spent = cache.engine.tiers.memory, []

    def publish(prompt: list[int]) -> None:
        tokens = np.array(prompt, dtype=np.int32)
        memory.find(Namespace(cache.info.settings), tokens).nodes()[-1].use(memory.clock)
        began = time.thread_time()
        memory.outlines(None)
        then = time.thread_time()
        memory.stats()
        spent.append((1e3 * (then - began), 1e3 * (time.thread_time() - then)))

    for _ in range(count):
        cache.worker.call(publish, changes.one())
    return _median([a for a, _ in spent]), _median([b for _, b in spent])


@contextmanager
def _noting_calls(cache: HybridPromptCache) -> Iterator[list[str]]:
    """What any thread but this one asks of the worker."""
    worker: Any = cache.worker
    here, noted = threading.get_ident(), []
    kept = {name: getattr(worker, name) for name in ("call", "post", "stream")}

    def noting(name: str) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != here:
                noted.append(name)
            return kept[name](*args, **kwargs)

        return ask

    for name in kept:
        setattr(worker, name, noting(name))
    try:
        yield noted
    finally:
        for name in kept:
            delattr(worker, name)


def _stream(server: _Loop, changes: _Changes, updates: int, costs: Costs, body: WatchBody) -> None:
    """A client that takes the events and does nothing with them."""
    events: list[str] = []
    is_over = threading.Event()

    def listen() -> None:
        with (
            httpx2.Client(timeout=60, trust_env=False) as client,
            client.stream("POST", f"{server.url}/v1/cache/watch", json=body.model_dump()) as reply,
        ):
            for line in reply.iter_lines():
                events.append(line)
                if is_over.is_set():
                    return

    listening = threading.Thread(target=listen, daemon=True)
    listening.start()
    time.sleep(2)
    before, had = server.spent_ms(), len(events)
    changes.every_second(updates)
    costs.watched_ms = (server.spent_ms() - before) / updates
    costs.events = sum(line.startswith("data:") for line in events[had:])
    is_over.set()
    changes.one()  # which it hears of, and leaves
    listening.join()


def _browse(server: _Loop, changes: _Changes, updates: int, costs: Costs) -> None:
    """The page itself, with the list of all conversations unfolded."""
    with launched() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(server.url)
        page.locator("#tree ul ul li").nth(UNFOLDED - 1).wait_for()
        page.wait_for_timeout(2000)
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable")

        def account() -> dict[str, float]:
            found = session.send("Performance.getMetrics")["metrics"]
            return {each["name"]: each["value"] for each in found}

        page.evaluate("performance.clearMeasures()")
        was, before = account(), server.spent_ms()
        changes.every_second(updates, lambda seconds: page.wait_for_timeout(1e3 * seconds))
        costs.watched_ms = (server.spent_ms() - before) / updates
        now = account()
        costs.script_ms = page.evaluate(
            "performance.getEntriesByName('update').map((each) => each.duration)"
        )
        costs.events = len(costs.script_ms)
        per_event = 1e3 / max(1, costs.events)
        costs.browser_script_ms = per_event * (now["ScriptDuration"] - was["ScriptDuration"])
        costs.browser_layout_ms = per_event * (now["LayoutDuration"] - was["LayoutDuration"])


def _median(values: list[float]) -> float:
    return statistics.median(values)
