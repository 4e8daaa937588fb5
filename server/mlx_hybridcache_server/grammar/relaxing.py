"""Tools that need not be called, and whose schemas no grammar can follow: without what cannot be said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .narrowing import Schema, without_notes
from .speech import GrammarError, Tool, Wanted, name_of

Fault = Callable[[Wanted], str | None]
"""Why there is no grammar of what is wanted; None when there is."""


class ToolError(GrammarError):
    """A tool that cannot be followed, by its name."""


def without_notes_in(tool: Tool) -> Tool:
    """A tool of whose parameters only that is left which their grammar depends on."""
    function = tool["function"]
    if not isinstance(function.get("parameters"), dict):
        return tool
    parameters = without_notes(function["parameters"])
    return {**tool, "function": {**function, "parameters": parameters}}


def relaxed(wanted: Wanted, fault: Fault) -> tuple[Wanted, list[str]]:
    """`wanted` with tools that can be followed, and a sentence for each that was made so.

    Raises `ToolError` for one that must be called, or that nothing helps.
    """
    must = len(wanted.tools) == 1 and wanted.schema is None and not wanted.is_free
    tools: list[Tool] = []
    lenient: frozenset[str] = frozenset()
    said = []
    for tool in wanted.tools:
        alone = Wanted(tools=[tool])
        why = fault(alone)
        followed = alone if why is None else None if must else _followed(tool, fault)
        if followed is None:
            raise ToolError(f"Calls of {name_of(tool)} cannot be held to its parameters: {why}.")
        if why is not None:
            said.append(f"calls of {name_of(tool)} are held to its parameters in part only: {why}")
        tools += followed.tools
        lenient |= followed.lenient
    return replace(wanted, tools=tools, lenient=lenient), said


def _followed(tool: Tool, fault: Fault) -> Wanted | None:
    """The tool without the keywords that are not known, else with the names of its parameters alone."""
    lenient = Wanted(tools=[tool], lenient=frozenset({name_of(tool)}))
    named = Wanted(tools=[_with_names(tool)])
    return next((tried for tried in (lenient, named) if fault(tried) is None), None)


def _with_names(tool: Tool) -> Tool:
    given = tool["function"].get("parameters")
    given = given if isinstance(given, dict) else {}
    names, required = given.get("properties"), given.get("required")
    known: Schema = {name: {} for name in names} if isinstance(names, dict) else {}
    kept = [name for name in required if name in known] if isinstance(required, list) else []
    parameters = {"type": "object", "properties": known, "required": kept}
    return {**tool, "function": {**tool["function"], "parameters": parameters}}
