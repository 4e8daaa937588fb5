"""An explanation as people read it."""

from __future__ import annotations

from typing import Any

from ...errors import printable

LETTERS = 60
"""Of each text that is shown."""


def written(found: dict[str, Any]) -> str:
    """All of it as lines, of which none moves a terminal's cursor: names of tools are anybody's."""
    lines = [*_what(found), *_letters(found), "", *_cost(found), "", *_advice(found)]
    return "\n".join(map(printable, lines))


def _what(found: dict[str, Any]) -> list[str]:
    kind = f" [{found['change']}]" if found["change"] else ""
    where = f"Where: {found['where']}, token {found['common_tokens']:,}"
    return [f"{found['sentence']}{kind}", *([where] if found["where"] else [])]


def _letters(found: dict[str, Any]) -> list[str]:
    if found["is_hot"]:
        return []
    text = found["text"]
    before = repr(text["before"][-LETTERS:])[1:-1]
    shown = [name for name in ("first", "second", "asked", "stored") if text.get(name) is not None]
    lines = [f"  behind    ...{before}"]
    lines += [f"  {name:<9} {repr(text[name][:LETTERS])[1:-1]}..." for name in shown]
    if "stored" in text and text["stored"] is None and found["change"]:
        lines.append("  stored    (shown with --show-prompts, or to requests with a cache_salt)")
    return lines


def _cost(found: dict[str, Any]) -> list[str]:
    rows = [
        ("tokens in the prompt", "prompt_tokens", None),
        ("known up to there", "common_tokens", None),
        ("restored", "restored_tokens", None),
        ("read again", "again_tokens", "again_seconds"),
        ("new", "new_tokens", None),
    ]
    lines = []
    for name, tokens, seconds in rows:
        took = "" if seconds is None or found[seconds] is None else f"  {found[seconds]:.3g} s"
        lines.append(f"{found[tokens]:>12,}  {name}{took}")
    speed = found["tokens_per_second"]
    said = (
        "unknown"
        if speed is None
        else f"{speed:,.0f} tokens a second, as its last requests were read"
    )
    return [*lines, f"Speed of this machine: {said}.", found["assumed"]]


def _advice(found: dict[str, Any]) -> list[str]:
    lines = [f"What to do: {found['advice']}"]
    lines += [f"Also: {each['change']} at {each['where']}" for each in found["also"]]
    return lines
