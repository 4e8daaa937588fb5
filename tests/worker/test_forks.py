"""A fork of a process has none of its threads: whoever asks there hears so, and nobody waits for ever."""

import asyncio
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.worker.turns import PAUSE
from mlx_hybridcache.worker.worker import Worker

LATE_SECONDS = 20
"""A fork that waits for what never comes is ended then, and has said nothing."""


def said_in_a_fork(act: Callable[[], object]) -> str:
    """What a fork says of `act`: what it returned or raised. Nothing when it did not come back."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 tells why these tests are here
        process = os.fork()
    if process == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LATE_SECONDS)
            os.write(writing, repr(act()).encode())
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as told:
        said = told.read()
    os.waitpid(process, 0)
    return said


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[HybridPromptCache]:
    with oracle.new_cache(
        tiny.build("qwen3_next"), tokenizer=oracle.word_tokenizer(), cache_dir=tmp_path
    ) as made:
        yield made


PROMPT = oracle.prompt(40, seed=1)

ASKING: dict[str, Callable[[HybridPromptCache], Any]] = {
    "lookup": lambda cache: cache.lookup(PROMPT),
    "stats": lambda cache: cache.stats(),
    "flush": lambda cache: cache.flush(),
    "prefill": lambda cache: cache.prefill(PROMPT),
    "stream_generate": lambda cache: next(cache.stream_generate(PROMPT, 4)),
}


@pytest.mark.parametrize("asking", ASKING)
def test_who_asks_a_cache_in_a_fork_hears_whose_it_is(
    cache: HybridPromptCache, asking: str
) -> None:
    """A process of a pool that was forked behind the cache: what it is asked for never came, without an error."""
    said = said_in_a_fork(lambda: ASKING[asking](cache))
    assert said.startswith(f"ClosedError: This cache is of process {os.getpid()}, and process")
    assert list(cache.stream_generate(PROMPT, 4)), "where it was made it serves on"


def test_a_reply_that_began_before_a_fork_ends_there_with_that_error() -> None:
    """One item was there: the fork takes it, and hears of the second that it will not come."""
    worker = Worker()
    stream = worker.stream(iter(["first"]))
    assert list(worker.stream(iter(["later"]))) == ["later"]  # by now the first is out

    async def read() -> list[str]:
        return [item async for item in stream]

    waiting = worker.stream(_until_closed())
    assert said_in_a_fork(lambda: next(stream)) == "'first'"
    assert said_in_a_fork(lambda: next(waiting)).startswith("ClosedError: This cache is of process")
    assert said_in_a_fork(lambda: asyncio.run(anext(waiting))).startswith(
        "ClosedError: This cache is of process"
    )
    assert said_in_a_fork(waiting.close) == "None"
    assert asyncio.run(read()) == ["first"], "what a fork took is here yet"
    worker.close()


def _until_closed() -> Iterator[Any]:
    while True:
        yield PAUSE


def test_a_cache_is_closed_in_a_fork_without_ending_the_process_that_has_it(
    cache: HybridPromptCache,
) -> None:
    """As by a `with` block that a fork leaves too: files, lock and thread stay its own process's."""
    assert said_in_a_fork(cache.close) == "None"
    disk = cache.disk_stats()
    assert disk is not None
    assert disk.is_writer
    assert list(cache.stream_generate(PROMPT, 4))
    assert cache.flush(30)
