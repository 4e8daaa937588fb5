"""Formats of calls that look like XML: names in tags, and values as plain text between them.

A string is given out as it is written, to the last white space. Other values wait for their end, and
are read by the schema of their parameter. A value whose end is missing ends where the next parameter
begins, or the call.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .argument_types import Parameter, Parameters
from .incoming import Arguments, Begin, BrokenCallError, End, Incoming, Steps, Text, collected
from .json_formats import (
    MOST_NAME,
    Format,
    Offered,
    json_object,
    json_tools,
    known,
)
from .json_reader import quoted

MOST_ATTRIBUTES = 64
"""Characters of a tag beside its name."""

Name = Callable[[str], str]
Ending = Literal["closed", "next", "over", "cut"]
"""How a value ended: with its tag; with that of the next parameter; with its call; or it did not."""


class Missing(NamedTuple):
    """Declared parameters that were not given yet, and the length of the longest name."""

    names: set[str]
    longest: int


_ATTRIBUTE = re.compile(r'([\w:-]+)\s*=\s*"([^"]*)"')


def _bare(text: str) -> str:
    text = text.strip()
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if is_quoted else text


def _attribute(key: str) -> Name:
    return lambda text: html.unescape(dict(_ATTRIBUTE.findall(text)).get(key, ""))


@dataclass(frozen=True, slots=True)
class Markup:
    """A format. `call` and `parameter` are what stands in front of a name and behind it; `value` is
    what begins a value, `close` what ends it, `end` what ends a call if anything does.

    `is_lined`: values stand on lines of their own.
    """

    call: tuple[str, str]
    parameter: tuple[str, str]
    close: str
    end: str = ""
    value: str = ""
    is_lined: bool = False
    call_name: Name = _bare
    parameter_name: Name = _bare
    has_cdata: bool = False
    json_block: tuple[str, str] | None = None

    @property
    def ends(self) -> tuple[str, ...]:
        """What may end a value, right or not."""
        line = "\n" if self.is_lined else ""
        others = tuple(line + each for each in (self.parameter[0], self.end) if each)
        return (self.close, "\n" + self.close, *others) if line else (self.close, *others)


QWEN3_CODER = Markup(
    ("<function=", ">"),
    ("<parameter=", ">"),
    "</parameter>",
    "</function>",
    is_lined=True,
)
MINIMAX_M2 = Markup(("<invoke name=", ">"), ("<parameter name=", ">"), "</parameter>", "</invoke>")
MINICPM5 = Markup(("", ">"), ("<param name=", ">"), "</param>", has_cdata=True)
MUSE_SPARK = Markup(
    ("<atem:invoke", ">"),
    ("<atem:parameter", ">"),
    "</atem:parameter>",
    "</atem:invoke>",
    call_name=_attribute("name"),
    parameter_name=_attribute("name"),
)
KIMI_K3 = Markup(
    ("<|open|>call", "<|sep|>"),
    ("<|open|>argument", "<|sep|>"),
    "<|close|>argument<|sep|>",
    "<|close|>call<|sep|>",
    call_name=_attribute("tool"),
    parameter_name=_attribute("key"),
    json_block=("<|open|>json", "<|close|>json<|sep|>"),
)
GLM47 = Markup(("", "<arg_key>"), ("<arg_key>", "</arg_key>"), "</arg_value>", value="<arg_value>")
LONGCAT = Markup(
    ("", "<longcat_arg_key>"),
    ("<longcat_arg_key>", "</longcat_arg_key>"),
    "</longcat_arg_value>",
    value="<longcat_arg_value>",
)


def reader(form: Markup) -> Format:
    """Reads the calls of a format, one or several, or one in JSON, as these models write at times."""

    def read(source: Incoming, offered: Offered) -> Steps[None]:
        while True:
            yield from source.space()
            if source.is_read:
                return
            if (yield from source.peek(1)) in ("{", "["):
                yield from json_tools(source, offered)
                return
            yield from _call(source, form, offered)

    return read


def _call(source: Incoming, form: Markup, offered: Offered) -> Steps[None]:
    name, has_parameter = yield from _function(source, form)
    parameters = known(name, offered)
    if form.json_block is not None and (yield from source.accept(form.json_block[0])):
        yield from _json_block(source, form, name)
        return
    if not has_parameter:
        yield from source.space()
        has_parameter = yield from source.accept(form.parameter[0])
    if not has_parameter and not (yield from _is_over(source, form)):
        raise BrokenCallError
    yield Begin(name)
    yield Arguments("{")
    if has_parameter and not (yield from _parameters(source, form, parameters)):
        return
    yield Arguments("}")
    yield End()


def _function(source: Incoming, form: Markup) -> Steps[tuple[str, bool]]:
    """The name, and whether a parameter has begun behind it."""
    before, behind = form.call
    if not (yield from source.accept(before)):
        raise BrokenCallError
    head, marker = yield from source.until(behind, most=MOST_NAME)
    begins = behind == form.parameter[0]
    if marker is None and not (begins and source.is_read):
        raise BrokenCallError
    return form.call_name(head), begins and marker is not None


def _is_over(source: Incoming, form: Markup) -> Steps[bool]:
    """Whether a call ends here. One that the model ended is over without its tag, too."""
    yield from source.space()
    if form.end and (yield from source.accept(form.end)):
        return True
    return source.is_read and source.is_whole


def _parameters(source: Incoming, form: Markup, parameters: Parameters) -> Steps[bool]:
    """All of them, the first one's tag begun; whether the call is complete."""
    missing, comma = set(parameters.properties), ""
    while True:
        head, marker = yield from source.until(form.parameter[1], most=MOST_NAME)
        if marker is None and source.is_read and not source.is_whole:
            yield Arguments(f"{comma}{quoted(head)[:-1]}")
            return False
        if marker is None:
            raise BrokenCallError(head)
        name = form.parameter_name(head)
        yield Arguments(f"{comma}{quoted(name)}: ")
        comma = ", "
        missing.discard(name)
        longest = parameters.longest_name if missing else 0
        ending = yield from _value(source, form, parameters[name], Missing(missing, longest))
        if ending == "over":
            return True
        if ending == "cut":
            return False
        if ending == "closed":
            yield from source.space()
            if not (yield from source.accept(form.parameter[0])):
                break
    if (yield from _is_over(source, form)):
        return True
    if not (yield from _is_cut(source, form.parameter[0], form.end)):
        raise BrokenCallError
    return False


