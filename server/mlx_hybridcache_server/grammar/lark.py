"""What a reply may be, written in llguidance's dialect of Lark. Text in, text out: nothing is compiled."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .narrowing import Schema, closed, without_notes

WHITESPACE = r" |\n[ \t]{0,32}"
"""Between the parts of a JSON text, once: JSON allows any, and a weak model would never end it."""

FORMATS = ("json_tools", "qwen3_coder", "mistral")
"""mlx-lm's parsers in whose formats calls are written here."""

Reasoning = Literal["none", "possible", "open"]
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


def written(speech: Speech, wanted: Wanted) -> tuple[str, ...]:
    """The grammars that all must allow a reply. Raises `GrammarError`.

    The first is what is asked for. mlx-lm finds the parts of a reply by their markers, wherever they
    stand, and a JSON string may hold any text; so the second one keeps markers out of values.
    """
    grammars = [_Writer(speech, is_exact=True).write(wanted)]
    if not wanted.is_plain and (speech.think_start or speech.call_start):
        grammars.append(_Writer(speech, is_exact=False).write(wanted))
    return tuple(grammars)


def for_parser(speech: Speech, tools: Sequence[Tool]) -> list[Tool]:
    """`tools` as the reader of calls must see them to read calls back as they were written here."""
    if speech.parser != "qwen3_coder":
        return list(tools)
    # Without a type a value is read as JSON of any kind.
    return [
        {
            "type": "function",
            "function": {
                "name": tool["function"]["name"],
                "parameters": {
                    "properties": {
                        name: {} if _bare(schema) is None else {"type": "string"}
                        for name, schema in _parameters(tool).get("properties", {}).items()
                    }
                },
            },
        }
        for tool in tools
    ]


