"""Replies of mlx_lm.server and ours beside each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from servers import (
    user,
)

from mlx_hybridcache.demo.functions import FUNCTIONS

FUNCTION = {function.name: function.declaration() for function in FUNCTIONS}


VOLATILE = {"id", "created", "system_fingerprint", "token"}
"""Random, the clock's, the host's; and `token`, whose spelling is a listed difference."""
ROUNDING = 0 if mx.default_device() == mx.cpu else 1e-2
"""Of log-probabilities: none on the CPU; on Metal the two cut prompts into other shapes."""
CHOSEN = {"id", "token", "logprob"}
"""Beside `top_logprobs` mlx_lm.server tells of any of these, which is a listed difference too."""


def disagreements(theirs: Any, ours: Any, where: str = "") -> Iterator[str]:
    """Fields of mlx_lm.server's reply that ours lacks or fills otherwise. Ours may say more."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        skipped = CHOSEN if "top_logprobs" in theirs else VOLATILE
        for name in theirs.keys() - skipped:
            if name in ours:
                yield from _field_disagreements(name, theirs[name], ours[name], f"{where}.{name}")
            else:
                yield f"{where}.{name} is missing"
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for i, (one, other) in enumerate(zip(theirs, ours, strict=True)):
            yield from disagreements(one, other, f"{where}[{i}]")
    elif isinstance(theirs, float) and isinstance(ours, float):
        if abs(theirs - ours) > ROUNDING:
            yield f"{where}: {theirs!r} there, {ours!r} here"
    elif theirs != ours:
        yield f"{where}: {theirs!r} there, {ours!r} here"


def _field_disagreements(name: str, theirs: Any, ours: Any, where: str) -> Iterator[str]:
    if name == "cached_tokens":
        theirs = max(theirs, ours)  # ours may have found more
    elif name in ("text", "content") and not isinstance(theirs, list):
        theirs, ours = (trimmed(text) for text in (theirs, ours))
    elif name == "arguments":
        theirs, ours = json.loads(theirs), json.loads(ours)
    elif name == "top_logprobs":  # theirs come in no order
        theirs, ours = ({e["id"]: e["logprob"] for e in side} for side in (theirs, ours))
    yield from disagreements(theirs, ours, where)


def trimmed(text: str | None) -> str:
    """Without what the two servers treat differently on purpose: a first space, white space alone."""
    return (text or "").removeprefix(" ") if (text or "").strip() else ""


def essence(choice: dict[str, Any]) -> dict[str, Any]:
    """What a choice says, streamed or not."""
    message = choice.get("message", {})
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return {
        "finish_reason": choice["finish_reason"],
        "text": trimmed(choice.get("text")),
        "content": trimmed(message.get("content")),
        "reasoning": message.get("reasoning") or "",
        "calls": [(call["name"], json.loads(call["arguments"])) for call in calls],
    }


def offering(*names: str, **more: Any) -> dict[str, Any]:
    return {"tools": [FUNCTION[name] for name in names], **more}


CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "find_person", "arguments": '{"person": "Nora"}'},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": '{"room": "attic"}'}
FIRST_TURN = [
    *user("Note that the lamp of Ada is red."),
    {"role": "assistant", "content": "Noted: red."},
]
THOUGHT = {"role": "assistant", "content": "5 + 4 = 9.", "reasoning": "5 plus 4 is 9."}
PARTS = [{"type": "text", "text": "Repeat: piano "}, {"type": "text", "text": "kettle blue"}]
RAW = "The global statement is a declaration which holds for"
