"""Calls can be forced in every format that mlx-lm reads, and are what mlx-lm reads in them."""

from __future__ import annotations

import json
import random
from collections import Counter
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from mlx_hybridcache_server.adapter import NORMAL, TOOL, Segmenter
from mlx_hybridcache_server.calls.formats import ToolFormat
from mlx_hybridcache_server.calls.incoming import Arguments, Begin
from mlx_hybridcache_server.calls.parts import Parts
from mlx_hybridcache_server.errors import ApiError
from mlx_hybridcache_server.grammar import constrain
from mlx_hybridcache_server.grammar.call_formats import FORMATS
from mlx_hybridcache_server.grammar.compiled import MOST_BYTES
from mlx_hybridcache_server.grammar.constrain import Constraint, Constraints
from mlx_hybridcache_server.grammar.lark import Lark
from mlx_hybridcache_server.prompts.chat import Rendered
from texts.call_families import FAMILIES, Calls, tokenizer_of
from texts.constraints import chat

each_family = pytest.mark.parametrize("name", FAMILIES)

PLAIN: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "share": {"type": "number"},
        "unit": {"type": "string", "enum": ["C", "F", "A & B"]},
        "is_on": {"type": "boolean"},
        "list": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    },
    "required": ["text"],
}
NESTED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "tree": {
            "type": "object",
            "properties": {
                "id": {"type": "integer"},
                "under": {"type": "array", "items": {"$ref": "#/$defs/leaf"}},
            },
            "required": ["id"],
        },
        "any": {"type": "object"},
    },
    "required": ["tree"],
    "$defs": {"leaf": {"type": "object", "properties": {"a": {"type": "boolean"}}}},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": parameters}}
    for name, parameters in (("say", PLAIN), ("grow", NESTED), ("now", None))
]
FINE: Calls = [
    ("say", {"text": "Oslo"}),
    (
        "say",
        {"text": 'He said "no", <b>twice</b> & left: 5 > 3\nthen {came} [back], 中文 \U0001f600'},
    ),
    ("say", {"text": "", "count": 12, "share": -2.5, "unit": "F", "is_on": True}),
    ("say", {"text": "x", "unit": "A & B"}),
    ("say", {"text": "x", "is_on": False, "list": ["a", 'b "c"', "d,e"]}),
    ("now", {}),
    ("grow", {"tree": {"id": 1, "under": [{"a": True}, {}]}, "any": {"k": [1, "two"], "l": {}}}),
    ("grow", {"tree": {"id": -7}}),
]
WRONG: Calls = [
    ("say", {}),
    ("say", {"text": "x", "count": 100}),
    ("say", {"text": "x", "unit": "K"}),
    ("say", {"text": "x", "list": ["1", "2", "3", "4"]}),
    ("say", {"text": "x", "more": 1}),
    ("grow", {"tree": {}}),
    ("grow", {"tree": {"id": 1, "under": [{"a": 1}]}}),
    ("now", {"a": 1}),
    ("gone", {}),
]
UNREAD = {
    "function_gemma": [1, 4, 6, 7],  # it takes the first } for the end, and a comma for another key
    "longcat": [5],  # reads an object, as it was written, but no name alone
}
"""Which of `FINE` mlx-lm's own parser cannot read; this server's reads them all."""


def forced(name: str, **fields: Any) -> Constraint:
    """What a reply may be whose model is of that family, and must call."""
    body = chat(**{"tools": TOOLS, "tool_choice": "required", **fields})
    wanted = Constraints(tokenizer_of(name)).of(body, Rendered([1]))
    assert wanted is not None
    return wanted


def allows(wanted: Constraint, name: str, text: str) -> bool:
    """Whether `text` is a whole reply."""
    tokens = tokenizer_of(name).encode(text, add_special_tokens=False)
    matchers = [matcher.deep_copy() for matcher in wanted.matchers]
    return all(each.consume_tokens(tokens) and each.is_accepting() for each in matchers)


def start_of(name: str) -> str:
    """The state in which a reply begins."""
    return str(tokenizer_of(name).response_initial_state or NORMAL)


def parts(name: str, tools: Any) -> Parts:
    """The server's reader of a reply."""
    tokenizer = tokenizer_of(name)
    markers = tokenizer.tool_call_start, tokenizer.tool_call_end
    return Parts(tokenizer, start_of(name), ToolFormat(*markers, tokenizer.tool_parser, tools))


def read(name: str, text: str, tools: Any) -> Calls:
    """The calls that the server finds in a reply, a character at a time."""
    reader, calls = parts(name, tools), list[list[str]]()
    found = [part for char in text for part in reader.feed(char)]
    for part in [*found, *reader.end(is_whole=True)]:
        if isinstance(part, Begin):
            calls.append([part.name, ""])
        elif isinstance(part, Arguments):
            calls[-1][1] += part.text
    return [(called, json.loads(arguments)) for called, arguments in calls]


