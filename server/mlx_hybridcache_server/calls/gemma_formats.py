"""Gemma's formats of calls: like JSON, with bare keys, and strings between marks of their own."""

from __future__ import annotations

import re

from .argument_types import Parameter, Parameters
from .incoming import Arguments, Begin, BrokenCallError, End, Incoming, Steps
from .json_formats import (
    MOST_NAME,
    Format,
    Offered,
    known,
)
from .json_reader import MOST_DEPTH, normal, quoted

_BARE = re.compile(r"[^,{}\[\]]*")


def reader(mark: str) -> Format:
    """Reads `call:name{key:value,...}`, one or several; `mark` stands on both sides of a string."""

    def read(source: Incoming, offered: Offered) -> Steps[None]:
        while True:
            yield from source.space()
            if source.is_read:
                return
            if not (yield from source.accept("call:")):
                raise BrokenCallError
            name, marker = yield from source.until("{", most=MOST_NAME)
            parameters = known(name.strip(), offered)
            if marker is None:
                raise BrokenCallError
            yield Begin(name.strip())
            if (yield from _object(source, mark, parameters, 1)):
                yield End()

    return read


def _object(source: Incoming, mark: str, parameters: Parameters | None, depth: int) -> Steps[bool]:
    """What follows `{`, as JSON; whether it is complete. `parameters` say what the outermost one holds."""
    yield Arguments("{")
    comma = ""
    while not (yield from _is_closed(source, "}")):
        if (yield from source.peek(1)) == "":
            return False
        is_marked = yield from source.accept(mark)
        key, marker = yield from source.until(mark if is_marked else ":", most=MOST_NAME)
        if is_marked:
            yield from source.space()
            marker = ":" if (yield from source.accept(":")) else None
        if marker is None:
            if (yield from source.peek(1)) == "" and not source.is_whole:
                return False
            raise BrokenCallError(key)
        key = key.strip()
        yield Arguments(f"{comma}{quoted(key)}: ")
        comma = ", "
        parameter = parameters[key] if parameters is not None else None
        if not (yield from _value(source, mark, parameter, depth)):
            return False
        yield from _separator(source, "}")
    return True


def _list(source: Incoming, mark: str, depth: int) -> Steps[bool]:
    yield Arguments("[")
    comma = ""
    while not (yield from _is_closed(source, "]")):
        if (yield from source.peek(1)) == "":
            return False
        yield Arguments(comma)
        comma = ", "
        if not (yield from _value(source, mark, None, depth)):
            return False
        yield from _separator(source, "]")
    return True


def _is_closed(source: Incoming, closer: str) -> Steps[bool]:
    """Whether it ends here. What the model ended is complete without its bracket."""
    yield from source.space()
    if (yield from source.accept(closer)) or (source.is_read and source.is_whole):
        yield Arguments(closer)
        return True
    return False


def _separator(source: Incoming, closer: str) -> Steps[None]:
    space = yield from source.space()
    if not (yield from source.accept(",")) and (yield from source.peek(1)) not in ("", closer):
        raise BrokenCallError(space)


def _value(source: Incoming, mark: str, parameter: Parameter | None, depth: int) -> Steps[bool]:
    if depth == MOST_DEPTH:
        raise BrokenCallError(is_too_deep=True)
    yield from source.space()
    if (yield from source.accept(mark)):
        return (yield from _string(source, mark, parameter))
    if (yield from source.accept("{")):
        return (yield from _object(source, mark, None, depth + 1))
    if (yield from source.accept("[")):
        return (yield from _list(source, mark, depth + 1))
    raw = yield from source.all_of(_BARE)
    if (yield from source.peek(1)) == "" and not source.is_whole:
        yield Arguments(raw)
        return False
    if not raw.strip():
        raise BrokenCallError(raw)
    text = raw.strip()
    yield Arguments(parameter.read(text) if parameter is not None else _plain(text))
    return True


def _plain(text: str) -> str:
    found = normal(text, words=True)
    return found if found is not None else quoted(text)


def _string(source: Incoming, mark: str, parameter: Parameter | None) -> Steps[bool]:
    """A text, given out as it is written where any text may stand."""
    if parameter is not None and not parameter.is_free_text:
        text, marker = yield from source.until(mark)
        yield Arguments(parameter.reread(text) if marker else quoted(text)[:-1])
        return marker is not None
    yield Arguments('"')
    while True:
        text, marker = source.part((mark,))
        yield Arguments(quoted(text)[1:-1])
        if marker is not None:
            yield Arguments('"')
            return True
        if source.is_read:
            return False
        yield None
