"""What a conversation becomes: which lines are moved, where they stand then, and tools in one order."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from bundled import text
from mlx_hybridcache_server.prompts.canonical import canonical
from mlx_hybridcache_server.prompts.stable import HEAD, arranged, volatile_lines
from replies import cached, tools
from servers import CHAT, user

DATE, BILLING = "Today's date: 2026-11-29", "x-anthropic-billing-header: cch=0a1b2;"
SYSTEM = f"{BILLING}\nYou are an agent.\n  {DATE}  \nBe brief."
NOTE = f"\n\n<system>\n{BILLING}\n{DATE}\n</system>"


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def prompt(server, messages: list[dict[str, Any]], **fields: Any) -> str:
    body = {"messages": messages, "stable_prefix": "move", **fields}
    return str(server.answer("/apply-template", **body)["prompt"])


def test_lines_of_the_system_prompt_stand_together_in_a_note():
    """In their order, whole and without the spaces around them; what is left has no gap."""
    found = arranged([system(SYSTEM), *user("Hi.")], (), "move")
    assert found.messages[0]["content"] == "You are an agent.\nBe brief."
    assert (found.note, found.moved) == (NOTE, ("billing", "date"))


def test_blocks_are_read_one_by_one_and_other_messages_are_left_as_they_are():
    """Parts of all leading system messages, developers' too; never a user's text."""
    parts = [{"type": "text", "text": BILLING}, {"type": "image", "data": "2026-11-29"}, DATE]
    messages = [system(parts), {"role": "developer", "content": f"a\n{DATE}"}, *user(DATE)]
    found = arranged(messages, (), "move")
    assert found.messages[0]["content"] == [{"type": "text", "text": ""}, parts[1], ""]
    assert found.messages[1]["content"] == "a\n"
    assert found.messages[2:] == user(DATE)
    assert found.moved == ("billing", "date", "date")
    assert parts[2] == DATE  # what was sent is as it was


@pytest.mark.parametrize(
    "line",
    [
        "Write dates in the format 2026-11-29.",
        "Your knowledge cutoff is January 2026.",
        "Call it with a day, for example 2026-11-29.",
        "Current branch: main",
        "x " * 250 + "2026-11-29",
        "Be brief.",
    ],
)
def test_lines_that_say_more_or_something_else_stay(line):
    """Formats, cutoffs and examples have dates that do not change; git's lines belong together."""
    found = arranged([system(line), *user("Hi.")], (), "move")
    assert (found.messages[0]["content"], found.note) == (line, "")


@pytest.mark.parametrize("mode", ["off", "mark"])
def test_nothing_is_moved_that_nobody_asked_to_move(mode):
    """The very messages that were sent."""
    messages = [system(SYSTEM), *user("Hi.")]
    found = arranged(messages, (), mode)
    assert (found.messages is messages, found.note, found.moved) == (True, "", ())


def test_the_note_stands_behind_the_last_that_is_not_the_assistants(instant):
    """A question, a tool's result; in front of a reply that is gone on with. Earlier turns never have it,
    so that they are rendered alike in each step.
    """
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        *user("One?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "Two."},
        {"role": "assistant", "content": "Three"},
    ]
    found = [prompt(instant, [system(SYSTEM), *turns[:upto]]) for upto in (1, 3, 4)]
    for said, before in zip(found, ("One?", "Two.", "Two."), strict=True):
        assert said.count(NOTE) == 1
        assert before + NOTE in said
    assert found[1].startswith(found[0].partition(NOTE)[0])
    assert prompt(instant, [system(SYSTEM)]).count(NOTE) == 1


