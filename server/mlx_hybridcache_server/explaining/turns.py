"""What changed in a history: turn by turn, as templates read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

from ..prompts.abilities import Abilities
from ..prompts.messages import SYSTEM, for_template
from .kinds import Kind
from .texts import common_letters, kind_between

Message = dict[str, Any]

READ = ("role", "content", "reasoning_content", "tool_calls")
"""Of a message, what every template reads."""

MOST = 16
"""Changes that are looked at. What is behind so many is read again anyway."""

THOUGHT_END = "</think>"
"""Behind reasoning that stands in a text."""

SEVERAL = 2
"""Messages fewer, from which on a history with a new beginning is one that was put in an old one's place."""


@dataclass(frozen=True, slots=True)
class ChangedTurn:
    """A change in the history: of which message, and how it is undone among the second one's messages."""

    kind: Kind
    index: int
    role: str
    field: str | None
    undo: Callable[[list[Message]], list[Message]]


@dataclass(frozen=True, slots=True)
class _History:
    """Messages, of which the first `leading` are what is said before the conversation begins."""

    messages: list[Message]
    leading: int
    turns: list[Message]
    """One for each message behind those."""
    written: list[str]
    """The turns as they are compared."""

    @classmethod
    def of(cls, messages: list[Message], *, whole: bool) -> _History:
        leading = len(list(takewhile(lambda message: message["role"] in SYSTEM, messages)))
        turns = for_template(messages[leading:], Abilities()) if leading < len(messages) else []
        written = [json.dumps(turn if whole else _read(turn)) for turn in turns]
        return cls(messages, leading, turns, written)

    def system(self) -> str:
        """All that is said before the conversation begins."""
        if not self.leading:
            return ""
        (turn,) = for_template(self.messages[: self.leading], Abilities())
        return str(turn["content"])


def changed(one: list[Message], other: list[Message]) -> Iterator[ChangedTurn]:
    """The first changes in order, up to one behind which turns have other neighbours."""
    first, second = (_History.of(messages, whole=False) for messages in (one, other))
    found = [*_system(first, second), *islice(_turns(first, second), MOST)]
    if not found:  # then perhaps in what only some templates read, such as ids
        whole = (_History.of(messages, whole=True) for messages in (one, other))
        found = [*islice(_turns(*whole), MOST)]
    yield from found


def carried_over(one: list[Message], other: list[Message]) -> int:
    """How many of the second's messages, from its beginning on, are what became of the first's."""
    first, second = (_History.of(messages, whole=False) for messages in (one, other))
    last = len(first.turns) - 1
    same = [at for at, turn in enumerate(second.written) if turn == (first.written or [""])[-1]]
    end = min(same, key=lambda at: abs(at - last)) if same else min(last, len(second.turns) - 1)
    return second.leading + end + 1


def first_thought(messages: list[Message]) -> int | None:
    """The first message that has reasoning; None where none has any."""
    history = _History.of(messages, whole=False)
    thought = (at for at, turn in enumerate(history.turns) if _has_reasoning(turn))
    return next((history.leading + at for at in thought), None)


def _read(turn: Message) -> Message:
    """What every template reads of a turn, without the ids of its calls."""
    read = {name: turn[name] for name in READ if name in turn}
    if calls := read.get("tool_calls"):
        read["tool_calls"] = _functions(calls)
    return read


def _functions(calls: list[dict[str, Any]] | None) -> list[Any]:
    """What calls say without their ids; a message that is not the assistant's may have any calls, or none."""
    return [call.get("function") for call in calls or ()]


def _system(first: _History, second: _History) -> Iterator[ChangedTurn]:
    was, now = first.system(), second.system()
    if was == now:
        return
    kind = kind_between(was, now) or Kind.SYSTEM_EDITED

    def undo(messages: list[Message]) -> list[Message]:
        return [*first.messages[: first.leading], *messages[second.leading :]]

    index = _changed_system(first, second)
    yield ChangedTurn(kind, index, "system", "content", undo)


def _changed_system(first: _History, second: _History) -> int:
    """Which of several system messages is the first that differs."""
    both = zip(first.messages[: first.leading], second.messages[: second.leading], strict=False)
    pairs = ((x.get("content"), y.get("content")) for x, y in both)
    last = max(0, min(first.leading, second.leading) - 1)
    return next((at for at, (x, y) in enumerate(pairs) if x != y), last)