def _is_cut(source: Incoming, *tags: str) -> Steps[bool]:
    """Whether the text ends where one of these should stand, or within it."""
    rest = yield from source.peek(max(map(len, tags)))
    if not source.has_ended or source.is_whole or not any(tag.startswith(rest) for tag in tags):
        return False
    source.skip(len(rest))
    return True


def _value(source: Incoming, form: Markup, parameter: Parameter, missing: Missing) -> Steps[Ending]:
    if form.value:
        yield from source.space()
        if (yield from _is_cut(source, form.value)):
            return "cut"
        if not (yield from source.accept(form.value)):
            raise BrokenCallError
    steps = _raw_value(source, form, missing)
    if not parameter.is_free_text:
        raw, ending = yield from collected(steps)
        yield Arguments(quoted(raw)[:-1] if ending == "cut" else parameter.read(raw))
        return ending
    yield Arguments('"')
    ending = yield from _quoted(steps)
    if ending != "cut":
        yield Arguments('"')
    return ending


def _quoted(steps: Steps[Ending]) -> Steps[Ending]:
    """The text of a string as it stands between its quotes."""
    while True:
        try:
            event = next(steps)
        except StopIteration as end:
            ending: Ending = end.value
            return ending
        yield Arguments(quoted(event.text)[1:-1]) if isinstance(event, Text) else event


def _raw_value(source: Incoming, form: Markup, missing: Missing) -> Steps[Ending]:
    """A value's text, piece by piece."""
    if (yield from _begins_cdata(source, form)):
        return (yield from _cdata(source, form))
    while True:
        text, marker = source.part(form.ends)
        if source.is_read and marker is None and source.is_whole:
            yield Text(text.removesuffix("\n") if form.is_lined else text)
            return "over"
        if text:
            yield Text(text)
        if marker is None:
            if source.is_read:
                return "cut"
            yield None
        elif marker.endswith(form.close):
            return "closed"
        else:
            ending, text = yield from _early(source, form, marker, missing)
            if ending is not None:
                return ending
            yield Text(text)


def _begins_cdata(source: Incoming, form: Markup) -> Steps[bool]:
    """Whether a value is written as CDATA; else what stands before its text is read."""
    if form.is_lined:
        yield from source.accept("\n")
    if not form.has_cdata:
        return False
    space = yield from source.space()
    if (yield from source.accept("<![CDATA[")):
        return True
    yield Text(space)
    return False


def _early(
    source: Incoming, form: Markup, marker: str, missing: Missing
) -> Steps[tuple[Ending | None, str]]:
    """How a value ends at a tag that is not its own; else the text that the tag is part of."""
    if marker.endswith(form.parameter[0]):
        return ("next" if (yield from _is_missing(source, form, missing)) else None), marker
    space = yield from source.space()
    following = yield from source.peek(len(form.call[0]))
    return ("over" if source.is_read or following == form.call[0] else None), marker + space


def _is_missing(source: Incoming, form: Markup, missing: Missing) -> Steps[bool]:
    """Whether the tag that has begun is that of a parameter which is declared and was not given."""
    longest = missing.longest + len(form.parameter[1]) + MOST_ATTRIBUTES
    name, marker, _ = (yield from source.peek(longest)).partition(form.parameter[1])
    return bool(marker) and form.parameter_name(name) in missing.names


def _cdata(source: Incoming, form: Markup) -> Steps[Ending]:
    while True:
        text, marker = source.part(("]]>",))
        yield Text(text)
        if marker is not None:
            yield from source.space()
            if not (yield from source.accept(form.close)):
                raise BrokenCallError
            return "closed"
        if source.is_read:
            return "cut"
        yield None


def _json_block(source: Incoming, form: Markup, name: str) -> Steps[None]:
    """All arguments as one object."""
    assert form.json_block is not None
    _, marker = yield from source.until(form.parameter[1], most=MOST_NAME)
    yield from source.space()
    if marker is None or (yield from source.peek(1)) != "{":
        raise BrokenCallError
    yield Begin(name)
    yield from json_object(source)
    yield from source.space()
    yield from source.accept(form.json_block[1])
    yield from _is_over(source, form)
