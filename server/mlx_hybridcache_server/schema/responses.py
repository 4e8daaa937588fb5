"""What a client of OpenAI's Responses API may send. What is not named here is ignored, or said."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, WithJsonSchema

from .requests import Arrangement, Body, Share

Item = dict[str, Any]

ROLES = ("user", "assistant", "system", "developer")
CALLS = ("function_call", "custom_tool_call")


def _is_item(item: Item) -> Item:
    kind = item["type"] = "message" if item.get("type") is None else item["type"]
    if not isinstance(kind, str):
        raise ValueError("an item's type must be text")  # noqa: TRY004  # what pydantic reads
    if kind == "message":
        if item.get("role") not in ROLES:
            raise ValueError(f"a message needs a role: {', '.join(ROLES)}")
        content = item.get("content")
        if not (isinstance(content, str) or _is_list_of_objects(content)):
            raise ValueError("content must be text, or a list of parts")
    if kind in CALLS and not isinstance(item.get("name"), str):
        raise ValueError("a call needs a name")  # what pydantic reads
    return item


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _is_tool(tool: dict[str, Any]) -> dict[str, Any]:
    kind = tool.get("type")
    if not isinstance(kind, str):
        raise ValueError("a tool needs a type, such as function")  # noqa: TRY004  # what pydantic reads
    if kind in ("function", "custom") and not isinstance(tool.get("name"), str):
        raise ValueError("a function needs a name")  # what pydantic reads
    if not isinstance(tool.get("description"), str | None):
        raise ValueError("description must be text")  # noqa: TRY004  # what pydantic reads
    if not isinstance(tool.get("parameters"), dict | None):
        raise ValueError("parameters must be a JSON schema")  # noqa: TRY004  # what pydantic reads
    return tool


_ITEM = {
    "type": "object",
    "properties": {
        "type": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "role": {"enum": list(ROLES)},
    },
    "examples": [{"role": "user", "content": "Hello"}],
}
_TOOL = {
    "type": "object",
    "properties": {
        "type": {"type": "string", "examples": ["function", "custom"]},
        "name": {"type": "string"},
        "parameters": {"anyOf": [{"type": "object"}, {"type": "null"}]},
    },
    "required": ["type"],
}

# Dicts, not models: a history is kept with all its fields, and what is unknown gets a sentence.
InputItem = Annotated[dict[str, Any], AfterValidator(_is_item), WithJsonSchema(_ITEM)]
Tool = Annotated[dict[str, Any], AfterValidator(_is_tool), WithJsonSchema(_TOOL)]


class Reasoning(Body):
    """How much the model is to reason. Summaries are not made: reasoning is told in full."""

    effort: str | None = None


class TextFormat(Body):
    """The form of a reply; a schema holds it whether `strict` or not."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    content: dict[str, Any] | None = Field(None, alias="schema")


class TextConfig(Body):
    """How the reply's text is to be."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ToolName(Body):
    """A tool by its type and name."""

    type: Literal["function", "custom"]
    name: str


class Allowed(Body):
    """The tools that may be called, and whether one must be."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ToolName]


class ResponsesBody(Arrangement):
    """`POST /v1/responses`."""

    model: str | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolName | Allowed | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Share | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: dict[str, Any] | None = None
    top_logprobs: int | None = None
    cache_salt: str | None = None
    keep_alive: Any = None
    adapters: str | None = None
    prompt_cache_retention: Any = None
