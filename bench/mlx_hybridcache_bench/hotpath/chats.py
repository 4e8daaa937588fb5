"""One conversation, asked in every way that finds most of it in a cache."""

from __future__ import annotations

from ..serving.client import Message
from ..serving.scenarios import COLD, Material, Script, chat_step, user

REPEAT, NEXT_TURN, REGENERATE, CHANGED = "repeat", "next turn", "regenerate", "changed ending"
HOT = (REPEAT, NEXT_TURN, REGENERATE, CHANGED)
EACH = 5
"""How often a conversation is asked in each of the first three ways."""

STEPS = (COLD, *(REPEAT,) * EACH, *(NEXT_TURN, REGENERATE) * EACH, CHANGED)
"""The names of a script's requests, in order."""

MESSAGE = 300
"""Tokens of a message: 400 messages make 120K."""

QUESTION = 40
"""Tokens of what a user says next."""

REPLY = 1
"""Tokens: what the next one costs is the model's own."""


def conversation(material: Material, nonce: str, size: int) -> list[Message]:
    """Messages of two who speak in turn, the user's last, of about `size` tokens."""
    count = max(2, (size - QUESTION) // MESSAGE // 2 * 2)
    length = (size - QUESTION) // count
    roles = ("user", "assistant")
    said = [
        {"role": roles[at % 2], "content": material.text(length, at * length)}
        for at in range(count)
    ]
    said.append(user(material.text(QUESTION, count * length)))
    return [user(f"{nonce}\n{said[0]['content']}"), *said[1:]]


def hot_chat(material: Material, nonce: str, size: int) -> Script:
    """Cold, then again; on by a turn, and that turn once more; with another question in the last one's place."""
    asked = conversation(material, nonce, size)
    reply = yield chat_step(COLD, asked, REPLY)
    for _ in range(EACH):
        yield chat_step(REPEAT, asked, REPLY)
    told = asked
    for turn in range(EACH):
        told = [*told, reply.message(), user(material.text(QUESTION, turn * MESSAGE))]
        reply = yield chat_step(NEXT_TURN, told, REPLY)
        yield chat_step(REGENERATE, told, REPLY)
    # Once only: a server that cannot return to where they part reads all of it again.
    yield chat_step(CHANGED, [*asked[:-1], user(material.text(QUESTION, MESSAGE))], REPLY)