def _turns(first: _History, second: _History) -> Iterator[ChangedTurn]:
    both = min(len(first.written), len(second.written))
    for at in range(both):
        if first.written[at] == second.written[at]:
            continue
        shift = _shift(first.written, second.written, at)
        kind, field = (shift, None) if shift else _kind(first.turns[at], second.turns[at])
        role = second.turns[at]["role"]
        undo = _undoing(first, second, at, all_of_it=shift is not None)
        yield ChangedTurn(kind, second.leading + at, role, field, undo)
        if shift is not None:
            return
    if len(second.written) < len(first.written):
        undo = _undoing(first, second, both, all_of_it=True)
        role = first.turns[both]["role"]
        yield ChangedTurn(Kind.REWOUND, first.leading + both, role, None, undo)


def _undoing(
    first: _History, second: _History, at: int, *, all_of_it: bool
) -> Callable[[list[Message]], list[Message]]:
    """The second's messages with the first's turn at `at`, or with all of its turns from there on."""
    old = first.messages[first.leading + at :]

    def undo(messages: list[Message]) -> list[Message]:
        here = len(messages) - len(second.turns) + at
        if all_of_it:
            return [*messages[:here], *old]
        return [*messages[:here], old[0], *messages[here + 1 :]]

    return undo


def _shift(a: list[str], b: list[str], at: int) -> Kind | None:
    """What became of the turns from `at` on, if it is more than an edit of one of them."""
    if a[at + 1 : at + 2] == b[at + 1 : at + 2] != []:
        return None
    if b[at] in a[at + 1 :]:
        return Kind.MESSAGES_REMOVED
    if a[at] in b[at + 1 :]:
        return Kind.MESSAGE_INSERTED
    if at + 1 < len(b) <= len(a) - SEVERAL:
        return Kind.HISTORY_REWRITTEN
    return None


def _kind(old: Message, new: Message) -> tuple[Kind, str | None]:
    """What happened to a turn, and in which of its fields."""
    field = next((name for name in READ if old.get(name) != new.get(name)), None)
    was, now = (_text(turn.get(field or "")) for turn in (old, new))
    if field == "role":
        return Kind.MESSAGE_EDITED, field
    if old["role"] == "assistant" and _lacks_reasoning(old, new):
        return Kind.REASONING_STRIPPED, field
    if field is None:
        return _kind_of_rest(old, new)
    if old["role"] == "tool":
        return (Kind.RESULT_SHORTENED if _is_rest(was, now) else Kind.RESULT_EDITED), field
    return kind_between(was, now) or Kind.MESSAGE_EDITED, field


def _is_rest(was: str, now: str) -> bool:
    """Whether a text is what was left of another one: half of it at most, or with its own beginning and end."""
    kept = common_letters(was, now) + common_letters(was[::-1], now[::-1])
    return len(now) < len(was) and (2 * len(now) <= len(was) or 2 * kept >= len(now))


def _lacks_reasoning(old: Message, new: Message) -> bool:
    """Whether nothing but reasoning differs, in a field of its own or before the text."""
    if old.get("tool_calls") != new.get("tool_calls"):
        return False
    was, now = str(old["content"]), str(new["content"]).strip()
    if was.strip() == now:
        return old.get("reasoning_content") != new.get("reasoning_content")
    return bool(now) and THOUGHT_END in was and was.endswith(now)


def _has_reasoning(turn: Message) -> bool:
    return bool(turn.get("reasoning_content")) or (
        turn["role"] == "assistant" and THOUGHT_END in turn["content"]
    )


def _kind_of_rest(old: Message, new: Message) -> tuple[Kind, str | None]:
    """Where all that every template reads is the same: the order of keys, or what only some read."""
    calls = [json.dumps(_functions(each.get("tool_calls"))) for each in (old, new)]
    if calls[0] != calls[1]:
        return Kind.KEY_ORDER, "tool_calls"
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    ids = {"id", "tool_call_id", "tool_calls"}
    return (Kind.ID if ids & set(names) else Kind.MESSAGE_EDITED), next(iter(names), None)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
