"""Which tools a reply may call. All stay in the prompt, so that another choice leaves it as it was."""

from __future__ import annotations

from typing import Any

from ..errors import refuse
from .requests import (
    AllowedChoice,
    ChatBody,
    GenerationBody,
    NamedTool,
)


def callable_tools(body: ChatBody) -> list[dict[str, Any]]:
    """The tools that a reply may call. Raises `ApiError` 400 for a choice among those that there are not."""
    tools, choice = body.tools or [], body.tool_choice
    if choice == "none":
        return []
    if isinstance(choice, NamedTool | AllowedChoice):
        named = [choice] if isinstance(choice, NamedTool) else choice.allowed_tools.tools
        names = {each.function.name for each in named}
        if missing := sorted(names - {tool["function"]["name"] for tool in tools}):
            raise refuse(f"No tool is named {', '.join(missing)}.", "tool_choice")
        tools = [tool for tool in tools if tool["function"]["name"] in names]
    if not tools and is_forced(body):
        raise refuse("tool_choice asks for a call, but there are no tools.", "tool_choice")
    return tools


def is_forced(body: GenerationBody) -> bool:
    """Whether a call must come."""
    if not isinstance(body, ChatBody):
        return False
    choice = body.tool_choice
    if isinstance(choice, AllowedChoice):
        return choice.allowed_tools.mode == "required"
    return choice == "required" or isinstance(choice, NamedTool)


def is_narrowed(body: GenerationBody) -> bool:
    """Whether a reply is free to call some of the tools, and not the others."""
    is_free = isinstance(body, ChatBody) and isinstance(body.tool_choice, AllowedChoice)
    return is_free and not is_forced(body)


def is_silent(body: GenerationBody) -> bool:
    """Whether a reply must do without the tools that its prompt speaks of."""
    return isinstance(body, ChatBody) and bool(body.tools) and not callable_tools(body)
