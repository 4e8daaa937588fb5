"""Calls as Python writes them: `[name(key=value, ...), ...]`, with literals of Python or of JSON."""

from __future__ import annotations

import ast
import re
from contextlib import suppress

from ..jsontext import strict
from .argument_types import Parameter, Parameters
from .incoming import Arguments, Begin, BrokenCallError, End, Incoming, Steps, collected
from .json_formats import MOST_NAME, Offered, known
from .json_reader import MOST_DEPTH, is_number, quoted

MOST_WORD = 64
"""Characters of a number that is read as Python's when it is none of JSON's."""

_CLOSER = {"{": "}", "[": "]", "(": ")"}
_WORD = re.compile(r"[\w.+-]*")
_WORDS = {"true": "true", "false": "false", "null": "null"} | {
    "True": "true",
    "False": "false",
    "None": "null",
}
_PLAIN = re.compile(r"[^\"'\\]*")
_DIGITS = {"x": 4, "u": 6, "U": 10}
"""Characters of an escape that names a character by its number."""


def pythonic(source: Incoming, offered: Offered) -> Steps[None]:
    """One list of calls."""
    yield from source.space()
    if not (yield from source.accept("[")):
        raise BrokenCallError
    while True:
        yield from source.space()
        if source.is_read or (yield from source.accept("]")):
            source.mark()
            return
        name, marker = yield from source.until("(", most=MOST_NAME)
        parameters = known(name.strip(), offered)
        if marker is None:
            raise BrokenCallError
        yield Begin(name.strip())
        yield Arguments("{")
        if not (yield from _named(source, parameters)):
            return
        yield Arguments("}")
        yield End()
        yield from source.space()
        yield from source.accept(",")
        source.mark()


def _named(source: Incoming, parameters: Parameters) -> Steps[bool]:
    """The arguments and the bracket behind them; whether all is there."""
    comma = ""
    while not (yield from _is_closed(source, ")")):
        if (yield from source.peek(1)) == "":
            return False
        key, marker = yield from source.until("=", most=MOST_NAME)
        if marker is None and source.is_read and not source.is_whole:
            return False
        if marker is None or not key.strip().isidentifier():
            raise BrokenCallError(key)
        name = key.strip()
        yield Arguments(f"{comma}{quoted(name)}: ")
        comma = ", "
        if not (yield from _argument(source, parameters[name])):
            return False
        yield from _separator(source, ")")
    return True


def _argument(source: Incoming, parameter: Parameter) -> Steps[bool]:
    """A value by its schema: a text where none is allowed is read again."""
    yield from source.space()
    is_text = (yield from source.peek(1)) in ("'", '"')
    if not is_text or parameter.is_free_text:
        return (yield from _value(source, 0))
    text, is_there = yield from collected(_value(source, 0))
    if is_there:
        with suppress(ValueError):
            text = parameter.reread(ast.literal_eval(text))
    yield Arguments(text)
    return is_there


def _value(source: Incoming, depth: int) -> Steps[bool]:
    """One literal as JSON; whether all of it is there."""
    if depth == MOST_DEPTH:
        raise BrokenCallError(is_too_deep=True)
    yield from source.space()
    char = yield from source.peek(1)
    if char in ("'", '"'):
        return (yield from _string(source, char))
    if char in _CLOSER:
        source.skip(1)
        if char == "{":
            return (yield from _entries(source, depth))
        return (yield from _items(source, _CLOSER[char], depth))
    word = yield from source.all_of(_WORD)
    if (yield from source.peek(1)) == "" and not source.is_whole:
        yield Arguments(word)
        return False
    yield Arguments(_scalar(word))
    return True


def _scalar(word: str) -> str:
    if word in _WORDS:
        return _WORDS[word]
    if is_number(word):
        return word
    if word and len(word) <= MOST_WORD:
        with suppress(ValueError, SyntaxError):
            return strict(ast.literal_eval(word))
    raise BrokenCallError(word)


def _items(source: Incoming, closer: str, depth: int) -> Steps[bool]:
    yield Arguments("[")
    comma = ""
    while not (yield from _is_closed(source, closer)):
        if (yield from source.peek(1)) == "":
            return False
        yield Arguments(comma)
        comma = ", "
        if not (yield from _value(source, depth + 1)):
            return False
        yield from _separator(source, closer)
    yield Arguments("]")
    return True


def _entries(source: Incoming, depth: int) -> Steps[bool]:
    yield Arguments("{")
    comma = ""
    while not (yield from _is_closed(source, "}")):
        quote = yield from source.peek(1)
        if quote == "":
            return False
        if quote not in ("'", '"'):
            raise BrokenCallError
        yield Arguments(comma)
        comma = ", "
        if not (yield from _string(source, quote)):
            return False
        yield from source.space()
        if not (yield from source.accept(":")):
            if (yield from source.peek(1)) == "":
                return False
            raise BrokenCallError
        yield Arguments(": ")
        if not (yield from _value(source, depth + 1)):
            return False
        yield from _separator(source, "}")
    yield Arguments("}")
    return True


def _is_closed(source: Incoming, closer: str) -> Steps[bool]:
    """Whether it ends here. What the model ended is complete without its bracket."""
    yield from source.space()
    return (yield from source.accept(closer)) or (source.is_read and source.is_whole)


def _separator(source: Incoming, closer: str) -> Steps[None]:
    space = yield from source.space()
    if not (yield from source.accept(",")) and (yield from source.peek(1)) not in ("", closer):
        raise BrokenCallError(space)


def _string(source: Incoming, quote: str) -> Steps[bool]:
    """A string as it is written, between quotes of one kind, or three of them."""
    is_long = yield from source.accept(quote * 3)
    if not is_long:
        source.skip(1)
    end = quote * 3 if is_long else quote
    yield Arguments('"')
    while True:
        yield Arguments(quoted(source.run(_PLAIN))[1:-1])
        if (yield from source.accept(end)):
            yield Arguments('"')
            return True
        char = yield from source.peek(1)
        if char == "":
            if source.is_read:
                return False
        elif char == "\\":
            escape = yield from _escape(source)
            if not escape:
                return False
            yield Arguments(escape)
        else:
            source.skip(1)
            yield Arguments(quoted(char)[1:-1])


def _escape(source: Incoming) -> Steps[str]:
    """An escape as JSON writes it; empty where the text ends in it."""
    two = yield from source.peek(2)
    length = _DIGITS.get(two[1:], 2)
    text = yield from source.peek(length)
    if len(text) < length:
        return ""
    source.skip(length)
    if two == "\\u" and re.fullmatch(r"\\u[0-9a-fA-F]{4}", text):
        return text  # as it is: two of them may make one character
    with suppress(ValueError, SyntaxError):
        return quoted(ast.literal_eval(f'"{text}"'))[1:-1]
    return quoted(text)[1:-1]
