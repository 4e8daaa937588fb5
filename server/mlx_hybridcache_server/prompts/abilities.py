"""What a chat template renders, learnt by asking it: a few small conversations, once for each model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Render = Callable[[list[Message], list[dict[str, Any]] | None], str]
"""Renders messages with tools, and raises what the template raises."""

LONG_ID, SHORT_ID = "call_0123456789abcdef", "a1b2c3d4e"
"""An id as OpenAI writes them, and one of nine letters, beside which Mistral's templates take none."""

TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a template renders as it stands: in its place, and with all its text."""

    system: bool = True  # one at the beginning
    late_system: bool = True  # one anywhere else
    other_roles: bool = True
    no_question: bool = True  # conversations that no user begins
    calls: bool = True
    several_calls: bool = True  # in one message
    results: bool = True  # of tools
    any_id: bool = True  # of a call
    repeats: bool = True  # two messages of one role in a row

    @classmethod
    def learn(cls, render: Render) -> Abilities:
        """Ask `render`. A template that cannot even render a question is taken at its word later."""
        ask = _Asking(render)
        if not ask.shows("user"):
            return cls()
        system = ask.shows("system", "user")
        first = ("system",) if system else ()
        any_id = ask.shows_result(LONG_ID) or not ask.shows_result(SHORT_ID)
        return cls(
            system=system,
            late_system=ask.shows("user", "assistant", "system", "user")
            and ask.shows(*first, "user", "system"),
            other_roles=ask.shows("user", "assistant", "narrator", "user"),
            no_question=all(
                ask.shows(*roles, tools=tools)
                for roles in (("system",), ("system", "assistant"), ("assistant", "user"))
                for tools in (None, [TOOL])
            ),
            calls=ask.shows_calls(1),
            several_calls=ask.shows_calls(2),
            results=ask.shows_result(LONG_ID if any_id else SHORT_ID),
            any_id=any_id,
            repeats=ask.shows("user", "user") and ask.shows("user", "assistant", "assistant"),
        )


class _Asking:
    """Renders probes whose every text can be looked for."""

    def __init__(self, render: Render):
        self._render = render

    def shows(self, *roles: str, tools: list[dict[str, Any]] | None = None) -> bool:
        """Whether a message of each role is rendered, in their order."""
        words = [f"probe{at}" for at in range(len(roles))]
        messages = [_said(role, word) for role, word in zip(roles, words, strict=True)]
        text, at = self._text(messages, tools), 0
        for word in words:
            at = text.find(word, at) + 1
            if not at:
                return False
        return True

    def shows_calls(self, count: int) -> bool:
        """Whether so many calls in a message are rendered, their names and arguments."""
        words = [(f"probename{at}", f"probekey{at}", f"probevalue{at}") for at in range(count)]
        calls = [_call(SHORT_ID, name, {key: value}) for name, key, value in words]
        text = self._text([_said("user", "a"), {**_said("assistant", ""), "tool_calls": calls}])
        return all(word in text for call in words for word in call)

    def shows_result(self, call_id: str) -> bool:
        """Whether a tool's result is rendered between its call and the next question."""
        calls = [_call(call_id, "probe", {})]
        result = {**_said("tool", "probe0"), "name": "probe", "tool_call_id": call_id}
        asked = [_said("user", "a"), {**_said("assistant", ""), "tool_calls": calls}, result]
        return "probe0" in self._text([*asked, _said("assistant", "b")])

    def _text(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        try:
            return self._render(messages, tools)
        except Exception:  # templates raise jinja2's errors, their authors' and Python's
            return ""


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _call(call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}
