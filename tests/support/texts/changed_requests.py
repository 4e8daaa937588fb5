"""Pairs of requests as an agent sends them one after the other, each with one change that was planted.

A pair is drawn from a seed in the form of a chat; `as_messages` and `as_response` say the same to the other
endpoints.
"""

from __future__ import annotations

import copy
import json
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]

WORDS = [
    "lamp",
    "door",
    "river",
    "stone",
    "letter",
    "garden",
    "window",
    "bridge",
    "paper",
    "market",
    "harbour",
    "kettle",
    "candle",
    "basket",
    "mirror",
    "ladder",
    "pocket",
    "engine",
    "forest",
    "island",
    "pencil",
    "bottle",
    "blanket",
    "hammer",
    "saddle",
    "button",
    "orchard",
]

TOOLS = ("Bash", "Edit", "Glob", "Grep", "Read", "Write", "WebFetch", "TodoWrite")


@dataclass(frozen=True)
class Pair:
    """Two chats, and what was changed between them."""

    kind: str
    first: Body
    second: Body


def said(draw: random.Random, words: int) -> str:
    """A sentence or several."""
    return " ".join(draw.choices(WORDS, k=words)).capitalize() + "."


def tool(draw: random.Random, name: str) -> Body:
    """One with two or three parameters."""
    names = draw.sample(WORDS, draw.randint(2, 3))
    properties = {
        each: {"type": draw.choice(["string", "integer"]), "description": said(draw, 5)}
        for each in names
    }
    parameters = {"type": "object", "properties": properties, "required": names[:1]}
    function = {"name": name, "description": said(draw, 12), "parameters": parameters}
    return {"type": "function", "function": function}


def conversation(draw: random.Random) -> Body:
    """A system prompt, tools, and a question that is worked on with some calls."""
    messages: list[Body] = [
        {"role": "system", "content": "\n".join(said(draw, 15) for _ in range(draw.randint(2, 6)))},
        {"role": "user", "content": said(draw, 12)},
        {"role": "assistant", "content": said(draw, 6)},
        {"role": "user", "content": said(draw, 12)},
    ]
    tools = [tool(draw, name) for name in draw.sample(TOOLS, draw.randint(3, 6))]
    for step in range(draw.randint(2, 3)):
        function = draw.choice(tools)["function"]
        names = [*function["parameters"]["properties"]]
        given = {name: said(draw, 2) for name in names}
        messages += called(f"call_{step}", function["name"], given, said(draw, 40))
    return {"messages": messages, "tools": tools}


def called(name: str, tool: str, given: Body, result: str) -> list[Body]:
    """A call with its result."""
    function = {"name": tool, "arguments": json.dumps(given)}
    call = {"id": name, "type": "function", "function": function}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": name, "content": result},
    ]


# What is planted: each function changes `new`, and `old` where the change needs something to be there


def in_system(write: Callable[[random.Random], tuple[str, str]], *, first: bool = False) -> Any:
    def plant(draw: random.Random, old: Body, new: Body) -> None:
        lines = old["messages"][0]["content"].split("\n")
        at = 0 if first else draw.randint(0, len(lines))
        for body, line in zip((old, new), write(draw), strict=True):
            body["messages"][0]["content"] = "\n".join([*lines[:at], line, *lines[at:]])

    return plant


def two_dates(draw: random.Random) -> tuple[str, str]:
    day = draw.randint(1, 27)
    form = draw.choice(
        [
            "Today is 2026-11-{0:02}.",
            "Today's date: {0} November 2026",
            "The time is 2026-11-29T03:{0:02}:29Z.",
            "Current date: November {0}, 2026, and it is cold.",
            "It is {0:02}:14 now.",
        ]
    )
    return form.format(day % 24), form.format((day + draw.randint(1, 20)) % 24)


def two_ids(draw: random.Random) -> tuple[str, str]:
    form = draw.choice(["session_id: {0}", "Your conversation is {0}.", "Trace {0} of this run."])
    one, other = (str(uuid.UUID(int=draw.getrandbits(128))) for _ in range(2))
    return form.format(one), form.format(other)


