"""Calls as models write them, read character by character: exact, by the schema, never lost, never invented."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pkgutil import iter_modules

import pytest
from mlx_hybridcache_server.calls.argument_types import offered
from mlx_hybridcache_server.calls.formats import FORMATS
from mlx_hybridcache_server.calls.incoming import Arguments, Begin, Text
from mlx_hybridcache_server.calls.section import Section

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "count": {"type": "integer"},
                    "data": {"type": "object"},
                    "note": {"type": ["string", "null"]},
                },
                "required": ["text"],
            },
        },
    },
    {"type": "function", "function": {"name": "g"}},
]
VALUES = {
    "text": ' a\n\n"q" <b> & \\d ü null\t',
    "count": 2**63 + 1,
    "data": {"k": [1, 2.5, None, "é"]},
    "note": None,
}


def markup(call, parameter, end=""):
    """Writes calls with tags."""

    def write(name, values):
        each = (parameter(k, v if isinstance(v, str) else json.dumps(v)) for k, v in values.items())
        return call(name) + "".join(each) + end

    return write


def in_cdata(value):
    """As MiniCPM5 writes what is no plain word."""
    return f"<![CDATA[{value}]]>" if set(value) & set("<&\n") else value


def gemma(value, mark):
    """As Gemma's templates write values."""
    if isinstance(value, dict):
        return "{%s}" % ",".join(f"{k}:{gemma(v, mark)}" for k, v in value.items())  # noqa: UP031
    if isinstance(value, list):
        return f"[{','.join(gemma(v, mark) for v in value)}]"
    return f"{mark}{value}{mark}" if isinstance(value, str) else json.dumps(value)


WRITERS = {
    "json_tools": lambda name, values: f"\n{json.dumps({'name': name, 'arguments': values})}\n",
    "mistral": lambda name, values: f"{name}[ARGS]{json.dumps(values)}",
    "kimi_k2": lambda name, values: (
        f"<|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>"
        f"{json.dumps(values)}<|tool_call_end|>"
    ),
    "glm47": markup(
        lambda name: f"{name}\n",
        lambda k, v: f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n",
    ),
    "longcat": markup(
        lambda name: f"{name}\n",
        lambda k, v: (
            f"<longcat_arg_key>{k}</longcat_arg_key>\n<longcat_arg_value>{v}</longcat_arg_value>\n"
        ),
    ),
    "minicpm5": markup(
        lambda name: f'"{name}">', lambda k, v: f'<param name="{k}">{in_cdata(v)}</param>'
    ),
    "minimax_m2": markup(
        lambda name: f'\n<invoke name="{name}">\n',
        lambda k, v: f'<parameter name="{k}">{v}</parameter>\n',
        "</invoke>\n",
    ),
    "muse_spark": markup(
        lambda name: f'<atem:invoke name="{name}">',
        lambda k, v: f'<atem:parameter name="{k}">{v}</atem:parameter>',
        "</atem:invoke>",
    ),
    "kimi_k3": markup(
        lambda name: f'<|open|>call tool="{name}" index="1"<|sep|>',
        lambda k, v: f'<|open|>argument key="{k}"<|sep|>{v}<|close|>argument<|sep|>',
        "<|close|>call<|sep|>",
    ),
    "qwen3_coder": markup(
        lambda name: f"\n<function={name}>\n",
        lambda k, v: f"<parameter={k}>\n{v}\n</parameter>\n",
        "</function>\n",
    ),
}
WRITERS["gemma4"] = lambda name, values: "call:" + name + gemma(values, '<|"|>')
WRITERS["function_gemma"] = lambda name, values: "call:" + name + gemma(values, "<escape>")
WRITERS["pythonic"] = lambda name, values: (
    f"[{name}({', '.join(f'{k}={v!r}' for k, v in values.items())})]"
)
WRITERS["laguna"] = WRITERS["glm47"]


