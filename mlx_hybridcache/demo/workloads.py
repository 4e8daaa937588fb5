"""What the demo asks, in order: the ways in which people's prompts change from one call to the next."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Call:
    """One prompt, as token ids, and the name of what is being tried."""

    name: str
    prompt: list[int]


def default_text() -> str:
    """A long real text that comes with Python: its language reference, by topic."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def calls(tokenizer: Any, text: str, tokens: int) -> list[Call]:
    """The demo's calls on a document of about `tokens` tokens cut from `text`.

    The document's own calls first, then the long chat with its long system prompt, then raw text.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    document = tokenizer.decode(ids[:tokens])
    rules = tokenizer.decode(ids[tokens : tokens + 1500])
    first, second = "What is this text about?", "Name one rule that it states."

    def chat(*messages: tuple[str, str], tail: bool = True) -> list[int]:
        rendered = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=tail,
        )
        return list(tokenizer.encode(rendered, add_special_tokens=False))

    def asked(question: str) -> tuple[str, str]:
        return ("user", f"{document}\n\n{question}")

    def long_chat(last_line: str) -> list[int]:
        system = ("system", f"{rules}\n\n{last_line}")
        return chat(system, ("user", document), ("assistant", "I have read it."), ("user", second))

    reply = ("assistant", "It describes how Python works.")
    return [
        Call("one long message", chat(asked(first))),
        Call("the same again", chat(asked(first))),
        Call("next turn", chat(asked(first), reply, ("user", second))),
        Call("changed ending", chat(asked(second))),
        Call("another branch", chat(asked(first), reply, ("user", "Say it in one word."))),
        Call("long system prompt", long_chat("Today is Monday.")),
        Call("its last line changed", long_chat("Today is Tuesday.")),
        Call("changed once more", long_chat("Today is Friday.")),
        Call("raw text", ids[:tokens]),
        Call("raw text, longer", ids[: tokens + 500]),
        Call("raw text, shorter", ids[: tokens - 500]),
    ]


def needs(calls: Sequence[Call]) -> int:
    """The longest prompt among `calls`, in tokens."""
    return max(len(call.prompt) for call in calls)
