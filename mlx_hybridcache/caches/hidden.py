"""What a model's last layer leaves of each token, for a listener that reads it beside the logits.

The trunk of mlx-lm's models, their `model`, gives the hidden states behind its final norm, and the model makes
logits of them. The trunk's class becomes a subclass that hands them on too, so that it does not matter who runs the
model: a prefill, a block of drafts or mlx-lm's own step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx

from .subclassed import Subclassed

_LISTENER = "_heard_by"
"""The attribute of a request's first cache that names who listens."""


class Listener(Protocol):
    """Hears what one request's caches read, wherever that happens."""

    def begin(self, caches: Sequence[Any], position: int) -> None:
        """These are the caches now, and stand there. Nothing of what was heard before counts any more."""
        ...

    def heard(self, tokens: mx.array, hidden: mx.array) -> None:
        """A forward read `tokens`, `(1, n)`, and left `hidden`, `(1, n, width)`: unevaluated, and so are the caches."""
        ...

    def settle(self, cuts: Sequence[int]) -> None:
        """What was heard so far is evaluated: nothing need be held of it.

        At the positions of `cuts` in it a checkpoint of these caches is taken.
        """
        ...


def listen(caches: Sequence[Any], listener: Listener | None) -> None:
    """From now on `listener` hears what is read into these caches; None: nobody."""
    if caches:
        setattr(caches[0], _LISTENER, listener)


def telling(trunk: Any) -> Subclassed:
    """Let `trunk` tell listeners of its hidden states, until released."""
    kind = type(trunk)
    if kind not in _TELLING.values():
        kind = _TELLING.setdefault(kind, _telling(kind))
    return Subclassed([(trunk, kind)])


_TELLING: dict[type, type] = {}


def _telling(plain: type) -> type:
    """A subclass of the trunk's class `plain` that tells, and is it otherwise."""

    def telling_call(self: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
        hidden = plain.__call__(self, inputs, *args, **kwargs)
        caches = kwargs.get("cache", args[0] if args else None)
        listener = getattr(caches[0], _LISTENER, None) if caches else None
        if listener is not None:
            listener.heard(inputs, hidden)
        return hidden

    names = {"__call__": telling_call, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (plain,), names)
