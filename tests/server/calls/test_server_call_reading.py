"""Calls as models write them, read character by character: exact, by the schema, never lost, never invented."""

from __future__ import annotations

import asyncio
import json
import sys
from importlib import import_module
from pkgutil import iter_modules

import pytest
from bundled import load
from mlx_hybridcache_server.calls.argument_types import Parameter, offered
from mlx_hybridcache_server.calls.fences import Fences
from mlx_hybridcache_server.calls.formats import FORMATS, ToolFormat
from mlx_hybridcache_server.calls.incoming import Arguments, Begin, Text
from mlx_hybridcache_server.calls.json_reader import normal
from mlx_hybridcache_server.calls.parts import Parts
from mlx_hybridcache_server.calls.section import Section
from mlx_hybridcache_server.generation.listen import Piece, StopText
from mlx_hybridcache_server.openai.replies import ChatMessage, Delta
from mlx_lm.tokenizer_utils import TokenizerWrapper

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
    assert known - FORMATS.keys() == {"pythonic"}


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


# Types


TEXT, NULLABLE = {"type": "string"}, {"type": ["string", "null"]}
ROOT = {"$defs": {"text": TEXT, "tree": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "integer"}]}}}


@pytest.mark.parametrize(
    ("schema", "raw", "value"),
    [
        (TEXT, "null", "null"),
        (TEXT, " 5\n", " 5\n"),
        (TEXT, '"quoted"', '"quoted"'),
        ({"$ref": "#/$defs/text"}, "null", "null"),
        ({"allOf": [TEXT, {"minLength": 1}]}, "5", "5"),
        ({"type": "STRING"}, "5", "5"),
        (NULLABLE, "null", None),
        (NULLABLE, "None", "None"),
        (NULLABLE, "5", "5"),
        ({"anyOf": [TEXT, {"type": "null"}]}, "null", None),
        ({"type": "string", "nullable": True}, "null", None),
        ({"oneOf": [{"type": "integer"}, TEXT]}, "5", 5),
        ({"oneOf": [{"type": "integer"}, TEXT]}, "007", "007"),
        ({"type": "integer"}, "9007199254740993", 2**53 + 1),
        ({"type": "integer"}, " +5.0\n", 5),
        ({"type": "integer"}, "five", "five"),
        ({"type": "integer"}, "null", "null"),
        ({"type": "int"}, "5", 5),
        ({"$ref": "#/$defs/tree"}, "5", 5),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "yes", "yes"),
        ({"enum": ["a", "b"]}, "\na ", "a"),
        ({"enum": ["1", 2]}, "1", "1"),
        ({"enum": ["1", 2]}, "2", 2),
        ({"enum": ["null", "x"]}, "null", "null"),
        ({"const": 5}, "5", 5),
        ({"const": "5"}, "5", "5"),
        ({"type": "array", "items": TEXT}, '["1", "null"]', ["1", "null"]),
        ({"type": "array"}, "[1, 2,]", [1, 2]),
        ({"type": "array"}, "one", "one"),
        ({"type": "object"}, "{'a': True, 'b': [None]}", {"a": True, "b": [None]}),
        ({"type": "object"}, '{"a": 12345678901234567890}', {"a": 12345678901234567890}),
        ({}, "5", 5),
        ({}, '"5"', "5"),
        ({}, " [draft] ", " [draft] "),
        (True, "word", "word"),
        ({"type": "unheard of"}, "word", "word"),
    ],
)
def test_a_text_is_read_by_the_whole_schema(schema, raw, value):
    """What none of it allows stays text, which the client's own check refuses."""
    found = json.loads(Parameter(schema, ROOT).read(raw))
    assert (found, type(found)) == (value, type(value))


def test_a_schema_of_many_references_to_itself_is_looked_through_once():
    """Thirty levels of two references each would be a billion places."""
    defs = {
        f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}]}
        for n in range(30)
    }
    schema = {
        "$defs": {**defs, "d30": {"type": "integer"}},
        "properties": {"x": {"$ref": "#/$defs/d0"}},
    }
    tools = offered([{"function": {"name": "f", "parameters": schema}}])
    assert tools["f"]["x"].read("5") == "5"


