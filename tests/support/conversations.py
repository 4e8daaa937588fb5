"""Conversations whose turns go on in each other's buffers, and what tells that they did."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import tiny

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.caches import checkpoint as checkpoints

REPLY = 8
PROMPT = oracle.prompt(700, seed=1)


def new_cache(name: str = "qwen3_next", **settings: Any) -> HybridPromptCache:
    return oracle.new_cache(tiny.build(name), tokenizer=oracle.word_tokenizer(), **settings)


def without_retaining(cache: HybridPromptCache) -> HybridPromptCache:
    cache.engine.tiers.pool.most = 0
    return cache


def answer(
    cache: HybridPromptCache, tokens: list[int], count: int = REPLY, **how: Any
) -> list[Any]:
    return list(cache.stream_generate(tokens, count, sampler=oracle.never_ending, **how))


def tokens_of(reply: list[Any]) -> list[int]:
    return [each.token for each in reply]


def plainly(tokens: list[int], count: int = REPLY, name: str = "qwen3_next") -> list[Any]:
    """Plain mlx-lm's reply, asked for once."""
    return _plainly(tuple(tokens), count, name)


@functools.cache
def _plainly(tokens: tuple[int, ...], count: int, name: str) -> list[Any]:
    with new_cache(name) as other:
        return answer(other, list(tokens), count, use_cache=False)


def assert_same(reply: list[Any], expected: list[Any]) -> None:
    """Tokens and log-probabilities, bit for bit."""
    assert tokens_of(reply) == tokens_of(expected)
    for ours, theirs in zip(reply, expected, strict=True):
        assert oracle.agree(ours.logprobs, theirs.logprobs)


def taken_over(cache: HybridPromptCache) -> int:
    return cache.stats().taken_over


@contextmanager
def copied_rows() -> Iterator[list[int]]:
    """Rows that are copied out of the store into caches, one number for each restore."""
    restore, copied = checkpoints.restore, []

    def counted(
        layout: Any, model: Any, blocks: Any, snapshots: Any, position: int, *more: Any, **how: Any
    ) -> Any:
        copied.append(position)
        return restore(layout, model, blocks, snapshots, position, *more, **how)

    checkpoints.restore = counted
    try:
        yield copied
    finally:
        checkpoints.restore = restore
