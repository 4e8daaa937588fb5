"""Any conversation that OpenAI's API takes, as one that the model's chat template renders.

Pure: messages in, messages for the template out. What a message becomes depends on those before it,
never on those behind it, so that a conversation that goes on begins with the same prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from ..errors import refuse
from ..jsontext import without_halves
from .abilities import Abilities, Message

SYSTEM = frozenset({"system", "developer"})
"""OpenAI's older name and its newer one, which few templates know."""

TEXT = frozenset({None, "text", "input_text", "output_text", "refusal"})
"""Kinds of content that are text. Some clients leave the kind out."""

THOUGHT = frozenset({"thinking", "reasoning"})

ENCODED = 3
"""How many times arguments are read as JSON: some clients encode what was encoded already."""

DEEPEST = 100
"""Levels of arguments that are rendered as an object; what is nested deeper is rendered as its text."""


def for_template(messages: Sequence[Message], takes: Abilities) -> list[Message]:
    """The messages as `takes` says that the template renders them, with all their text.

    Raises `ApiError` 400 for what is no text in the question that is to be answered.
    """
    leading = list(takewhile(lambda message: message["role"] in SYSTEM, messages))
    answered = max(
        (at for at, each in enumerate(messages) if each["role"] == "assistant"), default=-1
    )
    turns = [_first(leading, takes)] if leading else []
    for at, message in enumerate(messages[len(leading) :], len(leading)):
        turns += _turns(message, takes, is_open=at > answered)
    asked = int(bool(turns) and turns[0]["role"] == "system")
    if not takes.no_question and (asked == len(turns) or turns[asked]["role"] != "user"):
        turns.insert(asked, _turn("user", ""))
    return turns if takes.repeats else list(_alternating(turns))


# Turns


def _first(leading: list[Message], takes: Abilities) -> Message:
    """All that is said to the model before the conversation begins, as one message."""
    texts = [_text(message["content"]) for message in map(_whole, leading)]
    text = "\n\n".join(filter(None, texts))
    return {**leading[0], **_turn("system", text)} if takes.system else _marked("system", text)


def _turns(message: Message, takes: Abilities, *, is_open: bool) -> list[Message]:
    """What becomes of a message behind the first ones."""
    message, role = _whole(message), message["role"]
    if role == "assistant":
        return list(_reply(message, takes))
    if role == "user":
        return [{**message, "content": _text(message["content"], is_open=is_open)}]
    text = _text(message["content"])
    if role in ("tool", "function"):
        if takes.results:
            return [_with_id({**message, **_turn("tool", text)}, "tool_call_id", takes)]
        return [_marked("tool", text)]
    role = "system" if role in SYSTEM else role
    if takes.late_system if role == "system" else takes.other_roles:
        return [{**message, **_turn(role, text)}]
    return [_marked(role, text)]


def _reply(message: Message, takes: Abilities) -> Iterator[Message]:
    """An assistant's message: more than one where the template has a single call in each."""
    content, refusal = message["content"], message.get("refusal")
    text, thought = _text(content, skips=THOUGHT), _reasoning(message)
    ready = {**message, "content": text + (refusal if isinstance(refusal, str) else "")}
    for name in ("tool_calls", "function_call", "reasoning", "reasoning_content"):
        ready.pop(name, None)
    if thought:  # templates read the one or the other
        ready["reasoning_content"] = ready["reasoning"] = thought
    calls = [_with_id(call, "id", takes) for call in _calls(message)]
    if calls and not takes.calls:
        written = (json.dumps(call["function"], ensure_ascii=False) for call in calls)
        marked = [f"<tool_call>\n{call}\n</tool_call>" for call in written]
        ready["content"] = "\n".join(filter(None, [ready["content"], *marked]))
    elif calls and not takes.several_calls:
        yield {**ready, "tool_calls": calls[:1]}
        yield from ({**_turn("assistant", ""), "tool_calls": [call]} for call in calls[1:])
        return
    elif calls:
        ready["tool_calls"] = calls
    yield ready


