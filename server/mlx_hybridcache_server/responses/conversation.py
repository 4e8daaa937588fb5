"""Items of a response as a chat: the one internal form that prompts and replies are made of."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from ..errors import refuse
from ..replies.notices import named
from ..schema.requests import ChatBody
from ..schema.responses import Allowed, ResponsesBody, ToolName

Item = dict[str, Any]
Message = dict[str, Any]

ASSISTANT = frozenset({"reasoning", "function_call", "custom_tool_call"})
"""Items that are the assistant's, beside its messages. Together they are one turn."""

THOUGHT = "reasoning"

CALLED = {"function_call": "arguments", "custom_tool_call": "input"}
RESULTS = frozenset({"function_call_output", "custom_tool_call_output"})

OWN = ("function", "custom")
"""Types of tools that are a client's own."""

NAME = "reply"
"""Of a schema without one."""

LOGPROBS = "message.output_text.logprobs"
"""What `include` calls log-probabilities."""

SEALED = "mlx-hybridcache:"
"""What `encrypted_content` begins with here: behind it stands the reasoning itself, which is the client's own."""

FREE_TEXT = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
}
"""The parameters of a custom tool, which takes a text."""


class ResponsesChat(ChatBody):
    """A request for a response as a chat."""

    endpoint: ClassVar[str] = "/v1/responses"


def as_chat(body: ResponsesBody, items: Sequence[Item]) -> ResponsesChat:
    """The conversation of `items`, asked for as `body` says; what cannot be followed is warned of.

    Raises `ApiError` 400 for what the reply would be wrong without.
    """
    _refuse(body)
    first = [{"role": "system", "content": body.instructions}] if body.instructions else []
    chat = ResponsesChat.model_validate(
        {
            "model": body.model,
            "messages": [*first, *turns(items)],
            "tools": [*map(_function, _own(body))] or None,
            "tool_choice": _choice(body),
            "parallel_tool_calls": body.parallel_tool_calls,
            "max_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "reasoning_effort": body.reasoning and body.reasoning.effort,
            "response_format": _format(body),
            "verbosity": body.text and body.text.verbosity,
            "stream": body.stream,
            "cache_salt": body.cache_salt,
            "keep_alive": body.keep_alive,
            "adapters": body.adapters,
            "prompt_cache_retention": body.prompt_cache_retention,
            **body.arrangement(),
        }
    )
    _warn(chat, body)
    return chat


def _warn(chat: ResponsesChat, body: ResponsesBody) -> None:
    if others := [tool["type"] for tool in body.tools or () if tool["type"] not in OWN]:
        chat.warn("tools", f"left out: {named(others)}, which this server does not run.")
    if held := [tool["name"] for tool in _own(body) if _has_grammar(tool)]:
        chat.warn("tools", f"any text may be written for {named(held)}: grammars are not followed.")
    if body.truncation == "auto":
        chat.warn("truncation", "not followed: a prompt that is too long is refused.")
    if body.top_logprobs or LOGPROBS in (body.include or ()):
        chat.warn("top_logprobs", "not followed in responses; chat completions have them.")


def _has_grammar(tool: Item) -> bool:
    form = tool.get("format")
    return tool["type"] == "custom" and isinstance(form, dict) and form.get("type") == "grammar"


def input_items(body: ResponsesBody) -> list[Item]:
    """What a request adds to its conversation. A text is a user's message."""
    if isinstance(body.input, str):
        return [{"type": "message", "role": "user", "content": body.input}]
    return body.input


def custom_tools(body: ResponsesBody) -> frozenset[str]:
    """Names of the tools that take a text."""
    return frozenset(tool["name"] for tool in _own(body) if tool["type"] == "custom")


def sealed(thought: str) -> str:
    """A thought as `encrypted_content`, for clients that keep nothing else of it."""
    return SEALED + base64.b64encode(thought.encode()).decode()


