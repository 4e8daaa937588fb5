"""The garbage collector ends a cache wherever it runs: nobody may hold there what that end waits for."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest

from mlx_hybridcache.caches.subclassed import Subclassed
from mlx_hybridcache.disk import thread as disk_threads
from mlx_hybridcache.disk.directory import Directory
from mlx_hybridcache.worker import mlx_thread as mlx_threads

PATIENCE_SECONDS = 20


class Plain(nn.Module):
    """A layer."""


class Ours(Plain):
    """What it becomes while a cache serves its model."""


def ends(work: Callable[[], object]) -> bool:
    """Whether `work` does, on a thread that is left behind where it does not."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    return not thread.is_alive()


def test_a_cache_that_is_collected_while_another_is_built_gives_back_its_layers() -> None:
    """One that nobody closed, in a cycle as a traceback makes: the next one's constructor waited for itself."""
    layer, made = Plain(), []

    class Cache:
        me: Any = None

    def dropped() -> None:
        cache = Cache()
        cache.me = cache
        weakref.finalize(cache, Subclassed([(layer, Ours)]).release)

    def collecting() -> Iterator[tuple[Any, type]]:
        gc.collect()
        assert type(layer) is Ours
        yield layer, Ours

    dropped()
    assert ends(lambda: made.append(Subclassed(collecting())))
    assert type(layer) is Ours
    made[0].release()
    assert type(layer) is Plain, "each of the two has counted once"
    assert not hasattr(layer, "_subclassed_for")


@pytest.mark.parametrize("when", ["append", "pop"])
def test_a_thread_that_hands_its_stream_on_may_wait_for_another_ones_end(
    monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The collector runs there, ends a cache, and waits for that one's thread, which hands on its own."""
    waited: list[bool] = []

    def use() -> None:
        with mlx_threads.mlx_thread():
            pass

    def collects() -> None:
        if not waited:
            waited.append(False)
            waited[0] = ends(use)

    class Collecting(list[Any]):
        def append(self, each: Any) -> None:
            if when == "append":
                collects()
            super().append(each)

        def pop(self, at: Any = -1) -> Any:
            if when == "pop":
                collects()
            return super().pop(at)

    use()
    monkeypatch.setattr(mlx_threads, "_free", Collecting(mlx_threads._free))
    assert ends(use)
    assert waited == [True]


def test_a_disk_thread_may_end_the_cache_that_it_belongs_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In an idle process it alone may allocate anything: collecting where it waits for work, it put in that it ends."""
    monkeypatch.setattr(disk_threads, "TICK_SECONDS", 0.001)
    directory = Directory(tmp_path)
    directory.open()
    thread = disk_threads.DiskThread(directory, lambda function: None)

    class Cache:
        me: Any = None

    allocate = threading.Lock

    def collecting() -> Any:
        """What a condition allocates while its lock is held."""
        if threading.get_ident() == thread.ident:
            gc.collect()
        return allocate()

    def dropped() -> None:
        cache = Cache()
        cache.me = cache
        weakref.finalize(cache, thread.close)

    gc.disable()
    try:
        dropped()
        monkeypatch.setattr(threading, "_allocate_lock", collecting)
        thread._thread.join(0.5)
        gc.collect()
    finally:
        gc.enable()
    thread._thread.join(PATIENCE_SECONDS)
    assert not thread._thread.is_alive()
