"""Anthropic's conversations as chats: the one internal form that prompts and replies are made of."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

from ..replies.chat import Breakpoint
from ..replies.notices import named
from ..schema.messages import Block, CountBody, MessagesBody
from ..schema.requests import ChatBody

MOST_BREAKPOINTS = 4
"""As many as Anthropic takes, within messages and at their ends; of more the last count, the deepest."""

LIFETIMES = {"5m": 300.0, "1h": 3600.0}
"""Seconds for which what a breakpoint stands behind is kept, anew with each use."""

CHOICES = {"auto": "auto", "any": "required", "none": "none"}

FUNCTIONS = (None, "custom", "function")
"""Types of tools that are a client's own; all others are Anthropic's, by a name with a date."""

Message = dict[str, Any]


OTHERS = ("claude", "anthropic")
"""What names of Anthropic's own models begin with: clients write one whatever is served."""


class MessagesChat(ChatBody):
    """A request for messages as a chat."""

    endpoint: ClassVar[str] = "/v1/messages"
    unless_set: ClassVar[str] = "mark"

    @property
    def names_any(self) -> bool:
        """Whether it is for whatever is served."""
        return (self.model or "").startswith(OTHERS)


def as_chat(body: CountBody) -> MessagesChat:
    """The same conversation, asked for in the same way; what cannot be followed is warned of."""
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": [*_system(body.system), *_turns(body.messages)],
        "tools": [*map(_function, _own(body.tools))] or None,
        "thinking": body.thinking and body.thinking.model_dump(exclude_none=True),
        "cache_salt": body.cache_salt,
        "keep_alive": body.keep_alive,
        "adapters": body.adapters,
        "continue_final_message": body.messages[-1]["role"] == "assistant" or None,
        **body.arrangement(),
        **_choice(body),
        **_output(body),
    }
    if isinstance(body, MessagesBody):
        same = ("max_tokens", "stream", "temperature", "top_p", "top_k")
        fields |= {name: getattr(body, name) for name in same}
        fields["stop"] = body.stop_sequences or None
    chat = MessagesChat.model_validate(fields)
    for name, sentence in _ignored(body):
        chat.warn(name, sentence)
    return chat


def breakpoints(body: CountBody, chat: MessagesChat) -> list[Breakpoint]:
    """The beginnings of `chat` behind which the client set `cache_control`, in their order."""
    marks = [*_marks(body)]
    inner = deque((mark for mark in marks if mark.is_inner), maxlen=MOST_BREAKPOINTS)
    outer = deque((mark for mark in marks if not mark.is_inner), maxlen=MOST_BREAKPOINTS)
    kept = {*inner, *outer}  # there may be thousands
    return [_breakpoint(body, chat, mark) for mark in marks if mark in kept]


class _Mark(NamedTuple):
    """In which message it is, with -1 for the system's, and behind how many blocks.

    `is_inner`: others follow in the same message, or it is behind the tools.
    """

    at: int
    end: int
    is_inner: bool
    seconds: float


def _marks(body: CountBody) -> Iterator[_Mark]:
    if tools := [_seconds(tool) for tool in body.tools or () if _has_mark(tool)]:
        yield _Mark(-1, 0, True, tools[-1])
    contents = [body.system, *(message["content"] for message in body.messages)]
    for at, content in enumerate(contents, -1):
        for end, block in enumerate(content if isinstance(content, list) else (), 1):
            if _has_mark(block):
                yield _Mark(at, end, end < len(content), _seconds(block))
    if body.cache_control:  # of itself, behind what stands last
        yield _Mark(
            len(body.messages) - 1, -1, False, _seconds({"cache_control": body.cache_control})
        )


def _breakpoint(body: CountBody, chat: MessagesChat, mark: _Mark) -> Breakpoint:
    if not mark.is_inner and mark.at == len(body.messages) - 1:
        return Breakpoint(None, mark.seconds)
    messages = _beginning(body, mark.at, mark.end)
    return Breakpoint(
        chat.model_copy(update={"messages": messages}), mark.seconds, is_boundary=mark.is_inner
    )


def _seconds(block: Block) -> float:
    """How long what stands before a mark is kept."""
    mark = block["cache_control"]
    said = mark.get("ttl") if isinstance(mark, dict) else None
    return LIFETIMES.get(said, LIFETIMES["5m"]) if isinstance(said, str) else LIFETIMES["5m"]


def _beginning(body: CountBody, at: int, end: int) -> list[Message]:
    system: Any = body.system
    if at < 0:
        return _system(system[:end] if end else None)
    part = {**body.messages[at], "content": body.messages[at]["content"][:end]}
    return [*_system(system), *_turns([*body.messages[:at], part])]