def turns(items: Sequence[Item]) -> list[Message]:
    """The messages of a chat. What the assistant thought, said and called in a row is one of them."""
    found: list[Message] = []
    for item in items:
        kind = item.get("type", "message")
        is_said = kind == "message" and item.get("role") == "assistant"
        if is_said or kind in ASSISTANT:
            last = found[-1] if found and found[-1]["role"] == "assistant" else None
            if last is None or (kind not in CALLED and _is_over(last, kind)):
                found.append(last := {"role": "assistant", "content": []})
            _add(last, kind, item)
        else:
            found += _others(kind, item)
    return found


def _is_over(turn: Message, kind: str) -> bool:
    """Whether a thought or a text begins another turn: behind calls, and a thought behind a text."""
    content = turn["content"]
    return "tool_calls" in turn or (
        kind == "reasoning" and bool(content) and content[-1].get("type") != THOUGHT
    )


def _add(turn: Message, kind: str, item: Item) -> None:
    if kind == "reasoning":
        if thought := _thought(item):
            turn["content"].append({"type": THOUGHT, "text": thought})
    elif kind == "message":
        content = item["content"]
        turn["content"] += [_said(content)] if isinstance(content, str) else content
    else:
        given = item.get(CALLED[kind])
        arguments = {"input": given} if kind == "custom_tool_call" else given
        function = {"name": item["name"], "arguments": arguments}
        call = {"id": str(item.get("call_id", "")), "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)


def _others(kind: str, item: Item) -> Iterator[Message]:
    if kind == "message":
        yield {"role": item["role"], "content": item["content"]}
    elif kind in RESULTS:
        output = item.get("output")
        is_said = output is None or isinstance(output, str | list)
        said = output if is_said else [output]  # a sentence in the prompt says what stood there
        yield {"role": "tool", "tool_call_id": str(item.get("call_id", "")), "content": said}
    elif kind == "item_reference":
        raise refuse(
            "item_reference is not supported: send the item itself, or previous_response_id.",
            "input",
        )
    else:  # a sentence in the prompt says what stood there
        yield {"role": "assistant", "content": [item]}


def _said(text: str) -> Item:
    return {"type": "output_text", "text": text}


def _thought(item: Item) -> str:
    said = (_texts(item.get(name)) for name in ("content", "summary"))
    return "\n".join(filter(None, said)) or _unsealed(item.get("encrypted_content"))


def _texts(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _unsealed(content: Any) -> str:
    if not (isinstance(content, str) and content.startswith(SEALED)):
        return ""  # another server's, which only that one can read
    try:
        return base64.b64decode(content[len(SEALED) :], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


# What else is asked


def _refuse(body: ResponsesBody) -> None:
    instead = {
        "background": "read the stream, or wait for the reply",
        "conversation": "send the items, or previous_response_id",
        "prompt": "send what the template makes",
    }
    for name, what in instead.items():
        if getattr(body, name):
            raise refuse(f"{name} is not supported: {what}.", name)


def _own(body: ResponsesBody) -> list[Item]:
    return [tool for tool in body.tools or () if tool["type"] in OWN]


def _function(tool: Item) -> Item:
    described = {"description": tool["description"]} if tool.get("description") else {}
    parameters = tool.get("parameters") or {"type": "object", "properties": {}}
    if tool["type"] == "custom":
        parameters = FREE_TEXT
    return {
        "type": "function",
        "function": {"name": tool["name"], **described, "parameters": parameters},
    }


def _choice(body: ResponsesBody) -> Any:
    choice = body.tool_choice
    if isinstance(choice, ToolName):
        return _named(choice)
    if isinstance(choice, Allowed):
        allowed = {"mode": choice.mode, "tools": [*map(_named, choice.tools)]}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


def _named(tool: ToolName) -> Item:
    return {"type": "function", "function": {"name": tool.name}}


def _format(body: ResponsesBody) -> Item | None:
    form = body.text and body.text.format
    if not form or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "json_object"}
    if form.content is None:
        raise refuse("text.format of type json_schema needs a schema.", "text")
    schema = {"name": form.name or NAME, "schema": form.content}
    return {"type": "json_schema", "json_schema": schema}
