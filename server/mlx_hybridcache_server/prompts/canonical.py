"""Tools in one order, so that a client that lists them in another has the same prompt."""

from __future__ import annotations

from typing import Any

Tool = dict[str, Any]

FIRST = ("type", "function", "name", "description", "parameters")
"""Keys in the order in which models have seen them; behind them all others, by their letters."""

DEEPEST = 100
"""Levels whose keys are put in order; what is nested deeper stays as it is."""


def canonical(tools: list[Tool]) -> list[Tool]:
    """The same tools by their names, the keys of each in one order, and the names that are `required`.

    All other lists, and tools of one name, stay in theirs.
    """
    return sorted(map(_ordered, tools), key=lambda tool: str(tool["function"]["name"]))


def _ordered(value: Any, key: str = "", depth: int = 0) -> Any:
    if depth > DEEPEST:
        return value
    if isinstance(value, dict):
        keys = sorted(value, key=_rank)
        return {name: _ordered(value[name], name, depth + 1) for name in keys}
    if isinstance(value, list):
        is_set = key == "required" and all(isinstance(each, str) for each in value)
        return sorted(value) if is_set else [_ordered(each, "", depth + 1) for each in value]
    return value


def _rank(key: str) -> tuple[int, str]:
    return (FIRST.index(key), "") if key in FIRST else (len(FIRST), key)