def read_by_mlx_lm(name: str, text: str, tools: Any = TOOLS) -> Calls:
    """The calls that mlx-lm's own state machine and parser find."""
    tokenizer = tokenizer_of(name)
    segmenter = Segmenter(tokenizer, start_of(name))
    sections, inside = list[str](), False
    for state, piece in [span for char in text for span in segmenter.feed(char)] + segmenter.end():
        if state == TOOL and not inside:
            sections.append("")
        inside = state == TOOL
        if inside:
            sections[-1] += piece
    calls: Calls = []
    for section in sections:
        found = tokenizer.tool_parser(section, tools)
        for call in found if isinstance(found, list) else [found]:
            calls.append((call["name"], call["arguments"]))
    return calls


def test_every_parser_of_mlx_lm_has_a_format_and_a_family_here():
    """One that is new in mlx-lm fails this, so that someone writes it down."""
    package = import_module("mlx_lm.tool_parsers")
    shipped = {module.name for module in iter_modules(package.__path__)}
    assert FORMATS.keys() == shipped == FAMILIES.keys()


@each_family
def test_mlx_lm_takes_the_family_for_what_it_is(name):
    """By its template, its vocabulary or its configuration."""
    module = import_module(f"mlx_lm.tool_parsers.{name}")
    tokenizer = tokenizer_of(name)
    assert tokenizer.tool_parser is module.parse_tool_call
    assert tokenizer.tool_call_start == module.tool_call_start


@each_family
def test_a_forced_call_is_read_as_it_was_meant(name):
    """By mlx-lm and by this server: quotes, lines, tags, emoji, lists, trees; and nothing that breaks a schema."""
    wanted = forced(name)
    for at, call in enumerate(FINE):
        text = FAMILIES[name].write([call])
        assert allows(wanted, name, text), text
        assert read(name, text, wanted.tools) == [call]
        if at not in UNREAD.get(name, ()):
            assert read_by_mlx_lm(name, text) == [call]
    for call in WRONG:
        assert not allows(wanted, name, FAMILIES[name].write([call])), call
    assert not any(allows(wanted, name, text) for text in ("", "Hello", "{}"))


@each_family
def test_several_calls_or_one(name):
    """In one reply, as the family writes them; one where one was asked for, and only of what was named."""
    two, one = [FINE[0], FINE[2]], [FINE[0]]
    text = FAMILIES[name].write(two)
    wanted = forced(name)
    assert allows(wanted, name, text), text
    assert read(name, text, wanted.tools) == two
    assert read_by_mlx_lm(name, text) == two
    say = {"type": "function", "function": {"name": "say"}}
    for fields in ({"parallel_tool_calls": False}, {"tool_choice": say}):
        single = forced(name, **fields)
        assert allows(single, name, FAMILIES[name].write(one))
        assert not allows(single, name, text)
    named = forced(name, tool_choice=say)
    assert not allows(named, name, FAMILIES[name].write([("now", {})]))


@each_family
def test_a_value_holds_no_marker_of_its_format(name):
    """Neither what ends a call, nor what ends a value, in whatever tokens it is spelled."""
    wanted, end = forced(name), tokenizer_of(name).tool_call_end
    for call in (("say", {"text": f"a{end}b"}), ("say", {"text": "x", "list": [f"a{end}b"]})):
        assert end == "" or not allows(wanted, name, FAMILIES[name].write([call]))


@each_family
def test_arguments_of_a_forced_call_come_as_they_are_written(name):
    """Of 300 words at least 90 are out when 100 are written, behind the call's name."""
    wanted = forced(name)
    text = FAMILIES[name].write([("say", {"text": "word " * 300 + "end"})])
    assert allows(wanted, name, text)
    at = text.index("word ") + len("word " * 100)
    found = parts(name, wanted.tools).feed(text[:at])
    assert next(part.name for part in found if isinstance(part, Begin)) == "say"
    assert "".join(e.text for e in found if isinstance(e, Arguments)).count("word") >= 90


SHORT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "unit": {"type": "string", "enum": ["C", "F", "two words"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "is_on": {"type": "boolean"},
        "list": {"type": "array", "items": {"enum": [1, 2.5, "x", True]}, "maxItems": 3},
    },
    "required": ["days"],
}


@each_family
def test_whatever_the_grammar_lets_through_is_a_call_that_obeys_its_schema(name):
    """Twelve replies of tokens drawn at random among those allowed: read alike by mlx-lm, and by the schema."""
    tools = [{"type": "function", "function": {"name": "set", "parameters": SHORT}}]
    wanted = forced(name, tools=tools, parallel_tool_calls=False)
    for seed in range(12):
        text = drawn(name, wanted, random.Random(seed))
        ((called, arguments),) = read(name, text, wanted.tools)
        assert called == "set", text
        jsonschema.validate(arguments, SHORT)
        if name not in UNREAD or "list" not in arguments:
            assert read_by_mlx_lm(name, text, tools) == [("set", arguments)], text


