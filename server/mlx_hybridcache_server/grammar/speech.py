"""How a model marks the parts of its replies, and what is wanted of one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .narrowing import Schema

Reasoning = Literal["none", "possible", "open"]
Layout = Literal["plain", "sections", "messages"]
"""Of a reply: parts between markers; sections that Kimi K3 names; messages with headers, as Muse Spark's."""
Tool = dict[str, Any]


class GrammarError(ValueError):
    """What is asked for has no grammar here."""


@dataclass(frozen=True, slots=True)
class Speech:
    """How a model marks the parts of its replies; None for a part that it does not have.

    `parser` names mlx-lm's parser of its calls. `token_of` gives a marker that is not plain text to
    the tokenizer as a Lark expression of tokens. `has_headers`: Mistral's newer form of calls.
    """

    think_start: str | None
    think_end: str | None
    call_start: str | None
    call_end: str | None
    parser: str | None
    token_of: Callable[[str], str | None]
    has_headers: bool = False
    layout: Layout = "plain"

    def call_token(self) -> int | None:
        """The token that begins a call, if a single one does and nothing else."""
        token = self.token_of(self.call_start) if self.call_start else None
        found = re.fullmatch(r"<\[(\d+)\]>", token or "")
        return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class Wanted:
    """JSON by a schema, calls of tools, or, with both, either; with `is_free` any text beside calls.

    `is_plain` is a text without parts, as `/v1/completions` gives it. Of the `lenient` tools what no
    grammar can say is left out.
    """

    schema: Schema | None = None
    tools: Sequence[Tool] = ()
    most_calls: int | None = None
    reasoning: Reasoning = "none"
    is_plain: bool = False
    is_free: bool = False
    lenient: frozenset[str] = frozenset()


def name_of(tool: Tool) -> str:
    """What it is called by."""
    return str(tool["function"]["name"])


def parameters_of(tool: Tool) -> Schema:
    """A tool's parameters as the schema of an object; without any it takes none."""
    parameters, name = tool["function"].get("parameters"), name_of(tool)
    if parameters is None:
        return {"type": "object", "properties": {}}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise GrammarError(f"The parameters of {name} must be the schema of an object.")
    if not isinstance(parameters.get("properties", {}), dict):
        raise GrammarError(f"The properties of {name} must be an object.")
    required = parameters.get("required", [])
    if not isinstance(required, list) or not all(isinstance(each, str) for each in required):
        raise GrammarError(f"What is required of {name} must be a list of names.")
    return {"type": "object", **parameters}