class _Writer:
    """Writes one grammar: the one that was asked for, or the one that keeps markers out."""

    def __init__(self, speech: Speech, *, is_exact: bool):
        self._speech = speech
        self._is_exact = is_exact
        self._lenient = frozenset[str]()
        # Where only one text can follow, llguidance would allow only the tokens that its tokenizer
        # makes of it: those of a marker for its text in a string, and others in either grammar.
        self._lines = ['%llguidance {"no_forcing": true}', r"SPACE: /[ \n]{1,4}/"]

    def write(self, wanted: Wanted) -> str:
        self._lenient = wanted.lenient
        if wanted.is_free:
            return "\n".join([f"start: {self._freely(wanted)}", *self._lines, ""])
        bodies = []
        if wanted.schema is not None:
            bodies.append(self._json_reply(wanted.schema))
        if wanted.tools:
            bodies.append(self._calls(wanted.tools, wanted.most_calls))
        lead = self._reasoning(wanted.reasoning)
        return "\n".join([f"start: {lead} ({' | '.join(bodies)})", *self._lines, ""])

    # Parts

    def _reasoning(self, reasoning: Reasoning) -> str:
        speech = self._speech
        if reasoning == "none" or speech.think_start is None or speech.think_end is None:
            return ""
        # mlx-lm's state machine leaves reasoning for a call, too.
        thought = f"{self._until(speech.think_end, speech.call_start)} SPACE?"
        return (
            thought if reasoning == "open" else f"({self._marker(speech.think_start)} {thought})?"
        )

    def _freely(self, wanted: Wanted) -> str:
        """Any tokens but the one that begins a call, and calls."""
        start = self._speech.call_token()
        if start is None:
            raise GrammarError("The calls of this model are not begun by a token of their own.")
        free, calls = f"<[^{start}]>", self._rule(self._calls(wanted.tools, wanted.most_calls))
        if wanted.most_calls == 1 or not self._speech.call_end:
            return f"{free}* {calls}?"
        return f"({free} | {calls})*"

    def _json_reply(self, schema: Schema) -> str:
        if self._is_exact:
            return self._json(closed(schema))
        return self._free(self._speech.think_start, self._speech.call_start)

    def _calls(self, tools: Sequence[Tool], most: int | None) -> str:
        speech = self._speech
        if speech.call_start is None:
            raise GrammarError("This model's tokenizer has no format for tool calls.")
        if speech.parser not in FORMATS:
            raise GrammarError(
                f"Calls cannot be forced in the format of this model's tool parser, {speech.parser}; "
                f"they can in those of {', '.join(FORMATS)}."
            )
        forms = (self._json_tools, self._xml, self._mistral)
        return dict(zip(FORMATS, forms, strict=True))[speech.parser](tools, most)

    def _several(self, call: str, most: int | None) -> str:
        rule = self._rule(call)
        return rule if most == 1 else f"{rule} (SPACE? {rule})*"

    # Formats of calls

    def _json_tools(self, tools: Sequence[Tool], most: int | None) -> str:
        """`{"name": ..., "arguments": {...}}` between the markers."""
        start, end = self._markers()
        if not self._is_exact:
            return self._several(f"{start} {self._until(end)}", most)
        calls = " | ".join(map(self._object_call, tools))
        return self._several(f"{start} SPACE? ({calls}) SPACE? {self._marker(end)}", most)

    def _mistral(self, tools: Sequence[Tool], most: int | None) -> str:
        """`[{...}, {...}]` or `name[ARGS]{...}` behind a marker; nothing ends the calls."""
        start, _ = self._markers()
        if not self._is_exact:
            return f"{start} (/(?s:.+)/ | <[*]>)*"
        if self._speech.has_headers:
            calls = " | ".join(
                f"{_literal(_name(tool))} {self._marker('[ARGS]')} {self._arguments(tool)}"
                for tool in tools
            )
            return self._several(f"{start} ({calls})", most)
        call = self._rule(" | ".join(map(self._object_call, tools)))
        more = "" if most == 1 else f" (/, ?/ {call})*"
        return f'{start} SPACE? "[" {call}{more} "]"'

    def _xml(self, tools: Sequence[Tool], most: int | None) -> str:
        """`<function=name>`, `<parameter=name>` and the value, each on lines of their own."""
        start, end = self._markers()
        calls = " | ".join(self._xml_call(tool, end) for tool in tools)
        return self._several(f"{start} ({calls}) {self._marker(end)}", most)

    def _xml_call(self, tool: Tool, end: str) -> str:
        parameters = _parameters(tool)
        known = {"type", "properties", "required", "additionalProperties", "title", "description"}
        extra = parameters.keys() - known - {"$defs", "definitions", "$schema", "$id", "strict"}
        required = parameters.get("required") or []
        names = parameters.get("properties") or {}
        unnamed = [name for name in required if name not in names]
        is_lenient = _name(tool) in self._lenient
        if (extra and not is_lenient) or unnamed:
            raise GrammarError(
                f"The parameters of {_name(tool)} have {', '.join(map(repr, [*sorted(extra), *unnamed]))}, "
                "which this model's format of calls, a list of named values, has no place for."
            )
        shared: Schema = {k: parameters[k] for k in ("$defs", "definitions") if k in parameters}
        parts = [_literal(f"\n<function={_bare_name(_name(tool))}>\n")]
        for name, schema in names.items():
            value = self._xml_value(schema, shared, end, is_lenient=is_lenient)
            part = f"{_literal(f'<parameter={_bare_name(name)}>' + chr(10))} {value}"
            parts.append(part if name in required else f"({part})?")
        return " ".join([*parts, _literal("</function>\n")])

    def _xml_value(self, schema: Any, shared: Schema, end: str, *, is_lenient: bool) -> str:
        close = "\n</parameter>\n"
        if not isinstance(schema, dict):
            schema = {} if schema else {"enum": []}
        bare = _bare(schema)
        if self._is_exact and bare is None:
            value = self._json(closed({**schema, **shared}), is_lenient=is_lenient)
            return f"{value} {_literal(close)}"
        if self._is_exact and bare:
            return f"({' | '.join(_literal(each + close) for each in bare)})"
        free = self._free("</parameter>", "</function>", end)
        return self._lazy(f"{free} {_literal(close)}")

    def _object_call(self, tool: Tool) -> str:
        name = _pattern(json.dumps(_name(tool), ensure_ascii=False))
        return rf'/\{{"name": ?{name}, ?"arguments": ?/ {self._arguments(tool)} "}}"'

    def _arguments(self, tool: Tool) -> str:
        is_lenient = _name(tool) in self._lenient
        return self._json(closed(_parameters(tool)), is_lenient=is_lenient)

    def _markers(self) -> tuple[str, str]:
        speech = self._speech
        assert speech.call_start is not None
        return self._marker(speech.call_start), speech.call_end or ""

    # Pieces of Lark

    def _json(self, schema: Schema, *, is_lenient: bool = False) -> str:
        options = {"whitespace_pattern": WHITESPACE, **({"lenient": True} if is_lenient else {})}
        return self._rule(f"%json {json.dumps({**without_notes(schema), 'x-guidance': options})}")

    def _marker(self, text: str) -> str:
        return self._speech.token_of(text) or _literal(text)

    def _free(self, *without: str | None) -> str:
        """Any text that holds none of these, an empty one included."""
        held = "|".join(_pattern(text) for text in without if text)
        return self._terminal(f"/(?s:.*)/ & ~/(?s:.*)({held})(?s:.*)/" if held else "/(?s:.*)/")

    def _until(self, marker: str, *without: str | None) -> str:
        """Any text without these, and the marker that ends it."""
        free, token = self._free(marker, *without), self._speech.token_of(marker)
        return f"{free} {token}" if token else self._lazy(f"{free} {_literal(marker)}")

    def _terminal(self, body: str) -> str:
        return self._define(f"T{len(self._lines)}", body)

    def _rule(self, body: str) -> str:
        return self._define(f"r{len(self._lines)}", body)

    def _lazy(self, body: str) -> str:
        """A text that ends as soon as it can."""
        terminal, name = self._terminal(body), f"r{len(self._lines)}"
        self._lines.append(f"{name}[lazy]: {terminal}")
        return name

    def _define(self, name: str, body: str) -> str:
        self._lines.append(f"{name}: {body}")
        return name


