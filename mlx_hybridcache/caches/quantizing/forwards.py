"""Forwards that would reach across the start are made two of them.

What a model reads before the start looks at full rows, what it reads behind it at quantized ones. So
whoever runs the model, in whichever slices, has to stop there. The model's class becomes a subclass that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..subclassed import Subclassed
from .cache import QuantizingCache


def split(model: Any, leaves: Callable[[Sequence[Any]], list[Any]]) -> Subclassed:
    """Stop `model` at the start of its caches until released. `leaves` opens composites of caches."""
    kind = type(model)
    if kind not in _SPLITTING.values():
        kind = _SPLITTING.setdefault(kind, _splitting(kind, leaves))
    return Subclassed([(model, kind)])


_SPLITTING: dict[type, type] = {}


def _splitting(plain: type, leaves: Callable[[Sequence[Any]], list[Any]]) -> type:
    """A subclass of the model class `plain` that reads up to the start first, and is it otherwise."""

    def splitting_call(self: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
        found = kwargs.get("cache", args[0] if args else None)
        before = _tokens_before_start(leaves(found) if found is not None else [])
        if not 0 < before < inputs.shape[1]:
            return plain.__call__(self, inputs, *args, **kwargs)
        read = [
            plain.__call__(self, part, *args, **kwargs)
            for part in (inputs[:, :before], inputs[:, before:])
        ]
        return mx.concatenate(read, axis=1)

    names = {"__call__": splitting_call, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (plain,), names)


def _tokens_before_start(caches: Sequence[Any]) -> int:
    """How many tokens more are read before rows are quantized; 0 where there is nothing to stop for."""
    ours = (each for each in caches if isinstance(each, QuantizingCache))
    return max((each.precision.start - each.offset for each in ours), default=0)
