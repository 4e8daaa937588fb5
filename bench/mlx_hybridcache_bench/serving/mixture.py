"""Eight clients of different habits, each a script that may go on from its last reply for ever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .client import CHAT, COMPLETIONS, Message
from .scenarios import Material, Script, Step

REPLY = 24
"""Tokens of a reply."""

ROOM = 16
"""Prompt sizes of text that are enough for clients to read from different places."""


@dataclass(frozen=True, slots=True)
class Habit:
    """What one client asks with: text, beginnings that nobody had before, and a length in tokens.

    `shared` begins what several clients have in common, `own` what this one has alone.
    """

    material: Material
    shared: str
    own: str
    size: int
    number: int

    def text(self, part: int, tokens: int) -> str:
        """The client's own reading, a different stretch for each part."""
        return self.material.text(tokens, (7 * self.number + part) * self.size // 2)

    def common(self, tokens: int) -> str:
        """What all clients that share it send first."""
        return f"{self.shared}\n{self.material.text(tokens)}"


def agent(habit: Habit) -> Script:
    """A conversation behind the system prompt that all agents share."""
    messages = [_message("system", habit.common(habit.size)), _message("user", habit.own)]
    yield from _talk(habit, messages)


def talker(habit: Habit) -> Script:
    """A conversation about a document of its own."""
    document = f"{habit.own}\n{habit.text(0, habit.size)}"
    yield from _talk(habit, [_message("user", f"{document}\n\nWhat is this text about?")])


def visitor(habit: Habit) -> Script:
    """One question after the other behind the agents' system prompt, without a history."""
    system = _message("system", habit.common(habit.size))
    number = 0
    while True:
        question = f"{habit.own} {number}. {habit.text(number, habit.size // 20)}"
        yield _chat([system, _message("user", question)])
        number += 1


def writer(habit: Habit) -> Script:
    """Raw text that begins as another writer's: longer, shorter, longer by something else."""
    begun = f"{habit.common(habit.size // 2)}\n{habit.own}\n{habit.text(0, habit.size // 2)}"
    shorter = begun[: -habit.size]  # characters: about a quarter of its tokens
    part = 1
    while True:
        for prompt in (begun, f"{begun}\n{habit.text(part, habit.size // 8)}", shorter):
            yield Step("text", COMPLETIONS, {"prompt": prompt, "max_tokens": REPLY})
        part += 1


def _talk(habit: Habit, messages: list[Message]) -> Script:
    part = 1
    while True:
        reply = yield _chat(messages)
        following = f"{habit.text(part, habit.size // 10)}\n\nSum it up in one sentence."
        messages = [*messages, reply.message(), _message("user", following)]
        part += 1


def _chat(messages: Sequence[Message]) -> Step:
    return Step("chat", CHAT, {"messages": list(messages), "max_tokens": REPLY})


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


CLIENTS: tuple[Callable[[Habit], Script], ...] = (
    *(agent, agent, agent),
    *(talker, talker),
    visitor,
    *(writer, writer),
)
"""Three agents and a visitor share a system prompt, two writers share the beginning of a text."""