def _has_mark(block: Block) -> bool:
    return bool(block.get("cache_control"))


# Messages


def _system(system: Any) -> list[Message]:
    """A message for each block: what is said before a conversation begins is parted by empty lines."""
    texts = [system or ""] if not isinstance(system, list) else map(_text, system)
    return [{"role": "system", "content": text} for text in texts if text]


def _turns(messages: list[Message]) -> list[Message]:
    return [turn for message in messages for turn in _turn(message)]


def _turn(message: Message) -> Iterator[Message]:
    role, content = message["role"], message["content"]
    if not isinstance(content, list):
        yield {"role": role, "content": content}
    elif role == "assistant":
        yield _reply(content)
    elif role == "user":
        yield from _question(content)
    else:
        yield {"role": role, "content": content}


def _question(blocks: list[Block]) -> Iterator[Message]:
    """Results of tools are turns of their own; what stands between them is the user's."""
    said: list[Block] = []
    for block in blocks:
        if block.get("type") != "tool_result":
            said += _parts(block)
            continue
        if said:
            yield {"role": "user", "content": said}
            said = []
        yield _result(block)
    if said or not blocks:
        yield {"role": "user", "content": said}


def _result(block: Block) -> Message:
    content = block.get("content")
    parts = content if isinstance(content, list) else [] if content is None else [content]
    said = [each for part in parts for each in _parts(part)]
    if block.get("is_error"):
        said = ["Error: ", *said] if said else ["Error"]
    return {"role": "tool", "tool_call_id": str(block.get("tool_use_id", "")), "content": said}


def _parts(block: Any) -> list[Any]:
    """A block as parts of a message: the text of a document, or of what was found, is text."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind not in ("document", "search_result"):
        return [block]
    source = block if kind == "search_result" else block.get("source")
    if not isinstance(source, dict) or source.get("type") not in (kind, "text", "content"):
        return [block]
    text = source.get("data", source.get("content"))
    return [text] if isinstance(text, str) else text if isinstance(text, list) else [block]


def _reply(blocks: list[Block]) -> Message:
    """Thoughts stay parts, which prompts read; redacted ones hold nothing that could be read."""
    left_out = ("tool_use", "redacted_thinking")
    reply: Message = {
        "role": "assistant",
        "content": [block for block in blocks if block.get("type") not in left_out],
    }
    calls = [
        {
            "id": str(block.get("id", "")),
            "type": "function",
            "function": {"name": block["name"], "arguments": block.get("input")},
        }
        for block in blocks
        if block.get("type") == "tool_use"
    ]
    return {**reply, "tool_calls": calls} if calls else reply


def _text(block: Block) -> str:
    text = block.get("text")
    return text if isinstance(text, str) else ""


# What else is asked


def _own(tools: list[Block] | None) -> list[Block]:
    return [tool for tool in tools or () if _is_own(tool)]


def _is_own(tool: Block) -> bool:
    return tool.get("type") in FUNCTIONS and "name" in tool


def _function(tool: Block) -> Block:
    described = {"description": tool["description"]} if tool.get("description") else {}
    schema = tool.get("input_schema")
    schema = {"type": "object", "properties": {}} if schema is None else schema
    function = {"name": tool["name"], **described, "parameters": schema}
    return {"type": "function", "function": function}


def _choice(body: CountBody) -> dict[str, Any]:
    choice = body.tool_choice
    if choice is None:
        return {}
    wanted: Any = CHOICES.get(choice.type)
    if wanted is None:
        wanted = {"type": "function", "function": {"name": choice.name}}
    return {
        "tool_choice": wanted,
        "parallel_tool_calls": False if choice.disable_parallel_tool_use else None,
    }


def _output(body: CountBody) -> dict[str, Any]:
    config = body.output_config
    form = body.output_format or (config and config.format)
    effort = config and config.effort
    fields: dict[str, Any] = {"reasoning_effort": effort} if effort else {}
    if form:
        schema = {"name": "reply", "schema": form.content}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _ignored(body: CountBody) -> Iterator[tuple[str, str]]:
    if others := [tool for tool in body.tools or () if not _is_own(tool)]:
        kinds = named(tool.get("type") for tool in others)
        yield "tools", f"left out: {kinds}, which only Anthropic runs or describes."
    edits = (body.context_management or {}).get("edits") or []
    if not (isinstance(edits, list) and all(map(_keeps_all, edits))):
        yield "context_management", "not followed: the history is read as it is sent."
    for name in ("mcp_servers", "container"):
        if getattr(body, name):
            yield name, "not followed by this server."


def _keeps_all(edit: Any) -> bool:
    return isinstance(edit, dict) and edit.get("keep") == "all"
