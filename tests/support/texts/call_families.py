"""Tokenizers of every family that mlx-lm reads calls of, with a template as theirs, and calls as these models write them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bundled import load
from mlx_lm import tokenizer_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken

Calls = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Family:
    """What its template and vocabulary have, and how it writes a reply that calls.

    `defaults`: what mlx-lm knows of its models, where it does not see it by the template.
    """

    template: str
    tokens: tuple[str, ...]
    write: Callable[[Calls], str]
    defaults: tuple[tuple[str, str], ...] = ()


def plain(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def each(write: Callable[[str, dict[str, Any]], str]) -> Callable[[Calls], str]:
    """Calls with markers of their own."""
    return lambda calls: "".join(write(name, values) for name, values in calls)


def among(start: str, write: Callable[[str, dict[str, Any]], str], end: str) -> Callable[..., str]:
    """Calls between one pair of markers."""
    return lambda calls: start + each(write)(calls) + end


def tagged(call: str, value: str, end: str, written: Callable[[Any], str] = plain) -> Any:
    """Calls in tags: `%s` stands for a name, and then for a value."""

    def write(name: str, values: dict[str, Any]) -> str:
        return call % name + "".join(value % (k, written(v)) for k, v in values.items()) + end

    return write


def in_cdata(value: Any) -> str:
    """As MiniCPM5 writes what is no plain word."""
    text = plain(value)
    is_word = text == text.strip() and not set(text) & set("<&\n")
    return text if is_word or not isinstance(value, str) else f"<![CDATA[{text}]]>"


def with_types(name: str, values: dict[str, Any]) -> str:
    """As Kimi K3 writes a call."""
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array"}
    typed = [(key, value, kinds.get(type(value), "object")) for key, value in values.items()]
    return "".join(
        [
            f'<|open|>call tool="{name}" index="1"<|sep|>',
            *(
                f'<|open|>argument key="{k}" type="{kind}"<|sep|>{plain(v)}<|close|>argument<|sep|>'
                for k, v, kind in typed
            ),
            "<|close|>call<|sep|>",
        ]
    )


def gemma(value: Any, mark: str) -> str:
    """As Gemma's templates write values."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{gemma(v, mark)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(gemma(v, mark) for v in value)}]"
    return f"{mark}{value}{mark}" if isinstance(value, str) else json.dumps(value)


def as_gemma(start: str, end: str, mark: str) -> Callable[[Calls], str]:
    """Each between its markers."""
    return each(lambda name, values: f"{start}call:{name}{gemma(values, mark)}{end}")


def as_object(name: str, values: dict[str, Any]) -> str:
    """A call as one object."""
    return json.dumps({"name": name, "arguments": values}, ensure_ascii=False)


def pythonic(calls: Calls) -> str:
    """As LFM2 writes them."""

    def write(name: str, values: dict[str, Any]) -> str:
        named = (f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in values.items())
        return f"{name}({', '.join(named)})"

    listed = ", ".join(write(*call) for call in calls)
    return f"<|tool_call_start|>[{listed}]<|tool_call_end|>"


def longcat(name: str, values: dict[str, Any]) -> str:
    """A call without arguments is an object."""
    write = tagged(
        "%s\n",
        "<longcat_arg_key>%s</longcat_arg_key>\n<longcat_arg_value>%s</longcat_arg_value>\n",
        "",
    )
    inner = write(name, values) if values else as_object(name, values)
    return f"<longcat_tool_call>{inner}</longcat_tool_call>"


