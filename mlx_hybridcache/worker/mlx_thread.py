"""Threads that call MLX and end: each works on a stream that others have used before it.

MLX frees no stream. On the CPU a stream is a thread of the system's, and all of them wake for each evaluation:
with one left behind for each cache that was closed, everything that comes later gets slower.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.generate import wired_limit

T = TypeVar("T")

_free: list[tuple[mx.Device, mx.Stream]] = []
"""There is no lock: the garbage collector may end a cache anywhere, and waits for its thread, which comes by here."""


@contextmanager
def mlx_thread() -> Iterator[None]:
    """For a thread's whole work with MLX: its default stream is its own inside, and the next thread's afterwards.

    What is to be used on another thread has to be evaluated inside.
    """
    device = mx.default_device()
    stream = _take(device)
    mx.set_default_stream(stream)
    try:
        yield
    finally:
        try:
            mx.synchronize(stream)
            _free.append((device, stream))
        finally:
            # Those of other devices: a thread that leaves its streams behind ends the process at exit (MLX 0.32).
            mx.clear_streams()


@contextmanager
def wired_mlx_thread(model: Any) -> Iterator[None]:
    """The same for a thread that generates with `model`: its weights are kept from being swapped."""
    with mlx_thread(), wired_limit(model):
        yield


def on_mlx_thread(work: Callable[[], T]) -> Future[T]:
    """Run `work`, which calls MLX, on a thread of its own, whoever asks: a caller's thread that ends with streams
    of its own ends the process at exit too. So does one that still computes, so that the interpreter waits for this.
    """
    future: Future[T] = Future()
    threading.Thread(target=_run, args=(work, future), name="mlx", daemon=False).start()
    return future


def _run(work: Callable[[], T], future: Future[T]) -> None:
    try:
        with mlx_thread():
            made = work()
    except BaseException as error:
        future.set_exception(error)
        del future  # an error holds this frame, and would hold itself
    else:  # its stream is free for the next thread by now
        future.set_result(made)


def _take(device: mx.Device) -> mx.Stream:
    others: list[tuple[mx.Device, mx.Stream]] = []
    try:
        while True:
            its_device, stream = _free.pop()
            if its_device == device:
                return stream
            others.append((its_device, stream))
    except IndexError:  # there is none, or others took the last
        return mx.new_thread_unsafe_stream(device)
    finally:
        _free.extend(others)