def _name(tool: Tool) -> str:
    return str(tool["function"]["name"])


def _parameters(tool: Tool) -> Schema:
    """A tool's parameters as the schema of an object; without any it takes none."""
    parameters = tool["function"].get("parameters")
    if parameters is None:
        return {"type": "object", "properties": {}}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise GrammarError(f"The parameters of {_name(tool)} must be the schema of an object.")
    if not isinstance(parameters.get("properties", {}), dict):
        raise GrammarError(f"The properties of {_name(tool)} must be an object.")
    required = parameters.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise GrammarError(f"What is required of {_name(tool)} must be a list of names.")
    return {"type": "object", **parameters}


def _bare(schema: Any) -> list[str] | None:
    """The texts that a parameter can be, none for any; None when its value is written as JSON."""
    notes = {"type", "title", "description", "default", "examples", "enum"}
    if not isinstance(schema, dict) or schema.get("type") != "string" or schema.keys() - notes:
        return None
    if "enum" not in schema:
        return []
    texts = schema["enum"]
    is_plain = isinstance(texts, list) and all(
        isinstance(text, str) and re.fullmatch(r"[^<>\n]+", text) for text in texts
    )
    return texts or None if is_plain else None


def _bare_name(name: str) -> str:
    if not re.fullmatch(r"[^\s<>]+", name):
        raise GrammarError(f"This model's format of calls has no way to write the name {name!r}.")
    return name


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _pattern(text: str) -> str:
    """A text as part of a Lark regular expression."""
    return "".join(rf"\x{ord(c):02x}" if c < " " else _escaped(c) for c in text)


def _escaped(char: str) -> str:
    # Not re.escape: what it does to < and a space means something else here.
    return f"\\{char}" if char in r"\.+*?()|[]{}^$#&-~/" else char
