"""Whoever waits for the worker gets its result, its error or its end, whatever ends at that moment.

One thread is stopped before every bytecode that it runs in the library, one after another, while
another one acts to its end; then many threads act at once, in drawn orders.
"""

from __future__ import annotations

import asyncio
import gc
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from worker_acts import (
    ACTS,
    ITEMS,
    PATIENCE_SECONDS,
    Outcome,
    Setting,
    begun,
    call,
    cancel,
    close,
    close_the_stream,
    drop,
    ends,
    outcome,
    read,
    read_on_a_loop,
    start,
)

import mlx_hybridcache
from mlx_hybridcache.errors import HybridCacheError
from mlx_hybridcache.worker.inbox import Asked, Inbox
from mlx_hybridcache.worker.turns import PAUSE
from mlx_hybridcache.worker.worker import Worker

LIBRARY = str(Path(mlx_hybridcache.__file__).parent)

HELD_SECONDS = 0.1


class Interrupted:
    """Runs `act` on a thread of its own, and `other` before its n-th bytecode in the library.

    All of `other`, unless it waits for something that `act` holds: then `act` goes on beside it.
    """

    def __init__(self, act: Callable[[], Outcome], other: Callable[[], object], number: int):
        self.act, self.other, self.left = act, other, number
        self.found: Outcome | None = None
        self.beside: threading.Thread | None = None

    def run(self) -> Outcome:
        thread = begun(self._traced)
        ends(thread, f"{self.act} with {self.left} bytecodes to go")
        if self.beside is not None:
            ends(self.beside, self.other)
        assert self.found is not None
        return self.found

    def _traced(self) -> None:
        sys.settrace(self._trace)
        try:
            self.found = self.act()
        finally:
            sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(LIBRARY):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                self.beside = begun(self.other)
                self.beside.join(HELD_SECONDS)
        return self._trace


def is_right(act: Callable[[Setting], Any], found: Outcome, *, is_shared: bool) -> bool:
    """The result, whole if nobody ended it, or that it was closed."""
    kind, value = found
    if kind == "closed":
        return act in (call, drop, start, read, read_on_a_loop)
    if act in (read, read_on_a_loop):
        whole = list(range(1, ITEMS))
        return kind == "result" and (value == whole or (is_shared and value == sorted(set(value))))
    return kind == "result" and (act is not start or value == [1, 2])


@pytest.mark.parametrize("other", [close, close_the_stream, read, cancel, drop])
@pytest.mark.parametrize("act", ACTS)
def test_every_wait_ends_wherever_another_thread_comes_between(act: Any, other: Any) -> None:
    """`call` has looked that the worker lives; it is closed before the call is put into its inbox."""
    number, was_reached = 0, True
    while was_reached:
        number += 1 + number // 30
        on = Setting()
        interrupted = Interrupted(lambda: outcome(act, on), lambda: outcome(other, on), number)  # noqa: B023
        found = interrupted.run()
        was_reached = interrupted.left <= 0
        assert is_right(act, found, is_shared=True), (act, other, number, found)
        ends(begun(on.worker.close), "close")
        ends(begun(lambda: list(on.stream)), "a reader afterwards")  # noqa: B023


@pytest.mark.parametrize("seed", range(60))
def test_many_threads_at_once_all_end(seed: int) -> None:
    """Two readers, one on an event loop, beside a close of the reply, three of the worker, and calls."""
    draw = random.Random(seed)
    on = Setting()
    acts = [draw.choice(ACTS) for _ in range(6)] + [close] * draw.randrange(3)
    draw.shuffle(acts)
    barrier = threading.Barrier(len(acts))
    found: list[tuple[Any, Outcome]] = []

    def run(act: Any) -> None:
        barrier.wait()
        found.append((act, outcome(act, on)))

    with switching_often():
        threads = [begun(lambda act=act: run(act)) for act in acts]
        for thread, act in zip(threads, acts, strict=True):
            ends(thread, f"{act} of {acts}")
    for act, one in found:
        assert is_right(act, one, is_shared=True), (act, one)
    whole = [
        value for act, (kind, value) in found if act in (read, read_on_a_loop) and kind == "result"
    ]
    items = [item for value in whole for item in value]
    assert len(items) == len(set(items)), "an item was read twice"
    on.worker.close()


