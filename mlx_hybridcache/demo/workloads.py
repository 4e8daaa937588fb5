"""What the demo asks, in order: the ways in which people's prompts change from one call to the next."""

from __future__ import annotations

import pydoc_data.topics
from dataclasses import dataclass
from typing import Any

from ..errors import PromptError

RULES_SHARE = 3, 8
"""Length of the long system prompt as a share of the document's: 1.5K tokens beside 4K."""

LONGER = 500
"""Tokens by which raw text is made longer and shorter."""

LONGEST_TOKEN = 24
"""Characters: so much text is tokenized for each token wanted, and no more of a whole book."""

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Call:
    """One prompt, a chat's messages or raw text, and the name of what is being tried."""

    name: str
    prompt: list[Message] | str


def default_text() -> str:
    """A long real text that comes with Python: its language reference, by topic."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def calls(tokenizer: Any, text: str, tokens: int) -> list[Call]:
    """The demo's calls on a document of about `tokens` tokens cut from `text`.

    The document's own calls first, then the long chat with its long system prompt, then raw text.
    The tokenizer is for measuring only. Raises `PromptError` when the text is too short for that.
    """
    needed = tokens + tokens * RULES_SHARE[0] // RULES_SHARE[1]
    ids = tokenizer.encode(text[: needed * LONGEST_TOKEN], add_special_tokens=False)
    if tokens <= LONGER or len(ids) < needed:
        raise PromptError(
            f"The text has {len(ids):,} tokens; a document of {tokens:,} needs {needed:,} of them, "
            f"and more than {LONGER} itself. Give a longer --file or another --tokens."
        )
    document = tokenizer.decode(ids[:tokens])
    rules = tokenizer.decode(ids[tokens:needed])
    first, second = "What is this text about?", "Name one rule that it states."

    def asked(question: str) -> tuple[str, str]:
        return ("user", f"{document}\n\n{question}")

    def long_chat(last_line: str) -> list[Message]:
        system = ("system", f"{rules}\n\n{last_line}")
        return _chat(system, ("user", document), ("assistant", "I have read it."), ("user", second))

    reply = ("assistant", "It describes how Python works.")
    return [
        Call("one long message", _chat(asked(first))),
        Call("the same again", _chat(asked(first))),
        Call("next turn", _chat(asked(first), reply, ("user", second))),
        Call("changed ending", _chat(asked(second))),
        Call("another branch", _chat(asked(first), reply, ("user", "Say it in one word."))),
        Call("long system prompt", long_chat("Today is Monday.")),
        Call("its last line changed", long_chat("Today is Tuesday.")),
        Call("changed once more", long_chat("Today is Friday.")),
        Call("raw text", document),
        Call("raw text, longer", tokenizer.decode(ids[: tokens + LONGER])),
        Call("raw text, shorter", tokenizer.decode(ids[: tokens - LONGER])),
    ]


def _chat(*messages: tuple[str, str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in messages]
