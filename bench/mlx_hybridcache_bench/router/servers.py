"""A model with and without its patch behind the real server: the same replies, and how many tokens a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlx_hybridcache.router.trial.arms import CANONICALIZED, ORIGINAL

from ..serving.client import CHAT, COMPLETIONS, Reply
from ..serving.scenarios import Material, Step
from ..serving.servers import COMMANDS, OURS, Launch, ServerProcess
from ..serving.side import SETTLE_SECONDS, fresh_nonce
from ..serving.target import Target

SHARED, UNIQUE = "shared prefix", "unique prefix"
WITHOUT, WITH = "without cache", "with cache"
CLIENTS = 4
QUESTION_TOKENS = 40

Said = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """What servers are asked: requests of a run, tokens of a prompt and of a reply, runs, and texts."""

    requests: int
    prompt: int
    reply: int
    repeats: int
    texts: int
    text: int


@dataclass(frozen=True, slots=True)
class Rate:
    """One run: requests that share their prefix or not, with or without the cache."""

    server: str
    prefix: str
    cache: str
    run: int
    seconds: float
    generated_per_second: float
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Determined:
    """Of how many texts a server gave the same reply: cold twice, and hot as cold."""

    server: str
    texts: int
    cold: int
    hot: int
    cached_tokens: int


@dataclass(frozen=True)
class Served:
    """Both tables."""

    rates: tuple[Rate, ...]
    determined: tuple[Determined, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rates": [asdict(each) for each in self.rates],
            "determinism": [asdict(each) for each in self.determined],
        }


def launches(model: str, patch: Path) -> list[Launch]:
    """The model as it is, and with the patch applied at load."""
    arguments = (*COMMANDS[OURS], "--model", model)
    return [
        Launch(ORIGINAL, arguments),
        Launch(CANONICALIZED, (*arguments, "--canonicalize-router", str(patch))),
    ]


def serve(starts: Sequence[Launch], material: Material, load: ServerLoad, said: Said) -> Served:
    """Start the servers, ask both the same things in turns, stop them. Raises `RequestFailed`."""
    with ExitStack() as stack:
        processes = [stack.enter_context(ServerProcess(launch)) for launch in starts]
        targets = []
        for process in processes:
            process.wait_ready()
            targets.append(Target(process))
            stack.callback(targets[-1].close)
        for target in targets:  # the first requests pay for kernels and new memory
            for prefix in (SHARED, UNIQUE):
                _run(target, material, prefix, WITH, load, -1)
        determined = []
        for target in targets:
            said(f"{target.name}: {load.texts} texts, cold and hot")
            determined.append(_determined(target, material, load))
        return Served(tuple(_rates(targets, material, load, said)), tuple(determined))


def _rates(
    targets: Sequence[Target], material: Material, load: ServerLoad, said: Said
) -> list[Rate]:
    """Servers and caches change places from run to run: a b, b a, and so on."""
    found = []
    for run in range(load.repeats):
        ways = [(t, cache) for cache in (WITHOUT, WITH) for t in targets]
        for prefix in (SHARED, UNIQUE):
            for target, cache in ways if run % 2 == 0 else reversed(ways):
                said(f"{target.name}, {prefix}, {cache} ({run + 1} of {load.repeats})")
                time.sleep(SETTLE_SECONDS)
                found.append(_run(target, material, prefix, cache, load, run))
    return found


def _run(
    target: Target, material: Material, prefix: str, cache: str, load: ServerLoad, run: int
) -> Rate:
    """`CLIENTS` clients ask in turn until all requests are answered. Every run begins with new nonces."""
    nonce = fresh_nonce()
    steps = []
    for number in range(load.requests):
        system = f"{nonce if prefix == SHARED else fresh_nonce()}\n{material.text(load.prompt)}"
        question = f"{number}. {material.text(QUESTION_TOKENS, number * QUESTION_TOKENS)}"
        body: dict[str, Any] = {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": question},
            ],
            "max_tokens": load.reply,
            "cache_prompt": cache == WITH,
        }
        steps.append(Step(f"{prefix} {number}", CHAT, body))
    began = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        replies = list(pool.map(target.ask, steps))
    seconds = time.perf_counter() - began
    return Rate(
        target.name,
        prefix,
        cache,
        run,
        seconds,
        sum(reply.completion_tokens or 0 for reply in replies) / seconds,
        sum(reply.prompt_tokens or 0 for reply in replies),
        sum(reply.cached_tokens or 0 for reply in replies),
    )


def _determined(target: Target, material: Material, load: ServerLoad) -> Determined:
    """Each text cold, cold again, through the cache, and from it; half of it is stored before."""
    cold = hot = cached = 0
    for number in range(load.texts):
        text = f"{fresh_nonce()}\n{material.text(load.text, number * load.text)}"
        ask = partial(_complete, target, reply=load.reply)
        first, second = ask(text, cached=False), ask(text, cached=False)
        ask(text[: len(text) // 2], cached=True)
        branched, exact = ask(text, cached=True), ask(text, cached=True)
        cold += first.same_as(second)
        hot += first.same_as(branched) and first.same_as(exact)
        cached += (branched.cached_tokens or 0) + (exact.cached_tokens or 0)
    return Determined(target.name, load.texts, cold, hot, cached)


def _complete(target: Target, text: str, *, reply: int, cached: bool) -> Reply:
    body = {"prompt": text, "max_tokens": reply, "cache_prompt": cached}
    return target.ask(Step("text", COMPLETIONS, body))