@contextmanager
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("readers", [[read] * 4, [read_on_a_loop] * 4, [read, read_on_a_loop] * 2])
def test_every_reader_of_one_reply_reads_to_its_end(readers: list[Any]) -> None:
    """Four readers of 48 items get each item once, and all four end."""
    on = Setting()
    found: list[Outcome] = []
    threads = [
        begun(lambda act=act: found.append(outcome(act, on)))  # type: ignore[misc]
        for act in readers
    ]
    for thread in threads:
        ends(thread, "a reader")
    assert [kind for kind, _ in found] == ["result"] * 4
    assert sorted(item for _, items in found for item in items) == list(range(1, ITEMS))
    on.worker.close()


def test_readers_of_one_event_loop_all_end() -> None:
    """Four tasks wait for the same reply when it ends; each hears of it."""

    async def reading() -> list[list[int]]:
        async def one() -> list[int]:
            return [item async for item in on.stream]

        return await asyncio.wait_for(
            asyncio.gather(*(one() for _ in range(4))), timeout=PATIENCE_SECONDS
        )

    on = Setting()
    found = asyncio.run(reading())
    assert sorted(item for items in found for item in items) == list(range(1, ITEMS))
    on.worker.close()


@pytest.mark.parametrize("reading", [read, read_on_a_loop])
def test_closing_beside_a_reader_that_waits_ends_both(reading: Any) -> None:
    """The reader waits for a prompt that is being read, and nothing comes, when another thread closes it."""
    on = Setting()
    waits = threading.Event()

    def steps() -> Iterator[Any]:
        while True:
            waits.set()
            time.sleep(0.001)
            yield PAUSE

    on.stream = on.worker.stream(steps())
    reader = begun(lambda: reading(on))
    assert waits.wait(PATIENCE_SECONDS)
    closers = [begun(on.stream.close) for _ in range(3)]
    for thread in [reader, *closers]:
        ends(thread, thread)
    on.worker.close()


def test_an_error_goes_to_one_reader_and_the_end_to_the_others() -> None:
    """Of three readers one raises it; asked again, it has ended for that one too."""
    on = Setting()
    go = threading.Event()

    def failing() -> Iterator[int]:
        go.wait(PATIENCE_SECONDS)
        raise ZeroDivisionError
        yield 1

    on.stream = on.worker.stream(failing())
    found: list[Outcome] = []
    threads = [begun(lambda: found.append(outcome(read, on))) for _ in range(3)]
    go.set()
    for thread in threads:
        ends(thread, thread)
    assert sorted(kind for kind, _ in found) == ["failed", "result", "result"]
    assert list(on.stream) == []
    on.worker.close()


def test_what_is_asked_behind_the_end_is_refused() -> None:
    """A call behind the stop in the worker's inbox: the thread ends before it comes to it."""
    on = Setting()
    busy, go = threading.Event(), threading.Event()

    def wait() -> None:
        busy.set()
        go.wait(PATIENCE_SECONDS)

    first = begun(lambda: on.worker.call(wait))
    assert busy.wait(PATIENCE_SECONDS)
    found: list[Outcome] = []
    closers = [begun(on.worker.close) for _ in range(2)]
    while on.worker._stop.alive:
        time.sleep(0.001)
    late = [begun(lambda act=act: found.append(outcome(act, on))) for act in (call, start)]  # type: ignore[misc]
    go.set()
    for thread in [first, *closers, *late]:
        ends(thread, thread)
    assert [kind for kind, _ in found] == ["closed"] * 2