def two_paths(draw: random.Random) -> tuple[str, str]:
    form = draw.choice(
        [
            "Working directory: /Users/ana/work/{0}",
            "Scratchpad: /tmp/claude-{0}/scratchpad",
            "cwd is ~/src/{0}/app now",
        ]
    )
    one, other = draw.sample(WORDS, 2)
    return form.format(one), form.format(other)


def two_lines(draw: random.Random) -> tuple[str, str]:
    form = "x-anthropic-billing-header: cc_version=2.1.{0}; cc_entrypoint=cli; cch={1:05x};"
    number = draw.randint(100, 999)
    one, other = draw.sample(range(16**5), 2)
    return form.format(number, one), form.format(number, other)


def two_numbers(draw: random.Random) -> tuple[str, str]:
    form = draw.choice(["Requests so far: {0} of many.", "You have {0} words left."])
    one, other = draw.sample(range(100, 900), 2)
    return form.format(one), form.format(other)


def edited_system(draw: random.Random, old: Body, new: Body) -> None:
    lines = new["messages"][0]["content"].split("\n")
    lines[draw.randrange(len(lines))] = "Now answer in verse. " + said(draw, 4)
    new["messages"][0]["content"] = "\n".join(lines)


def reordered_tools(draw: random.Random, old: Body, new: Body) -> None:
    while new["tools"] == old["tools"]:
        draw.shuffle(new["tools"])


def reordered_keys(draw: random.Random, old: Body, new: Body) -> None:
    parameters = draw.choice(new["tools"])["function"]["parameters"]
    parameters["properties"] = dict(reversed(parameters["properties"].items()))


def added_tool(draw: random.Random, old: Body, new: Body) -> None:
    new["tools"].insert(draw.randint(0, len(new["tools"])), tool(draw, "Task"))


def removed_tool(draw: random.Random, old: Body, new: Body) -> None:
    new["tools"].pop(draw.randrange(len(new["tools"])))


def edited_tool(draw: random.Random, old: Body, new: Body) -> None:
    function = draw.choice(new["tools"])["function"]
    function["description"] += " Use it with care."


def edited_message(draw: random.Random, old: Body, new: Body) -> None:
    message = new["messages"][draw.choice([1, 3])]
    message["content"] = f"Please: {message['content']}"


def inserted_message(draw: random.Random, old: Body, new: Body) -> None:
    new["messages"].insert(draw.choice([1, 3]), {"role": "user", "content": "Remember the rules."})


def removed_messages(draw: random.Random, old: Body, new: Body) -> None:
    del new["messages"][1:3]


def rewritten_history(draw: random.Random, old: Body, new: Body) -> None:
    summary = {"role": "user", "content": f"What happened so far: {said(draw, 20)}"}
    new["messages"][1:] = [
        summary,
        *called("call_9", old["tools"][0]["function"]["name"], {}, "Done."),
    ]


def stripped_reasoning(draw: random.Random, old: Body, new: Body) -> None:
    at = draw.choice([at for at, each in enumerate(old["messages"]) if "tool_calls" in each])
    old["messages"][at]["reasoning_content"] = said(draw, 10)


def result(draw: random.Random, new: Body) -> Body:
    return draw.choice([each for each in new["messages"] if each["role"] == "tool"])


def edited_result(draw: random.Random, old: Body, new: Body) -> None:
    found = result(draw, new)
    found["content"] = f"{said(draw, 3)} {found['content']}"


def shortened_result(draw: random.Random, old: Body, new: Body) -> None:
    found = result(draw, new)
    short = [found["content"][: draw.randint(10, 60)] + " [...]", "[Old tool result cleared]"]
    found["content"] = draw.choice(short)


def other_arguments(draw: random.Random, old: Body, new: Body) -> None:
    new["chat_template_kwargs"] = {"enable_thinking": False}


def nothing(draw: random.Random, old: Body, new: Body) -> None:
    """Only what is appended to half of all pairs, and here to each."""
    append(draw, new)


