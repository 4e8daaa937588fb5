"""One prompt beside what is stored: where they part, and what stands there."""

from __future__ import annotations

from typing import Any

from mlx_hybridcache import CacheReport
from mlx_hybridcache.tokens import Tokens

from ..generation.models import Loaded
from ..prompts.messages import SYSTEM
from ..schema.requests import ChatBody
from .asked import Asked
from .comparison import Cause, around
from .differences import Where
from .kinds import Kind
from .nearest import stored_behind
from .places import place
from .texts import kind_between

LEAST = 8
"""Tokens that a prompt has in common with whatever is stored: a template's opener, a first word."""


def parting(
    asked: Asked, tokens: Tokens, report: CacheReport, loaded: Loaded
) -> tuple[Cause | None, dict[str, str | None]]:
    """What parts a prompt from what is stored for its own salt, and the letters there; none where nothing is.

    Not for the event loop.
    """
    at, stored = stored_behind(loaded.cache, asked.cache_salt, tokens)
    at = max(at, report.matched_tokens)
    text: dict[str, Any] = around(loaded.tokenizer, tokens, at, asked=tokens[at:], stored=stored)
    if at < LEAST:
        return None, {**text, "stored": None}
    if at >= len(tokens) - 1:
        return Cause(Kind.SAME), {**text, "stored": None}
    if not len(stored):
        return Cause(Kind.APPENDED), {**text, "stored": None}
    where = _where(asked, tokens, at, loaded)
    texts = [text["before"] + text[name] for name in ("asked", "stored")]
    kind = kind_between(*texts) or _kind_at(where)
    return Cause(kind, where), text


def _where(asked: Asked, tokens: Tokens, at: int, loaded: Loaded) -> Where | None:
    if not isinstance(asked, ChatBody):
        return Where("prompt")
    prompt, before = (str(loaded.tokenizer.decode(each.tolist())) for each in (tokens, tokens[:at]))
    return place(asked, prompt, len(before))


def _kind_at(where: Where | None) -> Kind:
    if where is None:
        return Kind.UNKNOWN
    if where.part == "tools":
        return Kind.TOOL_EDITED
    if where.part == "prompt":
        return Kind.PROMPT_EDITED
    if where.name in SYSTEM:
        return Kind.SYSTEM_EDITED
    return Kind.RESULT_EDITED if where.name == "tool" else Kind.BRANCHED