def read(name, pieces, *, is_whole=True):
    """What is found: `[name, arguments]` for calls, and texts."""
    section, events = Section(FORMATS[name], offered(TOOLS)), []
    for piece in pieces:
        events += section.feed(piece)
    events += section.end(is_whole=is_whole)
    found = []
    for event in events:
        if isinstance(event, Begin):
            found.append([event.name, ""])
        elif isinstance(event, Arguments):
            found[-1][1] += event.text
        elif isinstance(event, Text) and found and isinstance(found[-1], str):
            found[-1] += event.text
        elif isinstance(event, Text):
            found.append(event.text)
    return found


def test_every_format_of_mlx_lm_is_known_here_or_read_by_its_own_parser():
    """A parser that is new in mlx-lm fails this, so that someone looks at it."""
    package = import_module("mlx_lm.tool_parsers")
    known = {module.name for module in iter_modules(package.__path__)}
    assert known == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_what_was_written_and_what_the_schema_says(name):
    """White space, quotes, the word null in a text; 2**63 + 1 to its last digit; null where it may be."""
    text = WRITERS[name]("f", VALUES)
    ((called, arguments),) = read(name, text)
    assert called == "f"
    assert json.loads(arguments) == VALUES
    assert read(name, WRITERS[name]("g", {})) == [["g", "{}"]]


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_is_the_same_however_it_is_cut_into_pieces(name):
    """Two pieces cut anywhere, single characters, one piece; whole, cut off, broken, with more behind it."""
    text = WRITERS[name]("f", VALUES)
    broken = [
        text[: len(text) // 2],
        text[: -len(text) // 4],
        text[:-12],
        text.replace("</", "<", 1),
    ]
    for each in [text, *broken, text + " more", text + text]:
        for is_whole in (True, False):
            once = read(name, [each], is_whole=is_whole)
            assert read(name, each, is_whole=is_whole) == once
            for at in range(1, len(each), 3):
                assert read(name, [each[:at], each[at:]], is_whole=is_whole) == once, (each, at)


@pytest.mark.parametrize("name", FORMATS)
def test_arguments_come_as_they_are_written(name):
    """Of a text of 300 words the first are out before the last are written, with name and start before."""
    section = Section(FORMATS[name], offered(TOOLS))
    half, rest = WRITERS[name]("f", {"text": "word " * 300}).split("word " * 150, 1)
    events = section.feed(half + "word " * 100)
    assert events[0] == Begin("f", events[0].id)
    assert "".join(e.text for e in events if isinstance(e, Arguments)).count("word") == 100
    assert rest


@pytest.mark.parametrize("name", FORMATS)
def test_a_name_that_was_not_offered_is_text(name):
    """All that was written, as it was written."""
    text = WRITERS[name]("rm", {"text": "x"})
    assert read(name, text) == [text]


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_that_was_cut_off_is_never_closed_as_if_it_were_whole(name):
    """Half a file must not be written as if it were all of it: what a limit cut is no JSON."""
    text = WRITERS[name]("f", {"text": "one two three"})
    at = text.index("two")
    ((called, arguments),) = read(name, text[:at], is_whole=False)
    assert called == "f"
    assert arguments.endswith('"one ')
    with pytest.raises(ValueError, match="Unterminated"):
        json.loads(arguments)


def test_brackets_are_closed_for_a_model_that_forgot_them_and_not_for_a_limit():
    """Behind a limit a number may be half of one, and more would have come."""
    text = '{"name": "f", "arguments": {"data": {"a": [1'
    assert read("json_tools", text, is_whole=True) == [["f", '{"data": {"a": [1]}}']]
    assert read("json_tools", text, is_whole=False) == [["f", '{"data": {"a": [1']]
    text = "<function=f>\n<parameter=text>\na\n</parameter>\n"
    assert read("qwen3_coder", text, is_whole=True) == [["f", '{"text": "a"}']]
    assert read("qwen3_coder", text, is_whole=False) == [["f", '{"text": "a"']]
    text = "call:f{data:{a:1"
    assert read("gemma4", text, is_whole=True) == [["f", '{"data": {"a": 1}}']]
    assert read("gemma4", text, is_whole=False) == [["f", '{"data": {"a": 1']]


@pytest.mark.parametrize(
    ("name", "text", "arguments"),
    [
        ("qwen3_coder", "<function=f>\n<parameter=text>\n/etc\n</function>", {"text": "/etc"}),
        ("qwen3_coder", "<function=f>\n<parameter=text>\n/etc\n", {"text": "/etc"}),
        (
            "qwen3_coder",
            "<function=f>\n<parameter=text>\na\n<parameter=count>\n5\n</parameter>\n</function>",
            {"text": "a", "count": 5},
        ),
        (
            "qwen3_coder",
            "<function=f>\n<parameter=text>\n</function>\n<parameter=x>\n</parameter>\n</function>",
            {"text": "</function>\n<parameter=x>"},
        ),
        (
            "minimax_m2",
            '<invoke name="f"><parameter name="text">a<parameter name="count">5</invoke>',
            {"text": "a", "count": 5},
        ),
        ("glm47", "f\n<arg_key>text</arg_key><arg_value>a", {"text": "a"}),
        ("json_tools", '{"name": "f", "arguments": {"data": {"a": [1', {"data": {"a": [1]}}),
        ("json_tools", '{"name": "f", "arguments": {"text": "a\nb\\d",}}', {"text": "a\nb\\d"}),
        ("json_tools", '{"arguments": {"text": "a"}, "name": "f"}', {"text": "a"}),
        ("json_tools", '{"name": "f", "arguments": "{\\"text\\": \\"a\\"}"}', {"text": "a"}),
        ("json_tools", '{"function": {"name": "f", "arguments": {"count": 5}}}', {"count": 5}),
        ("json_tools", '[{"name": "f", "parameters": {"note": None}}]', {"note": None}),
        ("json_tools", '{"name": "f", "arguments": {}}}', {}),
        ("gemma4", 'call:f{text:<|"|>}{,]<|"|>,count:5', {"text": "}{,]", "count": 5}),
        ("gemma4", 'call:f{data:{<|"|>k<|"|>:[a b,],},}', {"data": {"k": ["a b"]}}),
        ("function_gemma", "call:f{text:null,note:null}", {"text": "null", "note": None}),
        ("mistral", '[{"name": "f", "arguments": {"count": 5}, "id": "abc"}]', {"count": 5}),
        ("mistral", 'f[CALL_ID]abc[ARGS]{"count": 5}', {"count": 5}),
        (
            "kimi_k3",
            (
                '<|open|>call tool="f"<|sep|><|open|>json type="object"<|sep|>{"count": 5}'
                "<|close|>json<|sep|><|close|>call<|sep|>"
            ),
            {"count": 5},
        ),
    ],
)
def test_what_can_mean_one_thing_only_is_read_so(name, text, arguments):
    """A tag that was forgotten, brackets that are missing or too many, another order: no value vanishes."""
    ((called, found),) = read(name, text)
    assert (called, json.loads(found)) == ("f", arguments)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("json_tools", '{"name": "f", "arguments": {"count": 5, text: "a"}}'),
        ("qwen3_coder", "<function=f>\n<parameter=text>\na\n</parameter>\nb\n</function>\n"),
    ],
)
def test_what_goes_on_as_no_json_is_sent_as_it_was_written(name, text):
    """A client finds that it is broken, and what the model wrote; it does not find half of it."""
    ((_, arguments),) = read(name, text)
    assert arguments.endswith(text[-12:])
    with pytest.raises(ValueError, match=r"Expecting|delimiter"):
        json.loads(arguments)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "hostile", ["a", "<", "[", "{", '{"', "\n</function>", "</parameter", "call "]
)
def test_reading_takes_time_that_is_linear(name, hostile):
    """Twice the text, in pieces of five, takes twice the lines of Python, not four times."""

    def lines(length):
        begin = WRITERS[name]("f", VALUES)
        text = begin[: len(begin) // 4] + (hostile * length)[:length]
        pieces = [text[at : at + 5] for at in range(0, len(text), 5)]
        count = 0

        def trace(frame, event, arg):
            nonlocal count
            count += 1
            return trace

        sys.settrace(trace)
        try:
            read(name, pieces)
        finally:
            sys.settrace(None)
        return count

    assert lines(600) < 2.6 * lines(300)
