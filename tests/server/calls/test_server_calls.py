"""Calls as mlx-lm's parsers read them: equal wherever they are read, and never at others' cost."""

from __future__ import annotations

import asyncio
import json
from importlib import import_module

import pytest
from mlx_hybridcache_server.calls import mlx_lm_formats as calls
from mlx_hybridcache_server.calls.mlx_lm_formats import read
from mlx_hybridcache_server.calls.reader_process import called

LONG = "word " * 200

GOOD = {
    "function_gemma": "call:f{x:<escape>%s<escape>}",
    "gemma4": 'call:f{x:<|"|>%s<|"|>}',
    "glm47": "f<arg_key>x</arg_key><arg_value>%s</arg_value>",
    "json_tools": '{"name": "f", "arguments": {"x": "%s"}}',
    "kimi_k2": '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"x": "%s"}'
    "<|tool_call_end|>",
    "kimi_k3": '<|open|>call tool="f"<|sep|><|open|>argument key="x"<|sep|>%s'
    "<|close|>argument<|sep|><|close|>call<|sep|>",
    "laguna": "f<arg_key>x</arg_key><arg_value>%s</arg_value>",
    "longcat": "f<longcat_arg_key>x</longcat_arg_key><longcat_arg_value>%s</longcat_arg_value>",
    "minicpm5": '"f"><param name="x">%s</param>',
    "minimax_m2": '<invoke name="f"><parameter name="x">%s</parameter></invoke>',
    "mistral": 'f[ARGS]{"x": "%s"}',
    "muse_spark": '<atem:invoke name="f"><atem:parameter name="x">%s</atem:parameter></atem:invoke>',
    "pythonic": '[f(x="%s")]',
    "qwen3_coder": "<function=f><parameter=x>%s</parameter></function>",
}
"""A call of `f` with one argument, in the format of each parser."""

SLOW = {
    "gemma4": "call:a{" * 4000 + "}",
    "kimi_k3": '<|open|>call tool="a"<|sep|>' + "<|open|>call" * 8000,
    "minicpm5": "a" * 50_000 + "</function>",
    "muse_spark": "<atem:invoke " * 8000,
    "glm47": "<arg_key>a</arg_key><arg_value>" * 8000,
}
"""Texts that are no call, and that take these parsers minutes to say so."""


def parser(name):
    """mlx-lm's."""
    return import_module(f"mlx_lm.tool_parsers.{name}").parse_tool_call


@pytest.mark.parametrize("name", GOOD)
def test_a_call_is_the_same_wherever_it_is_read(name):
    """Twenty bytes or a thousand, in the server or beside it."""
    for value in ("word", LONG.strip(), "ü" * 2000):
        text = GOOD[name] % value
        found = asyncio.run(read(parser(name), text, None))
        assert found == called(parser(name), text, None)
        (call,) = found
        assert call["name"] == "f"
        assert json.loads(call["arguments"]) == {"x": value}


def test_types_are_read_by_the_tools_beside_the_server_too():
    """A parser that knows the parameters makes 5 of `5`."""
    properties = {"x": {"type": "integer"}, "y": {"type": "string"}}
    tools = [{"function": {"name": "f", "parameters": {"properties": properties}}}]
    text = f"<function=f><parameter=x>5</parameter><parameter=y>5{LONG}</parameter></function>"
    (call,) = asyncio.run(read(parser("qwen3_coder"), text, tools))
    assert json.loads(call["arguments"]) == {"x": 5, "y": f"5{LONG}"}


@pytest.mark.parametrize("odd", ["NaN", "-Infinity", "1e999", "[NaN]"])
def test_what_is_no_json_is_no_call_beside_the_server_either(odd):
    """The same rule in both places."""
    text = f"f<arg_key>x</arg_key><arg_value>{odd}</arg_value>"
    for padding in ("", f"<arg_key>y</arg_key><arg_value>{LONG}</arg_value>"):
        assert asyncio.run(read(parser("glm47"), text + padding, None)) is None


@pytest.mark.parametrize("name", SLOW)
def test_a_text_that_takes_too_long_stays_text_and_delays_nobody(name, monkeypatch, caplog):
    """While it is read the loop turns and another call is read; then a line says what became of it."""
    monkeypatch.setattr(calls, "CPU_SECONDS", 0.5)

    async def both():
        ended = []

        async def one(which, text):
            found = await read(parser(which), text, None)
            ended.append((which, found is not None))

        slow = asyncio.create_task(one(name, SLOW[name]))
        turns = 0
        while not slow.done() and turns < 10:
            await asyncio.sleep(0)
            turns += 1
        assert not slow.done()
        await one("json_tools", GOOD["json_tools"] % "word")
        await slow
        return ended

    assert asyncio.run(both()) == [("json_tools", True), (name, False)]
    assert f"{len(SLOW[name])} characters could not be read within 0.5 s" in caplog.text


def test_a_client_that_leaves_ends_the_reading(monkeypatch):
    """Its process is ended and waited for, not left to run until its time is over."""
    started = []
    start = asyncio.create_subprocess_exec

    async def noted(*args, **kwargs):
        started.append(await start(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noted)

    async def leave():
        reading = asyncio.create_task(read(parser("gemma4"), SLOW["gemma4"], None))
        while not started:
            await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(leave())
    assert started[0].returncode == -9


def test_a_parser_that_no_process_can_import_leaves_text(caplog):
    """One of a closure: short texts are read, long ones stay text, and the log says so."""

    def own(text, tools):
        return {"name": text[:1]}

    assert asyncio.run(read(own, "f", None)) == [{"name": "f", "arguments": "{}", "id": ""}]
    assert asyncio.run(read(own, LONG, None)) is None
    assert "could not be read" in caplog.text
