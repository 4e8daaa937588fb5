"""Constraints of the bundled tokenizer, and what they allow."""

from __future__ import annotations

import json
import random
from typing import Any

import mlx.core as mx
import numpy as np
from bundled import load
from mlx_hybridcache_server.adapter import NORMAL
from mlx_hybridcache_server.calls.formats import ToolFormat
from mlx_hybridcache_server.calls.incoming import Arguments, Begin
from mlx_hybridcache_server.calls.parts import Parts
from mlx_hybridcache_server.grammar import constrain
from mlx_hybridcache_server.grammar.constrain import Constraints
from mlx_hybridcache_server.prompts.chat import Rendered
from mlx_hybridcache_server.schema.requests import ChatBody, CompletionBody
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools, mistral, qwen3_coder
from servers import user

PARSERS = {"json_tools": json_tools, "mistral": mistral, "qwen3_coder": qwen3_coder}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 12},
                    "unit": {"enum": ["C", "F"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 14},
                },
                "required": ["city", "unit"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
    {
        "type": "function",
        "function": {
            "name": "book",
            "parameters": {
                "type": "object",
                "properties": {
                    "who": {"type": "string", "enum": ["Maya", "Zoe"]},
                    "seats": {
                        "type": "array",
                        "items": {"$ref": "#/$defs/seat"},
                        "minItems": 1,
                        "maxItems": 2,
                    },
                    "note": {"anyOf": [{"type": "string", "maxLength": 6}, {"type": "null"}]},
                },
                "required": ["who", "seats"],
                "$defs": {"seat": {"type": "string", "pattern": "^[A-F][1-9]$"}},
            },
        },
    },
]
PARAMETERS = {
    tool["function"]["name"]: tool["function"].get("parameters", {"additionalProperties": False})
    for tool in TOOLS
}


def by_schema(schema: Any, name: str = "answer") -> dict[str, Any]:
    """The response_format that asks for JSON by `schema`."""
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


def spoken(parser: str) -> Constraints:
    """Constraints of the bundled tokenizer, as if its model wrote calls in `parser`'s format."""
    _, tokenizer = load()
    module = PARSERS[parser]
    return Constraints(
        TokenizerWrapper(
            tokenizer._tokenizer,
            eos_token_ids=tokenizer.eos_token_ids,
            tool_call_start=module.tool_call_start,
            tool_call_end=module.tool_call_end,
            tool_parser=module.parse_tool_call,
        )
    )


OWN = spoken("json_tools")


def chat(**fields: Any) -> ChatBody:
    """A chat request."""
    return ChatBody.model_validate({"messages": user("Hello"), **fields})


def made(
    body: ChatBody | CompletionBody,
    constraints: Constraints = OWN,
    *,
    state: str = NORMAL,
    may_reason: bool = False,
) -> constrain.Constraint:
    """What `body` asks for."""
    constraint = constraints.of(body, Rendered([1], state, may_reason))
    assert constraint is not None
    return constraint


def allows(constraint: constrain.Constraint, text: str) -> bool:
    """Whether `text` is a whole reply."""
    _, tokenizer = load()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    matchers = [matcher.deep_copy() for matcher in constraint.matchers]
    return all(each.consume_tokens(tokens) and each.is_accepting() for each in matchers)


def spelled(text: str) -> list[int]:
    """The tokens of each character on its own."""
    return [token for char in text for token in tokens_of(char)]


CALLS = [
    ("get_weather", {"city": "Oslo", "unit": "C", "days": 3}),
    ("get_weather", {"city": "", "unit": "F"}),
    ("now", {}),
    ("book", {"who": "Zoe", "seats": ["A1", "F9"], "note": None}),
    ("book", {"who": "Maya", "seats": ["B2"], "note": "null"}),
]
WRONG = [
    ("get_weather", {"city": "Oslo"}),
    ("get_weather", {"city": "Oslo", "unit": "K"}),
    ("get_weather", {"city": "Oslo", "unit": "C", "days": 15}),
    ("now", {"a": 1}),
    ("book", {"who": "Ann", "seats": ["A1"]}),
    ("gone", {}),
]