def test_a_long_prompt_is_searched_at_its_beginning_only():
    """Whole lines within the first 256K characters, of messages and of tools; what is behind is not moved."""
    filling = "word " * 20 + "\n"
    long = DATE + "\n" + filling * (HEAD // len(filling)) + DATE + "\n" + filling * 9 + DATE
    found = arranged([system(long), system(DATE), *user("Hi.")], (), "move")
    assert found.moved == ("date",)
    assert found.messages[0]["content"] == long.removeprefix(DATE + "\n")
    assert found.messages[1]["content"] == DATE
    far = [{"function": {"name": filling * (HEAD // len(filling) + 1), "description": DATE}}]
    assert arranged(user("Hi."), far, "mark").volatile == ()


def test_the_head_is_what_no_assistant_has_answered_and_the_tools():
    """Descriptions at any depth; nothing behind the first reply."""
    deep: Any = {"description": "as of 2026-11-28"}
    for _ in range(5_000):
        deep = {"a": [deep]}
    later = [*user("Hi."), {"role": "assistant", "content": DATE}, *user(DATE)]
    assert [each.text for each in arranged(later, [deep], "mark").volatile] == ["2026-11-28"]
    assert [each.text for each in arranged(user(DATE), (), "mark").volatile] == ["2026-11-29"]


def test_a_line_is_told_once():
    """Whatever else is volatile in it."""
    (line,) = volatile_lines(f"a\n{DATE} 03:14 and 2026-11-30\nb")
    assert (line.start, line.span.start, line.span.kind) == (2, 16, "date")


# Tools


def shuffled(value: Any, chance: random.Random) -> Any:
    """The same tools as another client might send them: lists of tools, keys and what is required in any order."""
    if isinstance(value, dict):
        names = list(value)
        chance.shuffle(names)
        return {name: shuffled(value[name], chance) for name in names}
    return [shuffled(each, chance) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(20))
def test_tools_have_one_order(seed):
    """By names; keys name first, then by letters. What they say is the same."""
    chance = random.Random(seed)
    own = shuffled(tools("find_person", "get_weather"), chance)
    own.append({"type": "function", "function": {"parameters": {"enum": ["b", "a"]}, "name": "a"}})
    other = shuffled(own, chance)
    chance.shuffle(other)
    assert json.dumps(canonical(other)) == json.dumps(canonical(own))
    assert [tool["function"]["name"] for tool in canonical(other)] == sorted(
        tool["function"]["name"] for tool in own
    )
    assert all(next(iter(tool["function"])) == "name" for tool in canonical(other))
    assert all(tool in own for tool in canonical(own))


def test_only_what_is_required_is_a_set():
    """Choices keep their order, which a model reads; names of what is required have none."""
    schema = {"required": ["b", "a"], "enum": ["b", "a"], "properties": {"required": {"enum": [2]}}}
    (tool,) = canonical([{"function": {"name": "f", "parameters": schema}}])
    found = tool["function"]["parameters"]
    assert (found["required"], found["enum"]) == (["a", "b"], ["b", "a"])
    assert found["properties"] == schema["properties"]


def test_tools_in_another_order_are_hot_where_that_is_asked_for(instant):
    """The same prompt with the field, all but its last token restored; without it they part ways early."""
    chance = random.Random(1)
    own = tools("find_person", "get_weather")
    other = list(reversed(shuffled(own, chance)))
    messages = [system(text(100)), *user("Where is Omar?")]
    for asked in (True, False):
        body = {"messages": messages, "max_tokens": 1, "canonical_tools": asked}
        first, second = (
            instant.answer(CHAT, **body, tools=each, cache_salt=f"tools {asked}")
            for each in (own, other)
        )
        missed = second["usage"]["prompt_tokens"] - cached(second)
        assert (missed == 1) == asked
        assert first["usage"]["prompt_tokens"] > 200
        (newest,) = instant.client.get("/v1/cache/recent").json()["data"][:1]
        assert bool(newest["stable_prefix"] and newest["stable_prefix"]["canonical_tools"]) == asked


def test_deeply_nested_tools_are_as_they_were():
    """Levels beyond a hundred keep the order of their keys."""
    deep: Any = {"b": 1, "a": 2}
    for _ in range(200):
        deep = {"x": deep}
    (found,) = canonical([{"function": {"name": "f", "parameters": deep}}])
    assert found == {"function": {"name": "f", "parameters": deep}}
