"""What takes long is tested in two forms: a short one always, the whole one by `pytest -m long`."""

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest

LONG = (pytest.mark.long, pytest.mark.timeout(2400))
"""Beside as many others as there are cores, on a slow machine, a whole form may take a quarter of an hour."""


def forms(short: Any, whole: Any) -> list[Any]:
    """Parameters: how much is done always, and how much in the long form."""
    return [pytest.param(short, id="short"), in_full(whole)]


def in_full(value: Any) -> Any:
    """A parameter that the long form alone has."""
    return pytest.param(value, id="whole", marks=LONG)


def mostly_long(values: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """Parameters: all of `values`, of which the long form alone has those that are not in `always`."""
    values, always = list(values), list(always)
    assert all(each in values for each in always)
    return [each if each in always else _long(each) for each in values]


def in_turns(
    one: Iterable[Any],
    other: Iterable[Any],
    always: tuple[Sequence[Any], Sequence[Any]] | None = None,
) -> list[Any]:
    """Pairs of parameters: all of them, of which the short form has each of either kind once, or as often as the longer
    kind needs, in turns; only those of `always`, where not all are.
    """
    one, other = list(one), list(other)
    a, b = always or (one, other)
    turns = range(max(len(a), len(b)))
    pairs = [(a[at % len(a)], b[at % len(b)]) for at in turns]
    return mostly_long(itertools.product(one, other), pairs)


def _long(value: Any) -> Any:
    arguments = value if isinstance(value, tuple) else (value,)
    return pytest.param(*arguments, marks=LONG)
