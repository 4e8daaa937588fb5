"""Runs of a program, one after the other, on one cache directory: what an earlier one left, and cold replies."""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import pytest
import tiny
from long import mostly_long
from oracle import STEP

from mlx_hybridcache import HybridPromptCache

LENGTH = 300
"""Tokens of most prompts here: four grid steps and some more."""

FAMILIES: dict[str, tuple[str, mx.Dtype, dict[str, Any]]] = {
    "qwen3_next": ("qwen3_next", mx.float32, {}),
    "qwen3_next-paused": ("qwen3_next", mx.float32, {"paused": True}),
    "qwen3_next-exact": ("qwen3_next", mx.float32, {"exact": True}),
    "qwen3_5-bf16": ("qwen3_5", mx.bfloat16, {}),
    "jamba": ("jamba", mx.float32, {}),
    "mamba2-exact": ("mamba2", mx.float32, {"exact": True}),
    "mamba2-bf16": ("mamba2", mx.bfloat16, {"exact": True}),
    "recurrent_gemma": ("recurrent_gemma", mx.float32, {}),
    "recurrent_gemma-bf16": ("recurrent_gemma", mx.bfloat16, {}),
    "gemma3_text": ("gemma3_text", mx.float32, {}),
    "gemma3_text-bf16": ("gemma3_text", mx.bfloat16, {}),
    "gemma3_text-full": ("gemma3_text", mx.float32, {"swa_full": True}),
    "gpt_oss": ("gpt_oss", mx.float32, {}),
    "llama4": ("llama4", mx.float32, {}),
    "llama": ("llama", mx.float32, {}),
    "llama-bf16": ("llama", mx.bfloat16, {}),
    "llama_yarn-exact": ("llama_yarn", mx.float32, {"exact": True}),
    "deepseek_v3": ("deepseek_v3", mx.float32, {}),
    "granitemoehybrid-exact": ("granitemoehybrid", mx.float32, {"exact": True}),
}
"""Every kind of layer, computed in both widths where the CPU can: name -> family, dtype, settings."""

SOME = ("qwen3_next", "gemma3_text", "deepseek_v3")
each_family = pytest.mark.parametrize("name", mostly_long(FAMILIES, (*SOME, "llama-bf16")))
each_kind = pytest.mark.parametrize("name", mostly_long(FAMILIES, SOME))

Open = Callable[..., Any]


@functools.cache
def model_of(name: str) -> nn.Module:
    family, dtype, _ = FAMILIES[name]
    model = tiny.fresh(family)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


@contextmanager
def opened(directory: Path, name: str = "qwen3_next", **how: Any) -> Iterator[HybridPromptCache]:
    settings = {"disk_budget": "64MB", **FAMILIES[name][2], **how}
    with oracle.new_cache(model_of(name), cache_dir=directory, **settings) as cache:
        yield cache


def greedy(model: nn.Module, caches: list[Any], rest: Sequence[int], count: int = 4) -> np.ndarray:
    """Logits `(count, VOCAB)`, float32, of reading `rest` and of the greedy tokens behind it."""
    feed, steps = list(rest), []
    for _ in range(count):
        logits = model(mx.array([feed]), cache=caches)[:, -1].astype(mx.float32)
        mx.eval(logits, [cache.state for cache in caches])
        steps.append(np.array(logits[0]))
        feed = [int(logits.argmax().item())]
    return np.stack(steps)


def hot(cache: HybridPromptCache, tokens: Sequence[int], **options: Any) -> np.ndarray:
    ready = cache.prefill(tokens, max_tokens=8, **options)
    logits = greedy(cache.engine.model, ready.prompt_cache, ready.rest)
    ready.release()
    return logits


COLD: dict[tuple[int, tuple[int, ...]], tuple[nn.Module, np.ndarray]] = {}
"""By the model's id, which is its own as long as the model is kept here."""


def cold(model: nn.Module, tokens: Sequence[int]) -> np.ndarray:
    key = id(model), tuple(tokens)
    if key not in COLD:
        caches = tiny.cold_caches(model, tokens[:-1], STEP)
        COLD[key] = model, greedy(model, caches, tokens[-1:])
    return COLD[key][1]


def assert_as_cold(cache: HybridPromptCache, tokens: Sequence[int], **options: Any) -> None:
    off = oracle.distance(hot(cache, tokens, **options), cold(cache.engine.model, tokens))
    assert off <= (0.0 if tiny.device_is_split_invariant() else oracle.OTHER_DEVICES)


def forget_memory(cache: HybridPromptCache) -> None:
    """What a crowd of other requests would do to the memory tier."""
    cache.worker.call(cache.engine.tiers.memory.clear)


def files(directory: Path) -> dict[str, int]:
    """Name and size of every file of rows or of a state."""
    found = directory.rglob("*.safetensors")
    return {path.name: path.stat().st_size for path in found}


def write(directory: Path, *prompts: Sequence[int], name: str = "qwen3_next", **how: Any) -> None:
    """What an earlier run has left behind."""
    with opened(directory, name, **how) as cache:
        for tokens in prompts:
            oracle.read(cache, tokens)
        assert cache.flush(30)


@contextmanager
def held_up(cache: HybridPromptCache) -> Iterator[threading.Event]:
    """Let the disk thread wait, so that what is asked of it meanwhile is still to come."""
    go_on, waits = threading.Event(), threading.Event()

    def wait(directory: object) -> None:
        waits.set()
        assert go_on.wait(60)

    cache.engine.tiers.disk.thread.change(wait)
    assert waits.wait(60)
    try:
        yield go_on
    finally:
        go_on.set()


def until_idle(cache: HybridPromptCache) -> None:
    """Let the disk thread do everything it was asked for, and the worker hear of it."""
    done = threading.Event()
    cache.engine.tiers.disk.thread.change(lambda directory: done.set())
    assert done.wait(60)
    cache.stats()