def test_a_schema_that_is_nested_without_end_ends_no_reply():
    """50,000 levels: beyond fifty anything may be."""
    schema = {"type": "integer"}
    for _ in range(50_000):
        schema = {"anyOf": [schema]}
    tools = offered([{"function": {"name": "f", "parameters": {"properties": {"x": schema}}}}])
    assert tools["f"]["x"].read("5") == "5"
    assert offered([{"function": {"name": "f", "parameters": schema}}])["f"]["x"].read("5") == "5"


def test_numbers_are_sent_with_the_digits_that_were_written():
    """More than a float holds, and zeros at the end."""
    assert normal('{"a": 1.10000000000000000001, "b": 1E5}', words=False) == (
        '{"a": 1.10000000000000000001, "b": 1E5}'
    )


# Parts of a reply


def tool_format(name="json_tools", tools=TOOLS):
    """One of mlx-lm's."""
    module = import_module(f"mlx_lm.tool_parsers.{name}")
    return ToolFormat(module.tool_call_start, module.tool_call_end, module.parse_tool_call, tools)


def message(text, *, state="normal", form="json_tools", tools=TOOLS, finish="stop", **how):
    """What the server makes of a reply, checked to be the same in every way to cut it."""
    _, tokenizer = load()
    made = tool_format(form, tools) if tools else None
    module = import_module(f"mlx_lm.tool_parsers.{form}")
    spoken = TokenizerWrapper(
        tokenizer._tokenizer,
        eos_token_ids=tokenizer.eos_token_ids,
        tool_call_start=module.tool_call_start,
        tool_call_end=module.tool_call_end,
        tool_parser=module.parse_tool_call,
    )

    def once(pieces):
        parts, said, reply = Parts(spoken, state, made, **how), Delta(), ChatMessage(made)
        for number, piece in enumerate(pieces, 1):
            is_last = number == len(pieces)
            found = parts.feed(piece)
            if is_last:
                found += parts.end(is_whole=finish == "stop")
            taken = Piece(0, tuple(found), False, None, finish if is_last else None)
            said.add(asyncio.run(reply.take(taken)))
        calls = [(c["function"]["name"], c["function"]["arguments"]) for c in said.tool_calls]
        return said.reasoning, said.content, calls

    whole = once([text])
    assert once(list(text)) == whole
    for at in range(1, len(text), 5):
        assert once([text[:at], text[at:]]) == whole
    return whole


CALL = '<tool_call>{"name": "f", "arguments": {"text": "a"}}</tool_call>'
CALLED = ("f", '{"text": "a"}')
WITHIN = '{"name": "f", "arguments": {"text": "a"}}'


def test_without_tools_nothing_is_a_call():
    """None, or an empty list: the text as it is, in the content and in reasoning."""
    for tools in (None, []):
        assert message(f"See: {CALL}", tools=tools) == ("", f"See: {CALL}", [])
        text = f"<think>a {CALL} b</think>c"
        assert message(text, tools=tools) == (f"a {CALL} b", "c", [])


def test_a_function_that_was_not_offered_is_text_and_one_behind_it_a_call():
    """With its markers, so that nothing is lost."""
    other = CALL.replace('"f"', '"rm"')
    assert message(f"{other}\n{CALL}") == ("", f"{other}\n", [CALLED])


@pytest.mark.parametrize(
    "text",
    [
        f"So:\n```\n{CALL}\n```\nDone.",
        f"~~~xml\n{CALL}\n~~~",
        f"Write `{CALL}` for it.",
        f"```\na\n{CALL}\nb\n```\n",
        f"> ```\n> {CALL}\n> ```",
    ],
)
def test_an_example_in_code_is_text(text):
    """In a fence, or in backticks."""
    assert message(text) == ("", text, [])


def test_behind_code_a_call_is_a_call():
    """A fence that is closed, a word in backticks; and one that the model never closed."""
    for before in ("```\na\n```\n", "Use `f`: ", "```a``` b ", "It`s "):
        assert message(before + CALL) == ("", before, [CALLED])
    assert message(f"```\n{CALL}") == ("", "```\n", [CALLED])
    assert message(f"```\n{CALL}", finish="length") == ("", f"```\n{CALL}", [])