def said_as(parser: str, name: str, arguments: dict[str, Any]) -> str:
    """A call as a model of that format writes it."""
    if parser == "mistral":
        return f"[TOOL_CALLS][{json.dumps({'name': name, 'arguments': arguments})}]"
    if parser == "json_tools":
        call = json.dumps({"name": name, "arguments": arguments})
        return f"<tool_call>\n{call}\n</tool_call>"
    bare = {"who", "plain"}
    values = "".join(
        f"<parameter={key}>\n{value if key in bare else json.dumps(value)}\n</parameter>\n"
        for key, value in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def among(*names: str, mode: str = "auto") -> dict[str, Any]:
    """A tool_choice among these."""
    named = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}


def read_back(parser: str, text: str, tools: Any) -> list[tuple[str, Any]]:
    """The calls that the server finds in a reply of one."""
    module = PARSERS[parser]
    form = ToolFormat(module.tool_call_start, module.tool_call_end, module.parse_tool_call, tools)
    parts = Parts(spoken(parser).tokenizer, NORMAL, form)
    calls: list[list[str]] = []
    for part in [*parts.feed(text), *parts.end(is_whole=True)]:
        if isinstance(part, Begin):
            calls.append([part.name, ""])
        elif isinstance(part, Arguments):
            calls[-1][1] += part.text
    return [(name, json.loads(arguments)) for name, arguments in calls]


def allowed(guide: constrain.Guide, tokens: list[int], rows: int = 3100) -> set[int]:
    """What may come behind `tokens`."""
    row = np.array(guide(mx.array(tokens), mx.zeros((1, rows)))[0])
    return set(np.flatnonzero(row == 0).tolist())


def tokens_of(text: str) -> list[int]:
    """Its tokens."""
    _, tokenizer = load()
    return list(tokenizer.encode(text, add_special_tokens=False))


def a_schema(draw: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose texts are short."""
    kinds = ["enum", "const", "integer", "number", "boolean", "null", "pattern", "length"]
    kind = draw.choice(kinds + ["object", "array", "either"] * 2 * (depth > 0))
    if kind == "enum":
        return {"enum": draw.sample(["red", "Maya", 7, 2.5, None, True, "é\n", [1]], 3)}
    if kind == "const":
        return {"const": draw.choice(["x", 3, {"k": [None]}, "</b>"])}
    if kind in ("integer", "number"):
        least = draw.randrange(-50, 50)
        bounds = {"minimum": least, "maximum": least + draw.randrange(1, 500)}
        return {"type": kind, **bounds, **({"multipleOf": 0.25} if kind == "number" else {})}
    if kind == "pattern":
        patterns = ["^[a-z]{2,5}$", "^(a|bc)+-[0-9]{3}$", "^[A-Z][a-z]{1,6}$", r"^\d{4}-\d{2}$"]
        return {"type": "string", "pattern": draw.choice(patterns), "maxLength": 12}
    if kind == "length":
        return {
            "type": "string",
            "minLength": draw.randrange(3),
            "maxLength": draw.randrange(3, 12),
        }
    if kind == "object":
        names = draw.sample(["name", "age", "tags", "x y", "é", "ok"], draw.randrange(1, 4))
        return {
            "type": "object",
            "properties": {name: a_schema(draw, depth - 1) for name in names},
            "required": [name for name in names if draw.random() < 0.6],
            **({"additionalProperties": False} if draw.random() < 0.5 else {}),
        }
    if kind == "array":
        return {
            "type": "array",
            "items": a_schema(draw, depth - 1),
            "maxItems": draw.randrange(1, 4),
        }
    if kind == "either":
        return {"anyOf": [a_schema(draw, depth - 1), {"type": "null"}]}
    return {"type": kind}
