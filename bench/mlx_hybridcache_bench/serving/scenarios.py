"""What people ask of a server in a row: scripts whose next request may depend on the last reply.

A script is a generator that yields requests and is sent replies, so that both servers can be led
through it step by step. Each run of one starts with a fresh nonce: nothing is warm by accident.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from mlx_hybridcache.demo.functions import FUNCTIONS

from ..kit.text import prompt_of
from .client import CHAT, COMPLETIONS, Message, Reply

SHORT_REPLY = 8
"""Tokens, where only the time to the first one matters."""

WHOLE_REPLY = 48
"""Tokens, where the reply goes on in the next prompt: enough for the bundled model's."""

LONGER = 500
"""Tokens by which raw text is made longer and shorter."""

SESSIONS = 12
"""Two more conversations than mlx_lm.server keeps caches for."""

COLD, AGAIN, LONGER_TEXT, SHORTER_TEXT = "cold", "again", "500 longer", "500 shorter"
RESTART, AFTER_RESTART = "restart", "after a restart"
CHANGES = "ending changed", "changed again"
CHANGED_LINES = "line changed", "line changed again"


NO_REPLY = Reply(0.0, 0.0, None, None, None, None)
"""What a script is sent when its server failed, so that it can go on."""


@dataclass(frozen=True, slots=True)
class Step:
    """One request: its name within the scenario, and what to post where."""

    name: str
    path: str
    body: dict[str, Any]


Script = Generator[Step, Reply, None]


class Material:
    """Real text by the token, and the nonce of one run."""

    def __init__(self, tokenizer: Any, tokens: int) -> None:
        self._tokenizer = tokenizer
        self._ids = prompt_of(tokenizer, tokens)

    def text(self, tokens: int, start: int = 0) -> str:
        """`tokens` tokens of the reference text from `start` on, which wraps at its end."""
        start %= max(1, len(self._ids) - tokens)
        return str(self._tokenizer.decode(self._ids[start : start + tokens]))


class Blank(Material):
    """No text, where only the requests of a script matter."""

    def __init__(self) -> None:
        self._ids = []

    def text(self, tokens: int, start: int = 0) -> str:
        return ""


def repeat(material: Material, nonce: str, size: int) -> Script:
    """One long message, and four times the same: hot requests are short and need many pairs."""
    messages = [user(f"{nonce}\n{material.text(size)}\n\nWhat is this text about?")]
    for name in (COLD, AGAIN, AGAIN, AGAIN, AGAIN):
        yield chat_step(name, messages)


