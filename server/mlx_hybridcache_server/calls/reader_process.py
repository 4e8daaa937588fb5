"""Reading one call: in the server, or as a process of its own that imports little and may be ended."""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from inspect import signature
from types import ModuleType
from typing import Any

from ..jsontext import check, strict

Parser = Callable[..., Any]
"""Of a text, and of the tools that were offered if it takes them."""

MEMORY_BYTES = 2 * 2**30

Calls = list[dict[str, str]]
"""Of each its `name`, its `arguments` as JSON, and the `id` that the model gave it, or an empty one."""


def called(parse: Parser, text: str, tools: list[dict[str, Any]] | None) -> Calls | None:
    """The calls in `text`; None when it is none, or has what JSON has not."""
    try:
        parsed = parse(*(text, tools)[: len(signature(parse).parameters)])
        return [_call(one) for one in (parsed if isinstance(parsed, list) else [parsed])] or None
    except Exception:  # parsers raise whatever they trip over
        return None


def _call(parsed: dict[str, Any]) -> dict[str, str]:
    name, arguments, given = parsed["name"], parsed.get("arguments", {}), parsed.get("id")
    if not isinstance(name, str):
        raise TypeError("a name is text")
    if isinstance(arguments, str) and arguments:
        check(arguments)
    else:
        arguments = strict({} if arguments == "" else arguments)
    return {"name": name, "arguments": arguments, "id": given if isinstance(given, str) else ""}


def main() -> None:
    """Read one text in this process: of standard input, with a parser that the arguments name."""
    with suppress(OSError, ValueError):  # a bound that the system does not have
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    seconds, module, name, *places = sys.argv[2:]
    # The packages of parsers begin by loading MLX, of which parsers need nothing.
    package = ModuleType(module.partition(".")[0])
    package.__path__ = places
    if "." in module:
        sys.modules[package.__name__] = package
    parse = getattr(import_module(module), name)
    question = json.load(sys.stdin.buffer)
    # Its signal ends a process, whatever that does.
    signal.setitimer(signal.ITIMER_PROF, float(seconds))
    answer = json.dumps(called(parse, question["text"], question["tools"]))
    sys.stdout.buffer.write(answer.encode())