def numbered(calls: Calls) -> str:
    """As Kimi K2."""
    inner = "".join(
        f"<|tool_call_begin|>functions.{name}:{at}<|tool_call_argument_begin|>"
        f"{json.dumps(values, ensure_ascii=False)}<|tool_call_end|>"
        for at, (name, values) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


GLM_TAGS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
GLM = each(
    tagged(
        "<tool_call>%s\n",
        "<arg_key>%s</arg_key>\n<arg_value>%s</arg_value>\n",
        "</tool_call>",
    )
)
FAMILIES = {
    "function_gemma": Family(
        "<start_function_call>call:{{ name }}{}<end_function_call>",
        ("<start_function_call>", "<end_function_call>", "<escape>"),
        as_gemma("<start_function_call>", "<end_function_call>", "<escape>"),
    ),
    "gemma4": Family(
        "<|tool_call>call:{{ name }}{}<tool_call|>",
        ("<|tool_call>", "<tool_call|>", '<|"|>'),
        as_gemma("<|tool_call>", "<tool_call|>", '<|"|>'),
    ),
    "glm47": Family("<tool_call>{{ name }}<arg_key>", GLM_TAGS, GLM),
    "json_tools": Family(
        '<tool_call>\n{"name": {{ tool_call.name }}}\n</tool_call>',
        (),
        each(lambda name, values: f"<tool_call>\n{as_object(name, values)}\n</tool_call>"),
    ),
    "kimi_k2": Family(
        "<|tool_calls_section_begin|>",
        (
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
        ),
        numbered,
    ),
    "kimi_k3": Family(
        "{{ messages }}",
        ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"),
        among("<|open|>tools<|sep|>", with_types, "<|close|>tools<|sep|>"),
    ),
    "laguna": Family("<tool_call>{{ name }}<arg_key>", (), GLM, (("tool_parser_type", "laguna"),)),
    "longcat": Family("<longcat_tool_call>{{ name }}", ("<longcat_tool_call>",), each(longcat)),
    "minicpm5": Family(
        '<function name="{{ name }}"><param name="{{ key }}">{{ value }}</param></function>',
        (),
        each(
            tagged('<function name="%s">', '<param name="%s">%s</param>', "</function>", in_cdata)
        ),
    ),
    "minimax_m2": Family(
        '<minimax:tool_call>\n<invoke name="{{ name }}">',
        ("<minimax:tool_call>", "</minimax:tool_call>"),
        among(
            "<minimax:tool_call>\n",
            tagged('<invoke name="%s">\n', '<parameter name="%s">%s</parameter>\n', "</invoke>\n"),
            "</minimax:tool_call>",
        ),
    ),
    "mistral": Family(
        '[TOOL_CALLS][{"name": "{{ name }}"}]',
        ("[TOOL_CALLS]",),
        lambda calls: f"[TOOL_CALLS][{', '.join(as_object(*call) for call in calls)}]",
    ),
    "muse_spark": Family(
        "<|start|>assistant to={{ name }}<|message|><atem:function_calls>",
        ("<|start|>", "<|message|>", "<|eom|>", "<|eot|>"),
        among(
            " to=tools<|message|><atem:function_calls>\n",
            tagged(
                '<atem:invoke name="%s">\n',
                '<atem:parameter name="%s">%s</atem:parameter>\n',
                "</atem:invoke>\n",
            ),
            "</atem:function_calls>",
        ),
        (("chat_template_type", "muse_spark"), ("tool_parser_type", "muse_spark")),
    ),
    "pythonic": Family(
        "<|tool_list_start|>{{ tools }}<|tool_list_end|>",
        ("<|tool_call_start|>", "<|tool_call_end|>"),
        pythonic,
    ),
    "qwen3_coder": Family(
        "<tool_call>\n<function={{ name }}>",
        (),
        each(
            tagged(
                "<tool_call>\n<function=%s>\n",
                "<parameter=%s>\n%s\n</parameter>\n",
                "</function>\n</tool_call>",
            )
        ),
    ),
}


@cache
def tokenizer_of(name: str) -> TokenizerWrapper:
    """The bundled vocabulary with a family's markers and template, as mlx-lm loads it."""
    family, (_, bundled) = FAMILIES[name], load()
    made = copy.deepcopy(bundled._tokenizer)
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in family.tokens])
    with TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        place = Path(folder, "tokenizer_config.json")
        config = json.loads(place.read_text())
        config.pop("tool_parser_type", None)
        place.write_text(json.dumps(config | {"chat_template": family.template}))
        Path(folder, "chat_template.jinja").write_text(family.template)
        return tokenizer_utils.load(
            Path(folder),
            eos_token_ids=sorted(bundled.eos_token_ids),
            defaults=dict(family.defaults),
        )