def test_a_call_in_reasoning_is_a_thought_if_anything_follows_it():
    """It is not called, no marker leaks, and the call behind it comes once."""
    text = f"I could {CALL} but </think>\n\nNo."
    assert message(text, state="reasoning") == (f"I could {CALL} but ", "\n\nNo.", [])
    text = f"So {CALL}\n</think>\n\n{CALL}"
    assert message(text, state="reasoning") == (f"So {CALL}\n", "", [CALLED])
    text = f"<think>So {CALL}\n</think>Done {CALL}"
    assert message(text) == (f"So {CALL}\n", "Done ", [CALLED])


def test_a_reply_that_ends_with_a_call_in_its_reasoning_calls():
    """As models do that forget to close it; one or two, with the marker behind it or not."""
    assert message(f"So\n{CALL}", state="reasoning") == ("So\n", "", [CALLED])
    assert message(f"So\n{CALL}\n{CALL}\n", state="reasoning")[2] == [CALLED, CALLED]
    assert message(f"So\n{CALL}\n</think>\n", state="reasoning")[1:] == ("", [CALLED])
    cut = message(f"So\n{CALL}", state="reasoning", finish="length")
    assert cut == (f"So\n{CALL}", "", [])
    cut = message(f"So\n{CALL[:-20]}", state="reasoning", finish="length")
    assert cut == (f"So\n{CALL[:-20]}", "", [])


def test_only_the_first_call_is_kept_where_one_is_wanted():
    """Within one pair of markers, too."""
    for text in (CALL + CALL, CALL.replace(WITHIN, f"[{WITHIN}, {WITHIN}]")):
        assert message(text, only_one=True) == ("", "", [CALLED])
    assert message(f"{CALL}\n{CALL}", state="reasoning", only_one=True)[2] == [CALLED]


def test_a_format_that_is_read_by_its_own_parser_keeps_the_same_rules():
    """LFM2's: only what was offered, typed by the schema, text otherwise."""
    call = '<|tool_call_start|>[f(text="null", count="9007199254740993")]<|tool_call_end|>'
    found = message(call, form="pythonic")
    assert found == ("", "", [("f", '{"text": "null", "count": 9007199254740993}')])
    unread = call.replace('"null"', "it's")  # mlx-lm's own goes on with what it can read of it
    assert message(unread, form="pythonic") == ("", unread, [])
    other = call.replace("[f(", "[rm(")
    assert message(other, form="pythonic") == ("", other, [])
    long = asyncio.run(tool_format("pythonic").others('[f(text="%s")]' % ("word " * 99)))
    assert json.loads(long[0]["arguments"]) == {"text": "word " * 99}
    assert message(f"```\n{call}\n```", form="pythonic") == ("", f"```\n{call}\n```", [])


def test_fences_are_those_of_markdown():
    """Longer than three, of two kinds, closed by their own kind; backticks within one line."""
    for text, is_code in [
        ("````\n```\n", True),
        ("````\n```\n````\n", False),
        ("~~~\n```\n~~~\n", False),
        ("  ```py\n", True),
        ("a ```\n", False),
        ("```a```\n", False),
        ("a `b", True),
        ("a `b` c", False),
        ("a `` ` b", False),
    ]:
        for pieces in ([text], list(text)):
            fences = Fences()
            for piece in pieces:
                fences.feed(piece)
            assert fences.is_code == is_code, text


# Stop texts


def stopped(stops, sections):
    """What of the content is given out, with "|" where reasoning or a call interrupts it."""
    stop, out = StopText(stops), ""
    for number, text in enumerate(sections):
        if number:
            out += stop.interrupted() + "|"
        for char in text:
            out += stop.feed(char)
            if stop.found:
                return out
    return out + stop.end()


def test_white_space_that_parts_content_from_reasoning_is_no_stop_text():
    """Two line breaks end a paragraph of the content, not the reply in front of its first word."""
    assert stopped(["\n\n"], ["", "\n\nOne.\n\nTwo."]) == "|\n\nOne."
    assert stopped(["\n"], ["", "\n\n", "\n\n"]) == "|\n\n|\n\n"
    assert stopped(["\n\nEnd"], ["", "\n\nEnd of it"]) == "|"
    assert stopped(["\n\nEnd", "\n\n"], ["", "\n\nEvery.\n\n"]) == "|\n\nEvery."
    assert stopped(["\n\n"], ["\n\nOne."]) == ""
    assert stopped(["ab"], ["xa", "b"]) == "xa|b"
