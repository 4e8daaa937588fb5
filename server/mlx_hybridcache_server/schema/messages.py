"""What a client of Anthropic's Messages API may send. What is not named here is ignored, or said."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from .requests import Arrangement, Body, Count, Share

Block = dict[str, Any]
Stop = Annotated[str, Field(min_length=1)]

ROLES = ("user", "assistant", "system", "developer")


def _is_content(content: Any) -> bool:
    return isinstance(content, str) or (
        isinstance(content, list) and all(isinstance(block, dict) for block in content)
    )


def _is_message(message: dict[str, Any]) -> dict[str, Any]:
    if message.get("role") not in ROLES:
        raise ValueError(f"a message needs a role: {', '.join(ROLES)}")
    if not _is_content(message.get("content")):
        raise ValueError("content must be text, or a list of blocks")
    for block in message["content"] if isinstance(message["content"], list) else ():
        if block.get("type") == "tool_use" and not isinstance(block.get("name"), str):
            raise ValueError("a tool_use block needs a name")
    return message


def _is_system(system: Any) -> Any:
    if not _is_content(system):
        raise ValueError("system must be text, or a list of blocks")
    return system


def _is_tool(tool: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(tool.get("name", tool.get("type")), str):
        raise ValueError("a tool needs a name")  # noqa: TRY004  # what pydantic reads
    if not isinstance(tool.get("description"), str | None):
        raise ValueError("description must be text")  # noqa: TRY004  # what pydantic reads
    if not isinstance(tool.get("input_schema"), dict | None):
        raise ValueError("input_schema must be a JSON schema")  # noqa: TRY004  # what pydantic reads
    return tool


_BLOCKS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
_MESSAGE = {
    "type": "object",
    "properties": {"role": {"enum": list(ROLES)}, "content": _BLOCKS},
    "required": ["role", "content"],
}
_TOOL = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "description": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "input_schema": {"anyOf": [{"type": "object"}, {"type": "null"}]},
    },
    "required": ["name"],
}

# Dicts, not models: a history is kept with all its fields, and what is unknown gets a sentence.
Message = Annotated[dict[str, Any], AfterValidator(_is_message), WithJsonSchema(_MESSAGE)]
System = Annotated[Any, AfterValidator(_is_system), WithJsonSchema(_BLOCKS)]
Tool = Annotated[dict[str, Any], AfterValidator(_is_tool), WithJsonSchema(_TOOL)]


class ToolChoice(Body):
    """Which tools may be called, and whether one must be."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _has_name(self) -> Self:
        if self.type == "tool" and not self.name:
            raise ValueError("a choice of type tool needs its name")
        return self


class Thinking(Body):
    """Whether the model is to reason, and how much. `adaptive` leaves that to its template."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None


class OutputFormat(Body):
    """A schema that the reply is held to."""

    type: Literal["json_schema"]
    content: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How much effort the model is to make, and in which form it is to reply."""

    effort: str | None = None
    format: OutputFormat | None = None


class CountBody(Arrangement):
    """`POST /v1/messages/count_tokens`: a conversation with what is rendered of it."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    system: System | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    context_management: dict[str, Any] | None = None
    mcp_servers: list[Any] | None = None
    container: Any = None
    cache_salt: str | None = None
    keep_alive: Any = None
    adapters: str | None = None
    cache_control: dict[str, Any] | None = None


class MessagesBody(CountBody):
    """`POST /v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Share | None = None
    top_k: Count | None = None
