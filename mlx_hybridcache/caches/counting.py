"""How many tokens caches have read that do not say so themselves.

Recurrent caches of mlx-lm hold a state and no position. Beside a layer with rows that does not matter;
a model of recurrent layers only (mamba, mamba2, rwkv7) has nothing else to ask. So its forwards are
counted: its class becomes a subclass that notes beside each cache how many tokens went into it, and the
very arrays that this left there. Whoever puts other arrays into the cache makes the count unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .subclassed import Subclassed

_NOTE = "_tokens_read"
"""The attribute of a cache that holds `(tokens, arrays)`. A deep copy of the cache has one of its own."""


def tokens_read(cache: Any) -> int | None:
    """Tokens that went into the recurrent `cache`; None where that was not seen."""
    if all(array is None for array in cache.cache):
        return 0
    tokens, arrays = getattr(cache, _NOTE, (0, ()))
    same = len(arrays) == len(cache.cache) and all(map(_is, arrays, cache.cache))
    return tokens if same else None


def note(cache: Any, tokens: int) -> None:
    """What the recurrent `cache` holds now is the state after `tokens` tokens."""
    setattr(cache, _NOTE, (tokens, tuple(cache.cache)))


def forget(cache: Any) -> None:
    """Hold nothing of what the recurrent `cache` held."""
    cache.__dict__.pop(_NOTE, None)


def _is(one: mx.array | None, other: mx.array | None) -> bool:
    return one is other


def count(model: Any, leaves: Callable[[Sequence[Any]], list[Any]]) -> Subclassed:
    """Count what `model` reads into its caches until released. `leaves` opens composites of caches."""
    kind = type(model)
    if kind not in _COUNTING.values():
        kind = _COUNTING.setdefault(kind, _counting(kind, leaves))
    return Subclassed([(model, kind)])


_COUNTING: dict[type, type] = {}


def _counting(plain: type, leaves: Callable[[Sequence[Any]], list[Any]]) -> type:
    """A subclass of the model class `plain` that counts, and is it otherwise."""

    def counting_call(self: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
        found = kwargs.get("cache", args[0] if args else None)
        caches = leaves(found) if found is not None else []
        before = [tokens_read(cache) for cache in caches]
        for cache in caches:
            forget(cache)  # a state that is held twice is not written over in place
        out = plain.__call__(self, inputs, *args, **kwargs)
        for cache, tokens in zip(caches, before, strict=True):
            if tokens is not None:
                note(cache, tokens + inputs.shape[1])
        return out

    names = {
        "__call__": counting_call,
        "__module__": plain.__module__,
        "__doc__": plain.__doc__,
    }
    return type(plain.__name__, (plain,), names)
