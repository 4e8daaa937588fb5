"""The parts of a reply: text, reasoning, calls, code and stop texts, however it is cut into pieces."""

from __future__ import annotations

import asyncio
import json
from importlib import import_module

import pytest
from bundled import load
from mlx_hybridcache_server.calls.fences import Fences
from mlx_hybridcache_server.calls.formats import FORMATS, ToolFormat
from mlx_hybridcache_server.calls.parts import Parts
from mlx_hybridcache_server.generation.pieces import Piece
from mlx_hybridcache_server.generation.stop_text import StopText
from mlx_hybridcache_server.openai.delta import Delta
from mlx_hybridcache_server.replies.message import ChatMessage
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
            said.add(Delta.of(asyncio.run(reply.take(taken)), len(said.tool_calls)))
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


def test_a_format_that_is_read_by_its_own_parser_keeps_the_same_rules(monkeypatch):
    """As one that is new in mlx-lm would be: only what was offered, typed by the schema, text otherwise."""
    monkeypatch.delitem(FORMATS, "pythonic")
    call = '<|tool_call_start|>[f(text="null", count="9007199254740993")]<|tool_call_end|>'
    found = message(call, form="pythonic")
    assert found == ("", "", [("f", '{"text": "null", "count": 9007199254740993}')])
    unread = call.replace("[f(", "{f(")
    assert message(unread, form="pythonic") == ("", unread, [])
    other = call.replace("[f(", "[rm(")
    assert message(other, form="pythonic") == ("", other, [])
    long = asyncio.run(tool_format("pythonic").others('[f(text="%s")]' % ("word " * 99)))
    assert json.loads(long[0]["arguments"]) == {"text": "word " * 99}
    assert message(f"```\n{call}\n```", form="pythonic") == ("", f"```\n{call}\n```", [])


def test_a_call_in_python_is_read_as_python_reads_it():
    """Quotes of either kind, three of them, escapes, literals of both languages, tuples, hexadecimal numbers."""
    told = {
        """[f(text='it\\'s "so"', data={'a': [1, None, null], "b": (True, false)})]""": {
            "text": 'it\'s "so"',
            "data": {"a": [1, None, None], "b": [True, False]},
        },
        '[f(text="""two\nlines \\x41\\u00e9\\U0001f600\\q""", count=0x10,)]': {
            "text": "two\nlines A\u00e9\U0001f600\\q",
            "count": 16,
        },
        '[f(text="\\ud83d\\ude00", count="5", note=None)]': {
            "text": "\U0001f600",
            "count": 5,
            "note": None,
        },
    }
    for text, arguments in told.items():
        marked = f"<|tool_call_start|>{text}<|tool_call_end|>"
        ((name, found),) = message(marked, form="pythonic")[2]
        assert (name, json.loads(found)) == ("f", arguments)


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