def _alternating(turns: list[Message]) -> Iterator[Message]:
    """Neighbours of one role as one message."""
    last: Message | None = None
    for turn in turns:
        if last is not None and turn["role"] == last["role"] in ("user", "assistant"):
            calls = [*last.get("tool_calls", ()), *turn.get("tool_calls", ())]
            text = "\n\n".join(filter(None, (last["content"], turn["content"])))
            last = {**last, **turn, "content": text, **({"tool_calls": calls} if calls else {})}
            continue
        if last is not None:
            yield last
        last = turn
    if last is not None:
        yield last


def _turn(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _marked(role: str, text: str) -> Message:
    """A turn of the user's, in which somebody else speaks."""
    return _turn("user", f"<{role}>\n{text}\n</{role}>")


def _whole(message: Message) -> Message:
    return {**message, "content": message.get("content")}


# Content


def _text(content: Any, *, is_open: bool = False, skips: frozenset[str] = frozenset()) -> str:
    """The text of a content; a sentence for each part that is none, unless it `is_open`."""
    if content is None or isinstance(content, str):
        return content or ""
    kept = (part for part in content if _kind(part) not in skips or not _part_text(part))
    return "".join(_read(part, is_open=is_open) for part in kept)


def _read(part: Any, *, is_open: bool) -> str:
    text = _part_text(part)
    if text is not None and (not is_open or _kind(part) in TEXT):
        return text
    kind = str(_kind(part))[:64]
    if is_open:
        raise refuse(
            f"A content part of type {kind!r} cannot be read: this server takes text only, and it "
            "fetches nothing. Send images to a model and a server made for them.",
            "messages",
        )
    return f"[Here stood a part of type {kind!r}; this server reads text only.]"


def _kind(part: Any) -> Any:
    if isinstance(part, dict):
        kind = part.get("type")
        return kind if kind is None or isinstance(kind, str) else type(kind).__name__
    return None if isinstance(part, str) else type(part).__name__


def _part_text(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    said = (
        (part.get(name) for name in ("text", "refusal", "thinking"))
        if isinstance(part, dict)
        else ()
    )
    return next((text for text in said if isinstance(text, str)), None)


def _reasoning(message: Message) -> str:
    """Under either name, else of the parts of the content."""
    for name in ("reasoning_content", "reasoning"):
        if (found := message.get(name)) and isinstance(found, str):
            return found
    parts = message["content"] if isinstance(message["content"], list) else []
    return "\n".join(filter(None, (_part_text(part) for part in parts if _kind(part) in THOUGHT)))


# Calls


def _calls(message: Message) -> Iterator[dict[str, Any]]:
    """The calls of a message, the older form of one included, with arguments as objects."""
    calls, older = message.get("tool_calls"), message.get("function_call")
    for call in calls or ([{"function": older}] if isinstance(older, dict) else []):
        function = call.get("function")
        if not isinstance(function, dict):  # a custom tool's call has a text; some have no envelope
            custom = call.get("custom")
            function = custom if isinstance(custom, dict) else call
        given = function.get("arguments", function.get("input"))
        name, kept = function.get("name"), {k: v for k, v in call.items() if k != "custom"}
        named = {"name": str(name or "unknown"), "arguments": arguments(given)}
        yield {**kept, "type": "function", "function": named}


def arguments(given: Any) -> dict[str, Any]:
    """A past call's arguments as an object; what is none is kept under a key of its own."""
    found = given
    for _ in range(ENCODED):
        if not isinstance(found, str):
            break
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            break
    if _is_deep(found):
        found = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    found = without_halves(found)
    if isinstance(found, dict):
        return found
    is_empty = found is None or found == [] or (isinstance(found, str) and not found.strip())
    return {} if is_empty else {"arguments": found}


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            each
            for holder in level
            if isinstance(holder, dict | list)
            for each in (holder.values() if isinstance(holder, dict) else holder)
        ]
        if not level:
            return False
    return True


def _with_id(holder: dict[str, Any], name: str, takes: Abilities) -> dict[str, Any]:
    """A call, or a result, under an id that the template takes."""
    if takes.any_id:
        return holder
    short = hashlib.sha256(str(holder.get(name)).encode()).hexdigest()[:9]
    return {**holder, name: short}
