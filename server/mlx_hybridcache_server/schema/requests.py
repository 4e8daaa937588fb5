"""What a client may send. Null means the default; what is not named here is ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)

from .dialects import Dialect

Count = Annotated[int, Field(ge=0, lt=2**31)]  # what an index in MLX holds
Share = Annotated[float, Field(ge=0, le=1)]
TokenIds = Annotated[list[int], Field(min_length=1)]

MOST_CHOICES = 8


def _is_message(message: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        raise ValueError("a message needs a role, such as user")  # noqa: TRY004  # what pydantic reads
    content = message.get("content")
    if not (content is None or isinstance(content, str | list)):
        raise ValueError("content must be text, a list of text parts, or null")
    calls = message.get("tool_calls")
    if calls is not None and not (
        isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    ):
        raise ValueError("tool_calls must be a list of objects")
    return message


def _is_tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        raise ValueError('a tool must be {"type": "function", "function": {...}}')
    if not isinstance(function.get("name"), str):
        raise ValueError("a function needs a name")  # noqa: TRY004  # what pydantic reads
    return tool


_PART = {
    "description": "Text. Of another kind it is refused in the question that is to be answered, and "
    "a sentence stands in its place elsewhere.",
    "examples": [{"type": "text", "text": "Hello"}],
}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "examples": ["system", "user", "assistant", "tool"]},
        "content": {
            "anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]
        },
        "tool_calls": {"anyOf": [{"type": "array", "items": {"type": "object"}}, {"type": "null"}]},
    },
    "required": ["role"],
}
_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
        },
    },
    "required": ["function"],
}

# Dicts, not models: the chat template reads them with all their fields, in the client's order.
Message = Annotated[dict[str, Any], AfterValidator(_is_message), WithJsonSchema(_MESSAGE)]
Tool = Annotated[dict[str, Any], AfterValidator(_is_tool), WithJsonSchema(_TOOL)]


class Body(BaseModel):
    """Numbers must be numbers: "5" and true are refused, as mlx_lm.server refuses them."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Body):
    """What else a stream carries."""

    include_usage: bool | None = None


class JsonSchema(Body):
    """A schema as OpenAI wraps it. A reply is held to it whether `strict` or not."""

    name: str | None = None
    content: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of a reply."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class NamedFunction(Body):
    """A function by its name."""

    name: str


class NamedTool(Body):
    """A tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    """The tools that may be called, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedChoice(Body):
    """A choice among the tools. All of them stay in the prompt, which stays the same."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class GenerationBody(Body):
    """What chats and completions have in common. Ranges are mlx_lm.server's, and OpenAI's."""

    endpoint: ClassVar[str]

    _warnings: list[str] = PrivateAttr(default_factory=list)
    _dialect: Dialect = PrivateAttr(default_factory=Dialect)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Share | None = None
    top_k: Count | None = None
    min_p: Share | None = None
    xtc_probability: Share | None = None
    xtc_threshold: Share | None = None
    repetition_penalty: Annotated[float, Field(ge=0)] | None = None
    repetition_context_size: Count | None = None
    presence_penalty: float | None = None
    presence_context_size: Count | None = None
    frequency_penalty: float | None = None
    frequency_context_size: Count | None = None
    logit_bias: dict[str, float] | None = None
    top_logprobs: Annotated[int, Field(ge=-1, le=20)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    response_format: ResponseFormat | None = None
    cache_salt: str | None = None
    cache_prompt: bool | None = None
    keep_alive: Any = None
    draft_model: str | None = None
    num_draft_tokens: Count | None = None
    adapters: str | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Count] | None = None
    thinking_budget: Count | None = None
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _followed(cls, sent: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        """With other servers' fields under our own names; what cannot be followed is warned of."""
        dialect = Dialect()
        body = read(dialect.followed(sent) if isinstance(sent, dict) else sent)
        body._dialect = dialect
        for name, sentence in dialect.warnings:
            body.warn(name, sentence)
        return body

    @property
    def switches_thinking(self) -> bool:
        """Whether the request says that the model is to think, or not to."""
        return self._dialect.switches_thinking

    @property
    def wants_function_call(self) -> bool:
        """Whether a call is to be answered as clients of `functions` read it."""
        return self._dialect.wants_function_call

    def warn(self, field: str, sentence: str) -> None:
        """Have the client and the log told that `field` is not followed to the letter, and why.

        Say nothing of what a client wrote: the log holds no text of prompts.
        """
        said = f"{field}: {sentence}"
        if said not in self._warnings:
            self._warnings.append(said)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What there is to tell, in the order in which it was found."""
        return tuple(self._warnings)

    def stops(self) -> tuple[str, ...]:
        """The texts that end the reply. An empty one asks for nothing, as in mlx_lm.server."""
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return tuple(filter(None, stops))

    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class Arrangement(Body):
    """How a conversation becomes a prompt that begins as others do; None means as the server does it."""

    stable_prefix: Literal["off", "mark", "move"] | None = None
    canonical_tools: bool | None = None

    def arrangement(self) -> dict[str, Any]:
        """Its fields, for a request that this one is put into."""
        return {name: getattr(self, name) for name in Arrangement.model_fields}


class Conversation(Arrangement):
    """Messages with what the chat template needs. `unless_set` is what is done of itself for a stable prefix."""

    unless_set: ClassVar[str] = "off"

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    role_mapping: Mapping[str, str] | None = None
    reasoning_effort: str | None = None


class ChatBody(Conversation, GenerationBody):
    """`POST /v1/chat/completions`, and what a request of another protocol for chats is put into."""

    endpoint: ClassVar[str] = "/v1/chat/completions"

    logprobs: bool | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    prompt_cache_retention: Any = None


Prompt = Annotated[str, Field(min_length=1)] | TokenIds


class CompletionBody(GenerationBody):
    """`POST /v1/completions`. A list of prompts gives a choice for each."""

    endpoint: ClassVar[str] = "/v1/completions"

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1)]
    logprobs: bool | Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each of them, text or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


Key = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""What a page calls a prefix that is stored, and `mlx-hybridcache cache` by its first digits."""


class PrefixBody(Arrangement):
    """`/v1/cache/warm`, `pin` and `drop`: the beginning of prompts to come.

    `key` is the page's way to name it; it stands in place of messages and prompt and is not published.
    """

    model_config = ConfigDict(json_schema_extra=lambda schema: schema["properties"].pop("key"))

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prompt: Prompt | None = None
    key: Key | None = None
    cache_salt: str | None = None
    adapters: str | None = None


class WatchBody(Body):
    """`POST /v1/cache/watch`: of which runs the branches are shown, and how many of each.

    `since` is how many requests the page knows of, those of the server that `started` then.
    """

    open: Annotated[dict[Key, Annotated[int, Field(ge=0, le=2000)]], Field(max_length=500)] = {}
    order: Literal["recent", "size"] = "recent"
    since: Count = 0
    started: float = 0.0