def chat(material: Material, nonce: str, size: int) -> Script:
    """Six turns; the first brings a text of half the size, and each goes on from the last reply."""
    messages = [_system(f"{nonce}\nYou are a helpful assistant.")]
    for turn in range(6):
        text = material.text(size // 2 if turn == 0 else size // 20, turn * size)
        messages.append(user(f"{text}\n\nSum it up in one sentence."))
        reply = yield chat_step(f"turn {turn + 1}", messages, max_tokens=WHOLE_REPLY)
        messages.append(reply.message())


def changed_ending(material: Material, nonce: str, size: int) -> Script:
    """One long message whose last line changes."""
    endings = "What is this text about?", "Name one rule that it states.", "Who wrote it?"
    for name, ending in zip((COLD, *CHANGES), endings, strict=True):
        yield chat_step(name, [user(f"{nonce}\n{material.text(size)}\n\n{ending}")])


def system_prompt(material: Material, nonce: str, size: int) -> Script:
    """A long system prompt that three users share."""
    system = _system(f"{nonce}\n{material.text(size)}")
    questions = "What is a class?", "How do I write a loop?", "When does a generator end?"
    for name, question in zip((COLD, "another user", "a third user"), questions, strict=True):
        yield chat_step(name, [system, user(question)])


def volatile_line(material: Material, nonce: str, size: int) -> Script:
    """A system prompt with a line that changes in its middle, and a conversation of two turns behind it."""
    before = material.text(size // 2)
    after = material.text(size // 4, size // 2)
    asked = user(f"{material.text(size // 4, size)}\n\nSum it up in one sentence.")
    for name, day in zip((COLD, *CHANGED_LINES), ("Monday", "Tuesday", "Friday"), strict=True):
        system = _system(f"{nonce}\n{before}\n\nToday is {day}.\n\n{after}")
        answered = {"role": "assistant", "content": "It describes how Python works."}
        yield chat_step(name, [system, asked, answered, user("Say it in one word.")])


def tool_loop(material: Material, nonce: str, size: int) -> Script:
    """Three questions, each answered by a call, its result and a sentence; the history grows."""
    weather = FUNCTIONS[0].declaration()
    # Some templates put the tools before the system prompt: the nonce must stand in both.
    weather["function"]["description"] += f" ({nonce})"
    tools = {"tools": [weather]}
    messages = [_system(f"{nonce}\n{material.text(size // 20)}")]
    for number, city in enumerate(("Oslo", "Lima", "Rome")):
        messages.append(user(f"What is the weather in {city}?"))
        called = yield chat_step(f"question {number + 1}", messages, WHOLE_REPLY, **tools)
        call = _call_or(called, number, city)
        messages.append(call)
        notes = material.text(size // 4, number * size)
        result = {"sky": "clear", "degrees": 7 + number, "notes": notes}
        messages += [
            {"role": "tool", "tool_call_id": each["id"], "content": json.dumps(result)}
            for each in call["tool_calls"]
        ]
        answered = yield chat_step(f"result {number + 1}", messages, WHOLE_REPLY, **tools)
        messages.append(answered.message())


def branch_and_back(material: Material, nonce: str, size: int) -> Script:
    """A second answer to one conversation's opening, then the first branch again and further."""
    opening = [user(f"{nonce}\n{material.text(size)}\n\nWhat is this text about?")]
    reply = yield chat_step(COLD, opening, max_tokens=WHOLE_REPLY)
    trunk = [*opening, reply.message()]
    old = [*trunk, user("Say it in one word.")]
    new = [*trunk, user("Name one rule that it states.")]
    old_reply = yield chat_step("old branch", old, max_tokens=WHOLE_REPLY)
    yield chat_step("new branch", new)
    yield chat_step("back to the old", old, max_tokens=WHOLE_REPLY)
    yield chat_step("old goes on", [*old, old_reply.message(), user("Why that one?")])


def completions(material: Material, nonce: str, size: int) -> Script:
    """Raw text: cold, 500 tokens longer, 500 tokens shorter than the first."""
    for name, tokens in ((COLD, size), (LONGER_TEXT, size + LONGER), (SHORTER_TEXT, size - LONGER)):
        yield _complete(name, f"{nonce}\n{material.text(tokens)}")


def sessions(material: Material, nonce: str, size: int) -> Script:
    """Twelve conversations under one system prompt, opened in turn, then each visited again."""
    system = _system(f"{nonce}\n{material.text(size // 10)}")
    opened: list[list[Message]] = []
    for number in range(SESSIONS):
        text = material.text(size // 6, (number + 1) * size // 6)
        opened.append([system, user(f"{text}\n\nSum it up in one sentence.")])
    for messages in opened:
        reply = yield chat_step("opened", messages)
        messages += [reply.message(), user("Say it in one word.")]
    for messages in opened:
        yield chat_step("visited again", messages)


def throughput(material: Material, nonce: str, size: int) -> Script:
    """Raw text that goes on for 100 tokens."""
    yield _complete(COLD, f"{nonce}\n{material.text(size)}", max_tokens=100)


SCENARIOS: dict[str, Callable[[Material, str, int], Script]] = {
    "repeat": repeat,
    "chat": chat,
    "changed-ending": changed_ending,
    "system-prompt": system_prompt,
    "volatile-line": volatile_line,
    "tool-loop": tool_loop,
    "branch-and-back": branch_and_back,
    "completions": completions,
    "sessions": sessions,
    "throughput": throughput,
}

AT_EVERY_SIZE = frozenset({"repeat", "changed-ending"})
"""Scenarios whose figures depend most on the prompt's length; the others run at the first size."""


def steps_of(name: str) -> list[str]:
    """The names of a scenario's requests, in order: the same whatever text and replies are."""
    script = SCENARIOS[name](Blank(), "", 0)
    names = [next(script).name]
    while True:
        try:
            names.append(script.send(NO_REPLY).name)
        except StopIteration:
            return names


def chat_step(
    name: str, messages: list[Message], max_tokens: int = SHORT_REPLY, **more: Any
) -> Step:
    """A request for the next turn of a conversation; `more` are fields of its body."""
    return Step(name, CHAT, {"messages": list(messages), "max_tokens": max_tokens, **more})


def _complete(name: str, prompt: str, max_tokens: int = SHORT_REPLY) -> Step:
    return Step(name, COMPLETIONS, {"prompt": prompt, "max_tokens": max_tokens})


def user(content: str) -> Message:
    """What a user says."""
    return {"role": "user", "content": content}


def _system(content: str) -> Message:
    return {"role": "system", "content": content}


def _call_or(reply: Reply, number: int, city: str) -> Message:
    """The reply's own call, which a cache may know; a made one where the model wrote no whole call."""
    if reply.tool_calls and reply.finish_reason != "length":
        return reply.message()
    function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    call = {"id": f"call_{number}", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}