def append(draw: random.Random, new: Body) -> None:
    """What an agent does next: a call more, or its answer."""
    name = new["tools"][0]["function"]["name"] if new["tools"] else "Bash"
    if draw.random() < 0.5:
        new["messages"] += called("call_8", name, {}, said(draw, 15))
    else:
        new["messages"].append({"role": "assistant", "content": said(draw, 8)})


PLANTED: dict[str, Callable[[random.Random, Body, Body], None]] = {
    "date": in_system(two_dates),
    "id": in_system(two_ids),
    "path": in_system(two_paths),
    "attribution": in_system(two_lines, first=True),
    "number": in_system(two_numbers),
    "system_edited": edited_system,
    "tool_order": reordered_tools,
    "key_order": reordered_keys,
    "tool_added": added_tool,
    "tool_removed": removed_tool,
    "tool_edited": edited_tool,
    "message_edited": edited_message,
    "message_inserted": inserted_message,
    "messages_removed": removed_messages,
    "history_rewritten": rewritten_history,
    "reasoning_stripped": stripped_reasoning,
    "tool_result_edited": edited_result,
    "tool_result_shortened": shortened_result,
    "template_arguments": other_arguments,
    "appended": nothing,
}

ALONE = {"template_arguments", "appended", "history_rewritten"}
"""What nothing is appended to: a switch that only the reply's opener knows costs nothing once a history goes on."""


def pair(seed: int) -> Pair:
    """The pair of a seed; each kind comes once in as many seeds as there are kinds."""
    draw = random.Random(seed)
    kind = [*PLANTED][seed % len(PLANTED)]
    first = conversation(draw)
    second = copy.deepcopy(first)
    PLANTED[kind](draw, first, second)
    if kind not in ALONE and draw.random() < 0.5:
        append(draw, second)
    return Pair(kind, first, second)


# The same for other endpoints


def as_messages(chat: Body) -> Body:
    """As Anthropic's clients say it."""
    system, *turns = chat["messages"]
    tools = [
        {**each["function"], "input_schema": each["function"]["parameters"]}
        for each in chat["tools"]
    ]
    for each in tools:
        del each["parameters"]
    messages = [{"role": _role(turn), "content": _blocks(turn)} for turn in turns]
    return {
        "max_tokens": 8,
        "system": [{"type": "text", "text": system["content"]}],
        "messages": messages,
        "tools": tools,
        **({"thinking": {"type": "disabled"}} if chat.get("chat_template_kwargs") else {}),
    }


def _role(turn: Body) -> str:
    return "user" if turn["role"] == "tool" else str(turn["role"])


def _blocks(turn: Body) -> list[Body]:
    if turn["role"] == "tool":
        name, content = turn["tool_call_id"], turn["content"]
        return [{"type": "tool_result", "tool_use_id": name, "content": content}]
    blocks: list[Body] = []
    if thought := turn.get("reasoning_content"):
        blocks.append({"type": "thinking", "thinking": thought, "signature": "s"})
    if turn["content"]:
        blocks.append({"type": "text", "text": turn["content"]})
    for call in turn.get("tool_calls", ()):
        function = call["function"]
        given = json.loads(function["arguments"])
        blocks.append(
            {"type": "tool_use", "id": call["id"], "name": function["name"], "input": given}
        )
    return blocks


def as_response(chat: Body) -> Body:
    """As clients of OpenAI's Responses say it."""
    system, *turns = chat["messages"]
    items = [item for turn in turns for item in _items(turn)]
    tools = [{"type": "function", **each["function"]} for each in chat["tools"]]
    return {"instructions": system["content"], "input": items, "tools": tools}


def _items(turn: Body) -> list[Body]:
    if turn["role"] == "tool":
        name, output = turn["tool_call_id"], turn["content"]
        return [{"type": "function_call_output", "call_id": name, "output": output}]
    items: list[Body] = []
    if thought := turn.get("reasoning_content"):
        items.append(
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": thought}]}
        )
    if turn["content"]:
        items.append({"type": "message", "role": turn["role"], "content": turn["content"]})
    calls = turn.get("tool_calls", ())
    items += [
        {"type": "function_call", "call_id": call["id"], **call["function"]} for call in calls
    ]
    return items
