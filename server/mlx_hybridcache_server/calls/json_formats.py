"""Formats of calls whose arguments are JSON, read as they are written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress

from .argument_types import Parameters
from .incoming import Arguments, Begin, BrokenCallError, End, Incoming, Steps, collected
from .json_reader import value

Offered = Mapping[str, Parameters]
Format = Callable[[Incoming, Offered], Steps[None]]
"""Reads what stands between a model's markers of calls. It stops behind the last call, or where the
text ends; `BrokenCallError` says that what follows is none."""

ARGUMENTS = ("arguments", "parameters")
MOST_NAME = 256
"""Characters of a function's name with what stands around it."""

_KIMI = re.compile(r"\s*((?:functions\.)?(.+?):\d+)\s*", re.DOTALL)
_MISTRAL = re.compile(r"\s*([\w.-]+)\s*")


def known(name: str, offered: Offered) -> Parameters:
    """The parameters of what is called. A name that was not offered is no call."""
    if name not in offered:
        raise BrokenCallError
    return offered[name]


def json_object(source: Incoming) -> Steps[None]:
    """The arguments of a call that has begun, up to its end."""
    lacks = yield from value(source)
    if lacks and source.is_whole:  # every value is there, and the model ended its call
        yield Arguments(lacks)
        lacks = ""
    if lacks == "":
        yield End()


def json_tools(source: Incoming, offered: Offered) -> Steps[None]:
    """`{"name": ..., "arguments": {...}}`, one or several, in a list or not."""
    while True:
        yield from source.space()
        if source.is_read:
            return
        if (yield from source.peek(1)) in ("[", ",", "]"):
            source.skip(1)
        else:
            yield from _call(source, offered)


def mistral(source: Incoming, offered: Offered) -> Steps[None]:
    """`[{"name": ..., "arguments": {...}}]`, or `name[ARGS]{...}` several times."""
    yield from source.space()
    if (yield from source.peek(1)) == "[" and not (yield from source.accept("[TOOL_CALLS]")):
        yield from json_tools(source, offered)
        return
    while not source.is_read:
        head, marker = yield from source.until("[CALL_ID]", "[ARGS]", most=MOST_NAME)
        given = ""
        if marker == "[CALL_ID]":
            given, marker = yield from source.until("[ARGS]", most=MOST_NAME)
        name = _MISTRAL.fullmatch(head)
        if marker is None or name is None:
            raise BrokenCallError
        yield from _whole_call(source, offered, name[1], given.strip())
        yield from source.space()
        yield from source.accept("[TOOL_CALLS]")
        source.mark()


def kimi_k2(source: Incoming, offered: Offered) -> Steps[None]:
    """`functions.name:0<|tool_call_argument_begin|>{...}`, each between markers of its own."""
    while True:
        yield from source.space()
        yield from source.accept("<|tool_call_begin|>")
        if source.is_read:
            return
        head, marker = yield from source.until("<|tool_call_argument_begin|>", most=MOST_NAME)
        named = _KIMI.fullmatch(head)
        if marker is None or named is None:
            raise BrokenCallError
        yield from _whole_call(source, offered, named[2], named[1])
        yield from source.space()
        yield from source.accept("<|tool_call_end|>")
        source.mark()


def _whole_call(source: Incoming, offered: Offered, name: str, given: str) -> Steps[None]:
    known(name, offered)
    yield from source.space()
    if (yield from source.peek(1)) != "{":
        raise BrokenCallError
    yield Begin(name, given)
    yield from json_object(source)


def _call(source: Incoming, offered: Offered) -> Steps[None]:
    """One object. Its arguments are given out as they come if its name stands in front of them."""
    if not (yield from source.accept("{")):
        raise BrokenCallError
    fields: dict[str, str] = {}
    has_begun = False
    while True:
        yield from source.space()
        if (yield from source.accept("}")):
            break
        key = yield from _field(source)
        name = _text(fields.get("name") or fields.get("function"))
        is_object = (yield from source.peek(1)) == "{"
        if key in ARGUMENTS and name and is_object and not has_begun:
            has_begun = True
            known(name, offered)
            yield Begin(name, _text(fields.get("id")) or "")
            yield from json_object(source)
        else:
            fields[key] = yield from _raw(source, words=key in ARGUMENTS)
        yield from source.space()
        if not (yield from source.accept(",")) and (yield from source.peek(1)) != "}":
            raise BrokenCallError
    if not has_begun:
        yield from _from_fields(fields, offered)
    source.mark()


def _field(source: Incoming) -> Steps[str]:
    """A key with its colon."""
    if (yield from source.peek(1)) != '"':
        raise BrokenCallError
    key = yield from _raw(source)
    yield from source.space()
    if not (yield from source.accept(":")):
        raise BrokenCallError
    yield from source.space()
    return _text(key) or ""


def _raw(source: Incoming, *, words: bool = True) -> Steps[str]:
    """A whole value. A word without quotes is none where `words` are not strings."""
    try:
        text, lacks = yield from collected(value(source, words=words))
    except BrokenCallError as error:
        if error.raw and not words:
            return "null"
        raise
    if lacks != "":
        raise BrokenCallError
    return text


def _from_fields(fields: dict[str, str], offered: Offered) -> Steps[None]:
    """A call whose arguments came first, as text, or not at all; or within another object."""
    for key in ("function", "tool"):
        if fields.get(key, "").startswith("{"):
            yield from _call(Incoming(fields[key]), offered)
            return
    name = _text(fields.get("name") or fields.get("function"))
    if name is None:
        raise BrokenCallError
    known(name, offered)
    arguments = fields.get("arguments", fields.get("parameters", "null"))
    if arguments.startswith('"'):
        arguments = (_text(arguments) or "").strip()
    if arguments in ("", "null", "[]"):
        arguments = "{}"
    source = Incoming(arguments)
    made = yield from _raw(source)
    if not made.startswith("{") or not source.is_read:
        raise BrokenCallError
    yield Begin(name, _text(fields.get("id")) or "")
    yield Arguments(made)
    yield End()


def _text(raw: str | None) -> str | None:
    """The string that `raw` is as JSON."""
    with suppress(ValueError):
        found = json.loads(raw) if raw and raw.startswith('"') else None
        return found if isinstance(found, str) else None
    return None
