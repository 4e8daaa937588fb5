"""What every new cache asks of its model, asked once for each model of a test run.

Whether replies decode in batches, how far slices do not matter and what a smaller store costs take longer to find out
than most tests take. The first two are the model's alone, and `tests/decode` and `tests/caches` ask them afresh; the
third is the model's and the store's.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import pytest

from mlx_hybridcache import settings
from mlx_hybridcache.caches import layout
from mlx_hybridcache.caches.layout import Layout
from mlx_hybridcache.decode import batch_check


def told_once(
    ask: Callable[..., Any], goes_by: Callable[..., Hashable] = lambda *more: None
) -> Callable[..., Any]:
    """`ask`, which goes by its first argument and by what `goes_by` makes of the others, without asking twice about one
    object.
    """
    known: dict[tuple[int, Hashable], tuple[weakref.ref[Any], Any]] = {}

    def asked(model: Any, *more: Any) -> Any:
        key = id(model), goes_by(*more)
        about, answer = known.get(key, (None, None))
        if about is None or about() is not model:
            answer = ask(model, *more)
            known[key] = weakref.ref(model), answer
        return answer

    return asked


class _Asked:
    shown = staticmethod(told_once(batch_check.shown))


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new caches ask each model once."""
    monkeypatch.setattr(settings, "batching", _Asked)
    monkeypatch.setattr(layout, "rotation_limit", told_once(layout.rotation_limit))
    monkeypatch.setattr(settings, "measure", told_once(settings.measure, _smaller))


def _smaller(tokenizer: Any, layout: Layout) -> Hashable:
    return id(tokenizer), layout.storing
