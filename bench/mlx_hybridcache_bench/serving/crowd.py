"""A server under several clients at once: three situations, each a dictionary of named values."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from .client import CHAT, Reply, RequestFailed
from .mixture import CLIENTS, Habit
from .scenarios import SHORT_REPLY, Material, Step
from .side import SETTLE_SECONDS, Side
from .target import Target

AT_ONCE = 4
"""Identical requests."""

SHORT_TEXT_TOKENS = 77
"""With its nonce and the bundled model's template the short question has 100."""

SHORT_ALONE = 3
"""Short questions asked alone; their median is what the one behind a long prompt is held against."""

Values = dict[str, float]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens of an identical, a long and a mixed client's prompt; requests of each mixed client.

    `at_once` is how many clients send the identical request.
    """

    identical: int
    long: int
    mixed: int
    requests: int
    at_once: int = AT_ONCE


def identical(target: Target, material: Material, nonces: Sequence[str], sizes: Sizes) -> Values:
    """One cold request alone, then several that are cold and identical, at once."""
    alone, all_alike = (
        _question(f"{nonce}\n{material.text(sizes.identical)}\n\nWhat is this text about?")
        for nonce in nonces[:2]
    )
    (lone,), alone_seconds = _at_once([partial(target.ask, alone)])
    before = target.read_tokens()
    replies, seconds = _at_once([partial(target.ask, all_alike)] * sizes.at_once)
    return {
        **_total("prompt_tokens", [lone]),
        "alone_seconds": alone_seconds,
        "at_once_seconds": seconds,
        "ratio": seconds / alone_seconds,
        **_total("cached_tokens", replies),
        **_read(target, before),
    }


def short_behind_long(
    target: Target, material: Material, nonces: Sequence[str], sizes: Sizes
) -> Values:
    """A short question that comes when the server has begun a long cold prompt."""
    long = _question(f"{nonces[0]}\n{material.text(sizes.long)}\n\nWhat is this text about?")
    short, *others = (
        _question(f"{nonce} {material.text(SHORT_TEXT_TOKENS)}")
        for nonce in nonces[1 : 2 + SHORT_ALONE]
    )
    alone = statistics.median(target.ask(each).first_seconds for each in others)
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(target.ask, long, begun)
        begun.wait(target.head_start_seconds)
        behind = target.ask(short)
        long_seconds = reading.result().first_seconds
    return {
        **_total("prompt_tokens", [behind]),
        "alone_ttft_seconds": alone,
        "behind_ttft_seconds": behind.first_seconds,
        "ratio": behind.first_seconds / alone,
        "long_ttft_seconds": long_seconds,
    }


def mixed(target: Target, material: Material, nonces: Sequence[str], sizes: Sizes) -> Values:
    """Eight clients with habits of their own and equally many requests each."""

    def client(number: int) -> list[Reply]:
        habit = Habit(material, nonces[0], nonces[1 + number], sizes.mixed, number)
        script = CLIENTS[number](habit)
        replies = [target.ask(next(script))]
        while len(replies) < sizes.requests:
            replies.append(target.ask(script.send(replies[-1])))
        return replies

    before = target.read_tokens()
    found, seconds = _at_once([partial(client, number) for number in range(len(CLIENTS))])
    replies = [reply for each in found for reply in each]
    ttft = sorted(reply.first_seconds for reply in replies)
    generated = sum(reply.completion_tokens or 0 for reply in replies)
    return {
        "seconds": seconds,
        "requests": len(replies),
        "requests_per_second": len(replies) / seconds,
        "generated_tokens": generated,
        "generated_per_second": generated / seconds,
        **{f"ttft_p{percent}_seconds": percentile(ttft, percent) for percent in (50, 90, 99)},
        **_total("prompt_tokens", replies),
        **_total("cached_tokens", replies),
        **_read(target, before),
    }


IDENTICAL, SHORT_BEHIND_LONG, MIXED = "identical", "short-behind-long", "mixed"

SITUATIONS: dict[str, Callable[[Target, Material, Sequence[str], Sizes], Values]] = {
    IDENTICAL: identical,
    SHORT_BEHIND_LONG: short_behind_long,
    MIXED: mixed,
}

NONCES = 1 + len(CLIENTS)
"""Fresh beginnings that a situation takes at most."""


def measure_situation(side: Side, name: str, nonces: Sequence[str], sizes: Sizes) -> Values:
    """One situation, once. Nothing when a request failed, which `side.troubles` then tells."""
    time.sleep(SETTLE_SECONDS)
    try:
        return SITUATIONS[name](side.target, side.material, nonces, sizes)
    except RequestFailed as error:
        side.failed(name, "", error)
        return {}


def percentile(ascending: Sequence[float], percent: int) -> float:
    """The smallest value that `percent` of all do not exceed."""
    return ascending[max(0, math.ceil(len(ascending) * percent / 100) - 1)]


def _at_once(calls: Sequence[Callable[[], T]]) -> tuple[list[T], float]:
    """What all calls return, started together, and the seconds until the last has."""
    gate = threading.Barrier(len(calls) + 1)

    def through(call: Callable[[], T]) -> T:
        gate.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        running = [pool.submit(through, call) for call in calls]
        gate.wait()
        began = time.perf_counter()
        found = [each.result() for each in running]
    return found, time.perf_counter() - began


def _read(target: Target, before: float | None) -> Values:
    """What the server itself has counted since `before`, where it counts."""
    after = target.read_tokens()
    return {} if before is None or after is None else {"read_tokens": after - before}


def _total(name: str, replies: Sequence[Reply]) -> Values:
    """The sum of a count over `replies`, as far as the server tells it for each."""
    counts = [getattr(reply, name) for reply in replies]
    return {} if None in counts else {name: sum(counts)}


def _question(text: str) -> Step:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": SHORT_REPLY}
    return Step("question", CHAT, body)
