"""Which part of a chat stands at a place of its prompt, by the letters of its parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from ..prompts.abilities import Abilities
from ..prompts.messages import SYSTEM, for_template
from ..schema.requests import ChatBody
from .differences import Where

MOST_MISSED = 8
"""Parts that are not found, from which on a template is taken to write everything in another way."""

LETTERS = 64
"""Of a part's beginning, by which it is looked for."""


def place(body: ChatBody, prompt: str, at: int) -> Where | None:
    """The part that the letter at `at` of `prompt` lies in; None where that is not known."""
    tools = [
        (json.dumps(each["function"]["name"]), each["function"]["name"])
        for each in body.tools or ()
    ]
    turns = for_template(body.messages, Abilities())
    leading = len(body.messages) - len(turns)
    found = [
        *_starts(prompt, (text for text, _ in tools)),
    ]
    parts = [(start, Where("tools", index, tools[index][1])) for index, start in found]
    for index, start in _starts(prompt, (str(turn["content"])[:LETTERS].strip() for turn in turns)):
        role = "system" if turns[index]["role"] in SYSTEM else turns[index]["role"]
        own = 0 if index == 0 else index + leading
        parts.append((start, Where("messages", own, role)))
    before = [(start, where) for start, where in parts if start <= at]
    return max(before, key=lambda part: part[0])[1] if before else None


def _starts(prompt: str, texts: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Which of the texts are found, one behind the other, and where."""
    reached = missed = 0
    for index, text in enumerate(texts):
        if not text:
            continue
        start = prompt.find(text, reached)
        if start < 0:
            missed += 1
            if missed > MOST_MISSED:
                return
            continue
        yield index, start
        reached = start + len(text)
