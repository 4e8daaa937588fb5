"""JSON as it is being written: given out at once, exactly, and only as long as it is JSON.

What models write wrong and can mean one thing only is put right on the way: line breaks in strings,
backslashes that escape nothing, a comma in front of a closing bracket, Python's True, False and None,
words without quotes. NaN and its like, which JSON has not, become words with quotes.
"""

from __future__ import annotations

import json
import math
import re

from .incoming import Arguments, BrokenCallError, Incoming, Steps, collected

MOST_DEPTH = 200
"""Of what is nested. Readers of JSON fail between 500 and some thousand."""

MOST_DIGITS = 4300
"""Of a whole number. Python's own reader takes no more."""

_CLOSER = {"{": "}", "[": "]"}
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_WORD = re.compile(r"[\w.+-]*")
_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)")
_NUMBER = re.compile(rf"{_WHOLE.pattern}(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORDS = {"true": "true", "false": "false", "null": "null"} | {
    "True": "true",
    "False": "false",
    "None": "null",
}


def value(source: Incoming, depth: int = 0, *, words: bool = True) -> Steps[str | None]:
    """One value, piece by piece. Raises `BrokenCallError` where it is none.

    `words`: those without quotes are strings.

    Returns what it lacks: nothing; the closing brackets that were not written, if the text ends where
    they could stand; else None.
    """
    char = yield from source.peek(1)
    if char in _CLOSER:
        return (yield from _container(source, char, depth, words=words))
    if char == '"':
        return "" if (yield from _string(source)) else None
    if not char:
        return None
    yield Arguments((yield from _scalar(source, words=words)))
    return ""


def _container(source: Incoming, opener: str, depth: int, *, words: bool) -> Steps[str | None]:
    if depth == MOST_DEPTH:
        raise BrokenCallError(is_too_deep=True)
    closer, comma = _CLOSER[opener], ""
    source.skip(1)
    yield Arguments(opener)
    while True:
        space = yield from source.space()
        if source.is_read:
            return closer
        if (yield from source.accept(closer)):  # what a comma stood in front of is not there
            yield Arguments(space + closer)
            return ""
        yield Arguments(comma + space)
        if opener == "{" and not (yield from _key(source)):
            return None
        lacks = yield from value(source, depth + 1, words=words)
        if lacks != "":
            return None if lacks is None else lacks + closer
        space = yield from source.space()
        if (yield from source.accept(",")):
            comma = space + ","
        elif (yield from source.accept(closer)):
            yield Arguments(space + closer)
            return ""
        elif (yield from source.peek(1)):
            raise BrokenCallError(space)
        else:
            return closer


def _key(source: Incoming) -> Steps[bool]:
    """A key with its colon; whether all of it is there."""
    if (yield from source.peek(1)) != '"':
        raise BrokenCallError
    if not (yield from _string(source)):
        return False
    space = yield from source.space()
    if (yield from source.accept(":")):
        yield Arguments(f"{space}:{(yield from source.space())}")
        return True
    if source.is_read:
        return False
    raise BrokenCallError(space)


def _string(source: Incoming) -> Steps[bool]:
    """A string with its quotes; whether the second was there."""
    source.skip(1)
    yield Arguments('"')
    while True:
        plain = source.run(_PLAIN)
        if plain:
            yield Arguments(plain)
        char = yield from source.peek(1)
        if not char:
            return False
        if char == '"':
            source.skip(1)
            yield Arguments('"')
            return True
        if char == "\\":
            escape = yield from _escape(source)
            if not escape:
                return False
            yield Arguments(escape)
        elif char < " ":
            source.skip(1)
            yield Arguments(quoted(char)[1:-1])


def _escape(source: Incoming) -> Steps[str]:
    """An escape; a backslash that begins none is one. Empty where the text ends in it."""
    two = yield from source.peek(2)
    if len(two) < 2:
        return ""
    escape = (yield from source.peek(6)) if two == "\\u" else two
    is_one = _is_unicode_escape(escape) if two == "\\u" else two[1] in '"\\/bfnrt'
    if two == "\\u" and source.has_ended and len(escape) < 6:
        return ""
    source.skip(len(escape) if is_one else 1)
    return escape if is_one else "\\\\"


def _is_unicode_escape(text: str) -> bool:
    return bool(re.fullmatch(r"\\u[0-9a-fA-F]{4}", text))


def _scalar(source: Incoming, *, words: bool) -> Steps[str]:
    word = yield from source.all_of(_WORD)
    if word in _WORDS:
        return _WORDS[word]
    if is_number(word):
        return word
    if not (words and word):
        raise BrokenCallError(word)
    return quoted(word)


def is_number(word: str) -> bool:
    """Whether it is one of JSON that its readers can hold."""
    if _WHOLE.fullmatch(word):
        return len(word) <= MOST_DIGITS
    return bool(_NUMBER.fullmatch(word)) and math.isfinite(float(word))


def quoted(text: str) -> str:
    """A text as JSON."""
    return json.dumps(text, ensure_ascii=False)


def normal(text: str, *, words: bool) -> str | None:
    """A whole text as JSON that every reader takes, with its numbers as they stand; None if it is none."""
    source = Incoming(text.strip())
    try:
        found, lacks = next_of(collected(value(source, words=words)))
    except BrokenCallError:
        return None
    return found if lacks == "" and source.is_read else None


def next_of(steps: Steps[tuple[str, str | None]]) -> tuple[str, str | None]:
    """What the reader of a text that has ended returns."""
    try:
        next(steps)
    except StopIteration as end:
        found: tuple[str, str | None] = end.value
        return found
    raise AssertionError("a reader of a text that has ended waits for more")
