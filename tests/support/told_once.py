"""What every new cache asks of its model, asked once for each model of a test run.

Whether replies decode in batches and how far slices do not matter take longer to find out than most tests
take; both are the model's alone, and `tests/decode` and `tests/caches` ask them afresh.
"""

import weakref
from collections.abc import Callable
from typing import Any

import pytest

from mlx_hybridcache import settings
from mlx_hybridcache.caches import layout
from mlx_hybridcache.decode import batch_check


def told_once(ask: Callable[..., Any]) -> Callable[..., Any]:
    """`ask`, which goes by its first argument alone, without asking twice about one object."""
    known: dict[int, tuple[weakref.ref[Any], Any]] = {}

    def asked(model: Any, *more: Any) -> Any:
        about, answer = known.get(id(model), (None, None))
        if about is None or about() is not model:
            answer = ask(model, *more)
            known[id(model)] = weakref.ref(model), answer
        return answer

    return asked


class _Asked:
    shown = staticmethod(told_once(batch_check.shown))


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new caches ask each model once."""
    monkeypatch.setattr(settings, "batching", _Asked)
    monkeypatch.setattr(layout, "rotation_limit", told_once(layout.rotation_limit))
