"""Requests as token ids, twelve ways of having a beginning in common: only where prompts agree matters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from mlx_hybridcache_bench.policies.traces import TracedRequest
from mlx_hybridcache_bench.policies.workloads import Chance, Talk

QUESTION, ANSWER, REASONING, ENDING, LINE = 60, 300, 500, 40, 24
"""Tokens of what is short: questions, answers, reasoning, a last line, a line with the time."""

SYSTEM = 3_000
"""Tokens of the system prompt whose line changes."""

LONGER = 500
"""Tokens by which raw text is made longer and shorter, as `bench ttft` does."""

CLIENTS = 4


def _message(chance: Chance, size: int) -> tuple[Talk, TracedRequest]:
    talk = Talk("one", chance)
    talk.say("user", chance.text(size))
    return talk, talk.ask(ANSWER)


def _repeat(chance: Chance, size: int) -> list[TracedRequest]:
    _, asked = _message(chance, size)
    return [asked, asked]


def _next_turn(chance: Chance, size: int) -> list[TracedRequest]:
    talk, asked = _message(chance, size)
    talk.say("user", chance.text(QUESTION))
    return [asked, talk.ask(ANSWER)]


def _thinking_turn(chance: Chance, size: int) -> list[TracedRequest]:
    talk = Talk("one", chance, thinks=True)
    talk.say("user", chance.text(size))
    asked = talk.ask(ANSWER, REASONING)
    talk.say("user", chance.text(QUESTION))
    return [asked, talk.ask(ANSWER, REASONING)]


def _changed_ending(chance: Chance, size: int) -> list[TracedRequest]:
    text = chance.text(size - ENDING)
    asked = []
    for _ in range(2):
        talk = Talk("one", chance)
        talk.say("user", text + chance.text(ENDING))
        asked.append(talk.ask(ANSWER))
    return asked


def _system_prompt(chance: Chance, size: int) -> list[TracedRequest]:
    system = chance.text(size)
    asked = []
    for _ in range(3):
        talk = Talk("one", chance)
        talk.say("system", system)
        talk.say("user", chance.text(QUESTION))
        asked.append(talk.ask(ANSWER))
    return asked


def _volatile_line(chance: Chance, size: int) -> list[TracedRequest]:
    system, text = chance.text(min(SYSTEM, size // 2)), chance.text(max(1, size - SYSTEM))
    asked = []
    for _ in range(3):
        talk = Talk("one", chance)
        talk.say("system", system + chance.text(LINE))
        talk.say("user", text)
        asked.append(talk.ask(ANSWER))
    return asked


def _tool_loop(chance: Chance, size: int) -> list[TracedRequest]:
    talk = Talk("one", chance)
    talk.say("system", chance.text(size // 4))
    talk.say("user", chance.text(QUESTION))
    asked = [talk.ask(QUESTION, calls=True)]
    for _ in range(3):
        talk.say("tool", chance.text(size // 4))
        asked.append(talk.ask(QUESTION, calls=True))
    return asked


def _branched(chance: Chance, size: int) -> tuple[TracedRequest, TracedRequest, TracedRequest]:
    talk, opening = _message(chance, size)
    old = dataclasses.replace(talk, turns=list(talk.turns))
    old.say("user", chance.text(QUESTION))
    talk.say("user", chance.text(QUESTION))
    return opening, old.ask(ANSWER), talk.ask(ANSWER)


def _new_branch(chance: Chance, size: int) -> list[TracedRequest]:
    return list(_branched(chance, size))


def _back(chance: Chance, size: int) -> list[TracedRequest]:
    opening, old, new = _branched(chance, size)
    return [opening, old, new, old]


def _raw(chance: Chance, tokens: list[int]) -> TracedRequest:
    reply = np.array(chance.text(ANSWER), dtype=np.int32)
    ids = np.array(tokens, dtype=np.int32)
    return TracedRequest(0.0, "one", ids, (), reply, len(reply), keeps_reply=True)


def _longer(chance: Chance, size: int) -> list[TracedRequest]:
    text = chance.text(size + LONGER)
    return [_raw(chance, text[:size]), _raw(chance, text)]


def _shorter(chance: Chance, size: int) -> list[TracedRequest]:
    text = chance.text(size)
    return [_raw(chance, text), _raw(chance, text[:-LONGER])]


def _at_once(chance: Chance, size: int) -> list[TracedRequest]:
    _, asked = _message(chance, size)
    return [asked] * CLIENTS


SCENES: dict[str, Callable[[Chance, int], list[TracedRequest]]] = {
    "exact repeat": _repeat,
    "next turn of a chat": _next_turn,
    "the same, reasoning left out": _thinking_turn,
    "last line changed": _changed_ending,
    "shared system prompt, a third user": _system_prompt,
    "line at the end of 3,000 changed": _volatile_line,
    "tool loop, a quarter is the result": _tool_loop,
    "a new branch": _new_branch,
    "back to the old branch": _back,
    "completion, 500 tokens longer": _longer,
    "completion, 500 tokens shorter": _shorter,
    "identical prompts": _at_once,
}
"""Requests in a row for prompts of about so many tokens, by what they have in common."""