def drawn(name: str, wanted: Constraint, draw: random.Random) -> str:
    """A reply; markers are likely where they may stand, so that free text ends."""
    tokenizer, ends = tokenizer_of(name), tokenizer_of(name).eos_token_ids
    guide = [matcher.deep_copy() for matcher in wanted.matchers]
    tokens: list[int] = []
    while len(tokens) < 2000:
        mask = np.full((1, (wanted.vocabulary.vocab_size + 31) // 32), -1, dtype=np.int32)
        for matcher in guide:
            own = allocate_token_bitmask(1, wanted.vocabulary.vocab_size)
            fill_next_token_bitmask(matcher, own)
            mask &= own
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        markers = [token for token in allowed if token > 3065]
        token = draw.choice(markers if markers and draw.random() < 0.7 else allowed)
        if token in ends:
            break
        assert all(matcher.consume_token(token) for matcher in guide)
        tokens.append(token)
    return str(tokenizer.decode(tokens))


@pytest.mark.parametrize(
    ("name", "called", "parameter"),
    [
        ("pythonic", "say-it", "a"),
        ("pythonic", "say", "from"),
        ("gemma4", "say", "a b"),
        ("function_gemma", "a.b", "a"),
        ("minimax_m2", "say", 'a"b'),
        ("glm47", "say", "<b>"),
    ],
)
def test_a_name_that_a_format_cannot_write_is_refused_by_name(name, called, parameter):
    """Rather than a call that nobody can read."""
    schema = {"type": "object", "properties": {parameter: {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": called, "parameters": schema}}]
    with pytest.raises(ApiError, match="no way to write the name"):
        forced(name, tools=tools)


@pytest.mark.parametrize("keyword", ["pattern", "format", "not"])
def test_what_gemmas_values_cannot_be_held_to_is_refused_by_name(keyword):
    """Of a tool that must be called; one of several is held to the rest, and the client is told."""
    schema = {"type": "object", "properties": {"a": {"type": "string", keyword: "date"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    with pytest.raises(ApiError, match=keyword):
        forced("gemma4", tools=tools)
    body = chat(tools=[*tools, *TOOLS], tool_choice="required")
    assert Constraints(tokenizer_of("gemma4")).of(body, Rendered([1])) is not None
    assert any(keyword in warning for warning in body.warnings)


@each_family
@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": [["string"]]}}},
        {"properties": {"a": {"anyOf": 5}}},
        {"properties": {"a": {"type": "array", "minItems": "x"}}},
    ],
    ids=["type", "anyOf", "minItems"],
)
def test_what_no_grammar_can_be_made_of_is_refused_with_a_sentence(name, schema):
    """Of keywords of wrong types some formats' grammars make nothing, and some pass over them."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    body = chat(tools=tools, tool_choice="required")
    refused = None
    try:
        Constraints(tokenizer_of(name)).of(body, Rendered(np.array([1]), NORMAL))
    except ApiError as error:
        refused = error
    assert refused is None or (refused.status_code, str(refused.detail)[-1]) == (400, ".")


def test_no_grammar_is_read_that_is_too_large_to_be_compiled(monkeypatch):
    """Not even to find out what is wrong with a tool: the bound holds wherever a grammar is read."""
    read = []

    class Reader:
        @staticmethod
        def validate_grammar(grammar, vocabulary):
            read.append(len(grammar))
            return LLMatcher.validate_grammar(grammar, vocabulary)

    schema = {"properties": {f"p{k}": {"type": "string"} for k in range(40)}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    body = chat(tools=tools, tool_choice="required")
    constraints = Constraints(tokenizer_of("gemma4"))
    monkeypatch.setattr(constrain, "LLMatcher", Reader)
    monkeypatch.setattr(constrain, "MOST_BYTES", 500)
    with pytest.raises(ApiError, match="at most 500 are compiled"):
        constraints.of(body, Rendered(np.array([1]), NORMAL))
    assert all(nbytes <= 500 for nbytes in read)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_grammar_is_written_no_further_than_it_would_be_compiled(name, monkeypatch):
    """10,000 parameters, all required: each writing of a grammar ends behind its first 128 KiB, so that as
    many parameters as fit are looked at, and no marker is read twice.
    """
    sizes, defined, markers = [], Lark._add, Counter()

    def watched(lark, line):
        sizes.append(lark.nbytes)
        defined(lark, line)

    tokenizer = tokenizer_of(name)
    constraints, encode = Constraints(tokenizer), Constraints._token_of
    monkeypatch.setattr(Lark, "_add", watched)
    monkeypatch.setattr(
        Constraints, "_token_of", lambda own, text: (markers.update([text]), encode(own, text))[1]
    )
    names = {f"p{at}": {"type": "integer"} for at in range(10_000)}
    parameters = {"type": "object", "properties": names, "required": [*names]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    with pytest.raises(ApiError, match=r"more than 131,072|at most|too many"):
        constraints.of(chat(tools=tools, tool_choice="required"), Rendered(np.array([1]), NORMAL))
    assert max(sizes) <= MOST_BYTES
    assert len(sizes) < 3 * 10_000
    assert max(markers.values(), default=1) == 1


def test_a_tool_that_is_nested_too_deeply_is_refused_with_a_sentence():
    schema = {}
    for _ in range(900):
        schema = {"type": "object", "properties": {"a": schema}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    with pytest.raises(ApiError, match="nested too deeply"):
        Constraints(tokenizer_of("json_tools")).of(
            chat(tools=tools, tool_choice="required"), Rendered(np.array([1]), NORMAL)
        )
