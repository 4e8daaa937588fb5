"""What parts the second of two requests from the first is named, and what it costs is counted: on planted changes."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from bundled import load
from long import forms
from mlx_hybridcache_server.explaining.asked import recognised
from mlx_hybridcache_server.explaining.explanation import Cost
from mlx_hybridcache_server.explaining.local import explained, renderer
from servers import CHAT, MESSAGES, user
from texts.changed_requests import PLANTED, Pair, as_messages, as_response, pair

from mlx_hybridcache.demo import BUNDLED_MODEL

MODEL = str(BUNDLED_MODEL)
EVERY = len(PLANTED)


@pytest.fixture(autouse=True)
def _one_tokenizer(monkeypatch):
    """Reading a tokenizer takes longer than all that is done with it here."""
    monkeypatch.setattr("mlx_hybridcache_server.explaining.local.renderer", cache(renderer))


def told(pair: Pair, say=lambda chat: chat) -> dict[str, Any]:
    return explained([say(pair.first), say(pair.second)], None, MODEL)


def plain(chat: dict[str, Any], *, upto: str = "") -> tuple[str, list[int]]:
    """Its prompt by the template and the tokenizer alone, and its tokens."""
    _, tokenizer = load()
    messages = [
        {**each, "tool_calls": [*map(_with_object, each.get("tool_calls", ()))]}
        for each in chat["messages"]
    ]
    text = tokenizer.apply_chat_template(
        messages,
        tools=chat["tools"],
        tokenize=False,
        add_generation_prompt=True,
        **chat.get("chat_template_kwargs", {}),
    )
    return text, tokenizer.encode(text, add_special_tokens=False)


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}


def parting(one: list[int], other: list[int]) -> int:
    both = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(both) if a != b), min(len(one), len(other)))


def new_tokens(pair: Pair) -> int:
    """Those behind the opener of the first message that was appended."""
    new = [each for each in pair.second["messages"] if each not in pair.first["messages"]]
    last = pair.second["messages"][-1]
    if last not in new or last["content"] == "Done." or pair.kind == "history_rewritten":
        return 0
    text, tokens = plain(pair.second)
    is_result = last["role"] == "tool"
    if is_result and last["tool_call_id"] != "call_8":
        return 0  # a result of the first's that was changed
    appended = "<tool_call>" if is_result else last["content"]
    _, tokenizer = load()
    return len(tokens) - len(
        tokenizer.encode(text[: text.rindex(appended)], add_special_tokens=False)
    )


@pytest.mark.parametrize("count", forms(6 * EVERY, 100 * EVERY))
def test_the_planted_change_is_named_and_its_tokens_are_counted(count):
    """120 pairs, or 2,000: at least 98 of 100 are named; of each the count is that of the prompts themselves."""
    named = 0
    for seed in range(count):
        drawn = pair(seed)
        found = told(drawn)
        named += found["change"] == drawn.kind
        first, second = plain(drawn.first)[1], plain(drawn.second)[1]
        common, new = parting(first, second), new_tokens(drawn)
        restored = min(common, len(second) - 1)
        assert (found["first_tokens"], found["prompt_tokens"]) == (len(first), len(second))
        assert (found["common_tokens"], found["restored_tokens"]) == (common, restored)
        assert found["read_tokens"] == len(second) - restored
        assert (found["again_tokens"], found["new_tokens"]) == (len(second) - restored - new, new)
    assert named >= 0.98 * count


@pytest.mark.parametrize("say", [as_messages, as_response], ids=["messages", "responses"])
@pytest.mark.parametrize("count", forms(2 * EVERY, 40 * EVERY))
def test_requests_of_other_endpoints_are_explained_alike(say, count):
    """They are put into the same chat, which their fields say; Responses has no template's arguments."""
    for seed in range(count):
        drawn = pair(seed)
        if say is as_response and drawn.kind == "template_arguments":
            continue
        if say is as_messages and drawn.second["messages"][-1]["role"] == "assistant":
            continue  # there the reply goes on with it
        found, same = told(drawn, say), told(drawn)
        if drawn.kind == "template_arguments":  # which Anthropic's switch is more than one of
            assert found.pop("where").startswith(same.pop("where"))
        assert found == same


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("date", "messages[0] (system).content"),
        ("tool_order", "tools["),
        ("key_order", ".parameters.properties"),
        ("tool_edited", ".description"),
        ("tool_result_edited", " (tool).content"),
        ("reasoning_stripped", " (assistant).reasoning_content"),
        ("template_arguments", "chat_template_kwargs.enable_thinking"),
    ],
)
def test_it_is_said_where_it_stands(kind, where):
    """As the request's own fields are named."""
    assert where in told(pair([*PLANTED].index(kind)))["where"]