def test_a_worker_that_fails_to_begin_refuses_what_it_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is held for its life cannot be had: a call hears that, and does not wait for a dead thread."""

    @contextmanager
    def held() -> Iterator[None]:
        raise OSError("no wired memory")
        yield

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    worker = Worker(held)
    found: list[Outcome] = []
    for act in (lambda: worker.call(int), lambda: list(worker.stream(iter([1])))):
        thread = begun(lambda act=act: found.append(outcome(lambda _: act(), None)))  # type: ignore[misc, arg-type]
        ends(thread, "a call")
    assert [kind for kind, _ in found] == ["closed"] * 2
    worker.close()


def test_waiting_in_a_callback_is_refused() -> None:
    """A callback on the worker thread reads another reply: only that thread could write it."""
    on = Setting()

    def steps() -> Iterator[int]:
        yield next(on.worker.stream(iter([1])))

    with pytest.raises(HybridCacheError, match="callback"):
        list(on.worker.stream(steps()))
    assert on.worker.call(lambda: 5) == 5
    on.worker.close()


def test_a_reader_that_was_cancelled_on_its_loop_leaves_nothing_behind() -> None:
    """A thousand waits with a timeout, and then the item comes."""
    on = Setting()
    go = threading.Event()

    def steps() -> Iterator[Any]:
        while not go.is_set():
            time.sleep(0.001)
            yield PAUSE
        yield 1

    async def reading() -> list[int]:
        for _ in range(1000):
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        assert not stream._task.wakers
        go.set()
        return [item async for item in stream]

    stream = on.worker.stream(steps())
    assert asyncio.run(reading()) == [1]
    on.worker.close()


def test_an_inbox_does_or_refuses_what_comes_while_it_is_closed() -> None:
    """Something is put in by what closing refuses, as a finalizer would."""
    inbox: Inbox[None] = Inbox()
    told: list[str] = []
    late: Asked[None] = Asked(lambda _: None, lambda: told.append("late"))
    assert inbox.put(Asked(lambda _: None, lambda: inbox.put(late)))
    inbox.close()
    assert told == ["late"]
    assert not inbox.put(late)


EXIT = """
import contextlib, threading, time
from mlx_hybridcache.errors import ClosedError
from mlx_hybridcache.worker.turns import PAUSE
from mlx_hybridcache.worker.worker import Worker

worker = Worker()
def endless():
    while True:
        time.sleep(0.001)
        yield PAUSE
stream = worker.stream(endless())
def read():
    with contextlib.suppress(ClosedError):
        list(stream)
threading.Thread(target=read, daemon=True).start()
finite = worker.stream(iter(range(1000)))
threading.Thread(target=lambda: print(len(list(finite)))).start()
left = worker.stream(iter(range(1000)))
next(left)
"""


def test_the_interpreter_exits_beside_readers() -> None:
    """A daemon thread waits for an endless reply; another thread reads one of 1,000 items to its end."""
    ended = subprocess.run(
        [sys.executable, "-c", EXIT],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_SECONDS,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "1000\n", "")


LEFT = """
import threading
import mlx.core as mx
from mlx_hybridcache.worker.mlx_thread import on_mlx_thread

begun = threading.Event()

def work():
    begun.set()
    one = mx.ones((200, 200))
    for _ in range(300):
        mx.eval(one @ one)
    print("done")

on_mlx_thread(work)
begun.wait()
raise KeyboardInterrupt
"""


def test_the_interpreter_waits_for_what_its_callers_have_left() -> None:
    """Control-C while a cache is built: MLX aborted the process, whose thread still computed."""
    ended = subprocess.run(
        [sys.executable, "-c", LEFT],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_SECONDS,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (-signal.SIGINT, "done\n")


def test_a_reply_outlives_a_worker_that_was_dropped_by_its_end_only() -> None:
    """Nobody refers to the worker while a thread reads: the reader ends, and knows that it was cut short."""
    on = Setting()
    waits = threading.Event()

    def steps() -> Iterator[Any]:
        while True:
            waits.set()
            time.sleep(0.001)
            yield PAUSE

    stream = on.worker.stream(steps())
    found: list[Outcome] = []
    reader = begun(lambda: found.append(outcome(lambda _: list(stream), None)))  # type: ignore[arg-type]
    assert waits.wait(PATIENCE_SECONDS)
    del on
    gc.collect()
    ends(reader, "the reader")
    assert [kind for kind, _ in found] == ["closed"]
