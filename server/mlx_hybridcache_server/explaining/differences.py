"""What two chats differ in, in the order in which templates render it: arguments, tools, messages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..schema.requests import ChatBody
from . import turns
from .kinds import Kind
from .texts import kind_between

DEEPEST = 12
"""Levels of a tool's schema in which the place of a difference is named."""

ARGUMENTS = ("chat_template_kwargs", "reasoning_effort", "role_mapping")


@dataclass(frozen=True, slots=True)
class Where:
    """Where something stands in a request: `messages[3] (user).content`, `tools[2] (Read).parameters`.

    `index` counts from 0 in the chat that the request is put into.
    """

    part: str
    index: int | None = None
    name: str | None = None
    field: str | None = None

    def __str__(self) -> str:
        at = "" if self.index is None else f"[{self.index}]"
        name = f" ({self.name})" if self.name else ""
        return f"{self.part}{at}{name}{f'.{self.field}' if self.field else ''}"


@dataclass(frozen=True, slots=True)
class Difference:
    """One of them, and how it is undone in the second chat."""

    kind: Kind
    where: Where
    undo: Callable[[ChatBody], ChatBody]


def differences(one: ChatBody, other: ChatBody) -> list[Difference]:
    """The first of them. Messages that are only appended are none."""
    return [*_arguments(one, other), *_tools(one, other), *_messages(one, other)]


def _messages(one: ChatBody, other: ChatBody) -> Iterator[Difference]:
    for turn in turns.changed(one.messages, other.messages):
        where = Where("messages", turn.index, turn.role, turn.field)
        yield Difference(turn.kind, where, _undoing(messages=turn.undo))


def _undoing(**changes: Callable[[Any], Any]) -> Callable[[ChatBody], ChatBody]:
    def undo(body: ChatBody) -> ChatBody:
        undone = {name: change(getattr(body, name)) for name, change in changes.items()}
        return body.model_copy(update=undone)

    return undo


def _arguments(one: ChatBody, other: ChatBody) -> Iterator[Difference]:
    names = [name for name in ARGUMENTS if getattr(one, name) != getattr(other, name)]
    if not names:
        return
    first, second = (body.chat_template_kwargs or {} for body in (one, other))
    keys = sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
    shown = [f"chat_template_kwargs.{key}" for key in keys] + [
        name for name in names if name != ARGUMENTS[0]
    ]
    if shown:  # none and nothing are the same
        undo = _undoing(**{name: _always(getattr(one, name)) for name in names})
        yield Difference(Kind.ARGUMENTS, Where(", ".join(shown)), undo)


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


# Tools


def _tools(one: ChatBody, other: ChatBody) -> Iterator[Difference]:
    first, second = ([each["function"] for each in body.tools or ()] for body in (one, other))
    a, b = ([json.dumps(each) for each in tools] for tools in (first, second))
    if a == b:
        return
    at = next(
        (k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    kind, tool, field = _changed_tool(first, second, at)
    where = Where("tools", at, tool["name"], field)
    yield Difference(kind, where, _undoing(tools=_always(one.tools)))


def _changed_tool(
    first: list[Any], second: list[Any], at: int
) -> tuple[Kind, dict[str, Any], str | None]:
    """What happened to the tools at `at`, where they differ first, and to which of them."""
    if at == len(first):
        return Kind.TOOL_ADDED, second[at], None
    if at == len(second):
        return Kind.TOOL_REMOVED, first[at], None
    old, new = first[at], second[at]
    if old["name"] == new["name"]:
        return _edit(old, new)
    before, after = (Counter(each["name"] for each in tools) for tools in (first, second))
    if not before[new["name"]] and len(second) > len(first):
        return Kind.TOOL_ADDED, new, None
    if not after[old["name"]]:
        renamed = not before[new["name"]]
        return (Kind.TOOL_EDITED, new, "name") if renamed else (Kind.TOOL_REMOVED, old, None)
    return (Kind.TOOL_ORDER if before[new["name"]] else Kind.TOOL_ADDED), new, None


def _edit(old: dict[str, Any], new: dict[str, Any]) -> tuple[Kind, dict[str, Any], str | None]:
    path, was, now = _first_difference(old, new)
    if isinstance(was, dict) and isinstance(now, dict) and _sorted(was) == _sorted(now):
        return Kind.KEY_ORDER, new, path
    texts = [each if isinstance(each, str) else json.dumps(each) for each in (was, now)]
    kind = kind_between(*texts)
    return kind or Kind.TOOL_EDITED, new, path


def _first_difference(old: Any, new: Any) -> tuple[str | None, Any, Any]:
    """The path to the first value that differs, as JSON is written, and both values."""
    path = ""
    for _ in range(DEEPEST):
        found = _first_child(old, new)
        if found is None:
            break
        step, old, new = found
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return path.removeprefix(".") or None, old, new


def _first_child(old: Any, new: Any) -> tuple[str | int, Any, Any] | None:
    """The child in which alone both differ first; None where they differ in what children they have."""
    if isinstance(old, dict) and isinstance(new, dict) and [*old] == [*new]:
        pairs: Any = ((key, old[key], new[key]) for key in old)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = ((at, x, y) for at, (x, y) in enumerate(zip(old, new, strict=True)))
    else:
        return None
    return next(((at, x, y) for at, x, y in pairs if json.dumps(x) != json.dumps(y)), None)


def _sorted(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