def test_what_else_differs_is_told_behind_what_parts_them():
    """The day in the system prompt, and what the user asked first."""

    def chat(day: str, asked: str) -> dict[str, Any]:
        system = {"role": "system", "content": f"Today is 2026-11-{day}."}
        return {
            "messages": [system, *user(asked), {"role": "assistant", "content": "b"}, *user("c")]
        }

    found = explained([chat("25", "a"), chat("26", "x")], None, MODEL)
    assert found["change"] == "date"
    assert found["also"] == [{"change": "message_edited", "where": "messages[1] (user).content"}]


def test_what_is_appended_is_new_from_its_first_letter_on():
    """Also where it begins with what another turn is tried with in its place."""

    def new(asked: str) -> Any:
        requests: list[dict[str, Any]] = [
            {"messages": user("a")},
            {"messages": [*user("a"), *user(asked)]},
        ]
        return explained(requests, None, MODEL)["new_tokens"]

    assert new("0") == new("1") > 0


def test_a_reply_to_go_on_with_that_is_undone_is_gone_on_with_no_more():
    """The second one's last turn is the reply's beginning, and the first one's is the user's."""
    goes_on = [*user("x"), {"role": "assistant", "content": "He"}]
    requests: list[dict[str, Any]] = [
        {"messages": [*user("a"), *user("b")]},
        {"messages": goes_on, "continue_final_message": True},
    ]
    assert explained(requests, None, MODEL)["change"] == "message_edited"


@pytest.mark.parametrize(
    ("fields", "endpoint"),
    [
        ({}, CHAT),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, CHAT),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, CHAT),
        ({"system": "x"}, MESSAGES),
        ({"tools": [{"name": "f", "input_schema": {}}]}, MESSAGES),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, MESSAGES),
    ],
)
def test_each_of_its_own_fields_says_that_a_request_is_for_messages(fields, endpoint):
    """Which OpenAI's chats lack: a system prompt beside the messages, schemas of inputs, blocks of results."""
    assert recognised({"messages": user("a"), **fields}) == endpoint


def tool(name: str, *, said: str = "a") -> dict[str, Any]:
    """One with a schema of two levels."""
    value = {"type": "object", "properties": {"deep": {"type": "string", "description": said}}}
    parameters = {"type": "object", "properties": {"x": value}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize(
    ("first", "second", "change", "where"),
    [
        (["f"], ["g"], "tool_edited", "tools[0] (g).name"),
        (["f", "h"], ["g", "h"], "tool_edited", "tools[0] (g).name"),
        (["f", "h"], ["g", "f", "h"], "tool_added", "tools[0] (g)"),
        (["f", "h"], ["h"], "tool_removed", "tools[0] (f)"),
    ],
)
def test_a_tool_is_renamed_where_another_stands_in_its_place(first, second, change, where):
    """Else one was added, or left out."""
    requests: list[dict[str, Any]] = [
        {"messages": user("a"), "tools": [*map(tool, names)]} for names in (first, second)
    ]
    found = explained(requests, None, MODEL)
    assert (found["change"], found["where"]) == (change, where)


def test_the_place_in_a_schema_is_named_level_by_level():
    """A description within two objects."""
    requests: list[dict[str, Any]] = [
        {"messages": user("a"), "tools": [tool("f", said=said)]} for said in ("a", "b")
    ]
    path = "parameters.properties.x.properties.deep.description"
    assert explained(requests, None, MODEL)["where"] == f"tools[0] (f).{path}"


def test_what_is_restored_is_read_neither_again_nor_anew():
    """Of 10 tokens 8, though the first prompt had 5 of them: a reply is stored behind it."""
    cost = Cost.of(10, common=5, restored=8, known=5)
    assert (cost.read_tokens, cost.again_tokens, cost.new_tokens) == (2, 0, 2)


def test_who_goes_back_reads_nothing_again():
    """Two tokens of three: the last one alone is read."""
    found = explained([{"prompt": [5, 6, 7]}, {"prompt": [5, 6]}], None, MODEL)
    assert (found["change"], found["is_hot"], found["read_tokens"]) == ("rewound", True, 1)
