"""What takes long is tested in two forms: a short one always, the whole one by `pytest -m long`."""

from collections.abc import Collection, Iterable
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


def _long(value: Any) -> Any:
    arguments = value if isinstance(value, tuple) else (value,)
    return pytest.param(*arguments, marks=LONG)
