"""Anthropic's conversations as chats: the one internal form that prompts and replies are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from ..schema.messages import Block, CountBody, MessagesBody
from ..schema.requests import ChatBody, Conversation

MOST_BREAKPOINTS = 4
"""As many as Anthropic takes; of more the last count, which are the deepest."""

CHOICES = {"auto": "auto", "any": "required", "none": "none"}

FUNCTIONS = frozenset({None, "custom", "function"})
"""Types of tools that are a client's own; all others are Anthropic's, by a name with a date."""

Message = dict[str, Any]


class MessagesChat(ChatBody):
    """A request for messages as a chat."""

    endpoint: ClassVar[str] = "/v1/messages"


def as_chat(body: CountBody) -> MessagesChat:
    """The same conversation, asked for in the same way; what cannot be followed is warned of."""
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": [*_system(body.system), *_turns(body.messages)],
        "tools": [*map(_function, _own(body.tools))] or None,
        "thinking": body.thinking and body.thinking.model_dump(exclude_none=True),
        "cache_salt": body.cache_salt,
        "continue_final_message": body.messages[-1]["role"] == "assistant" or None,
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


def breakpoints(body: CountBody, chat: MessagesChat) -> list[Conversation]:
    """The beginnings of `chat` behind which the client set `cache_control`, in their order.

    Only those within a message: between two of them there is a checkpoint anyway.
    """
    found = [chat.model_copy(update={"messages": messages}) for messages in _marked(body)]
    return [*found[-MOST_BREAKPOINTS:]]


def _marked(body: CountBody) -> Iterator[list[Message]]:
    if any(map(_has_mark, body.tools or ())):
        yield []
    system: Any = body.system
    for end in _inner_marks(system):
        yield _system(system[:end])
    for at, message in enumerate(body.messages):
        for end in _inner_marks(message["content"]):
            part = {**message, "content": message["content"][:end]}
            yield [*_system(system), *_turns([*body.messages[:at], part])]


def _inner_marks(content: Any) -> list[int]:
    """Behind which of its blocks a content has a mark, its last block left out."""
    if not isinstance(content, list):
        return []
    return [at for at, block in enumerate(content[:-1], 1) if _has_mark(block)]


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
    parts = [content] if isinstance(content, str) else content if isinstance(content, list) else []
    said = [each for part in parts for each in _parts(part)]
    if block.get("is_error"):
        said = ["Error: ", *said] if said else ["Error"]
    return {"role": "tool", "tool_call_id": str(block.get("tool_use_id", "")), "content": said}


def _parts(block: Any) -> list[Any]:
    """A block as parts of a message: a document's text is text."""
    source = block.get("source") if isinstance(block, dict) else None
    if not isinstance(source, dict) or block.get("type") not in ("document", "search_result"):
        return [block]
    kind, text = source.get("type"), source.get("data", source.get("content"))
    if kind == "text" and isinstance(text, str):
        return [text]
    return list(text) if kind == "content" and isinstance(text, list) else [block]


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
    return [tool for tool in tools or () if tool.get("type") in FUNCTIONS and "name" in tool]


def _function(tool: Block) -> Block:
    described = {"description": tool["description"]} if tool.get("description") else {}
    schema = tool.get("input_schema", {"type": "object", "properties": {}})
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
    if others := [tool for tool in body.tools or () if tool not in _own(body.tools)]:
        names = sorted({str(tool.get("type"))[:64] for tool in others})
        yield "tools", f"left out: {', '.join(names)}, which only Anthropic runs or describes."
    edits = (body.context_management or {}).get("edits")
    kept = all(isinstance(edit, dict) and edit.get("keep") == "all" for edit in edits or ())
    if not kept:
        yield "context_management", "not followed: the history is read as it is sent."
    for name in ("mcp_servers", "container"):
        if getattr(body, name):
            yield name, "not followed by this server."
