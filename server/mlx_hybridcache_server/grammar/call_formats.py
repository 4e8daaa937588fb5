"""How calls are written in each format, under the names of mlx-lm's parsers of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from .gemma_calls import GemmaCalls
from .lark import Lark
from .markup_calls import MarkupCalls
from .named_values import bare_texts
from .object_calls import MistralCalls, NumberedCalls, ObjectCalls, PythonicCalls
from .speech import Speech, Tool, parameters_of


class CallFormat(Protocol):
    """A format of calls."""

    @property
    def has_bare_values(self) -> bool:
        """Whether texts stand as they are beside values in JSON, so that only a type tells them apart."""
        ...

    def calls(self, lark: Lark, tools: Sequence[Tool], most: int | None) -> str:
        """The grammar of calls, `most` at most, with the markers around them."""
        ...


_NO_QUOTES = r"\s<>\"'&"

_GLM = MarkupCalls(
    ("", ""),
    ("<arg_key>", "</arg_key>"),
    "</arg_value>",
    before_value="<arg_value>",
    inner=("<arg_value>", "</arg_value>", "<arg_key>"),
    marks=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    has_lines=True,
)

FORMATS: Mapping[str, CallFormat] = {
    "function_gemma": GemmaCalls("<escape>"),
    "gemma4": GemmaCalls('<|"|>'),
    "glm47": _GLM,
    "json_tools": ObjectCalls(),
    "kimi_k2": NumberedCalls(),
    "kimi_k3": MarkupCalls(
        ('<|open|>call tool="', '" index="#"<|sep|>'),
        ('<|open|>argument key="', '"<|sep|>'),
        "<|close|>argument<|sep|>",
        end="<|close|>call<|sep|>",
        inner=("<|close|>argument<|sep|>", "<|close|>call<|sep|>"),
        marks=("<|open|>", "<|close|>", "<|sep|>"),
        unwritable=_NO_QUOTES,
        is_shared=True,
        has_types=True,
    ),
    "laguna": _GLM,
    "longcat": MarkupCalls(
        ("", ""),
        ("<longcat_arg_key>", "</longcat_arg_key>"),
        "</longcat_arg_value>",
        before_value="<longcat_arg_value>",
        inner=("<longcat_arg_value>", "</longcat_arg_value>", "<longcat_arg_key>"),
        marks=(
            "<longcat_arg_key>",
            "</longcat_arg_key>",
            "<longcat_arg_value>",
            "</longcat_arg_value>",
        ),
        has_lines=True,
        has_objects=True,
    ),
    "minicpm5": MarkupCalls(
        ('"', '">'),
        ('<param name="', '">'),
        "</param>",
        inner=("</param>",),
        unwritable=_NO_QUOTES,
        has_cdata=True,
    ),
    "minimax_m2": MarkupCalls(
        ('<invoke name="', '">\n'),
        ('<parameter name="', '">'),
        "</parameter>\n",
        end="</invoke>\n",
        begin="\n",
        inner=("</parameter>", "</invoke>"),
        unwritable=_NO_QUOTES,
        is_shared=True,
    ),
    "mistral": MistralCalls(),
    "muse_spark": MarkupCalls(
        ('<atem:invoke name="', '">\n'),
        ('<atem:parameter name="', '">'),
        "</atem:parameter>\n",
        end="</atem:invoke>\n",
        begin="\n",
        inner=("</atem:parameter>", "</atem:invoke>"),
        unwritable=_NO_QUOTES,
        is_shared=True,
    ),
    "pythonic": PythonicCalls(),
    "qwen3_coder": MarkupCalls(
        ("<function=", ">\n"),
        ("<parameter=", ">\n"),
        "\n</parameter>\n",
        end="</function>\n",
        begin="\n",
        inner=("</parameter>", "</function>"),
    ),
}
"""Each is what mlx-lm's parser of that name reads, as the templates that it was made for write it."""


def for_reader(speech: Speech, tools: Sequence[Tool]) -> list[Tool]:
    """`tools` as the reader of calls must see them to read calls back as they were written here."""
    form = FORMATS.get(speech.parser or "")
    if form is None or not form.has_bare_values:
        return list(tools)
    return [_with_types(tool) for tool in tools]


def _with_types(tool: Tool) -> Tool:
    # Without a type a value is read as JSON of any kind.
    properties = {
        name: {} if bare_texts(schema) is None else {"type": "string"}
        for name, schema in parameters_of(tool).get("properties", {}).items()
    }
    function = {"name": tool["function"]["name"], "parameters": {"properties": properties}}
    return {"type": "function", "function": function}
