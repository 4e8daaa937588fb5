"""What stands at a place of a prompt, by the letters there: which part of the chat, and what kind of change."""

from __future__ import annotations

from typing import Any

import pytest
from mlx_hybridcache_server.explaining.differences import Where
from mlx_hybridcache_server.explaining.kinds import Kind
from mlx_hybridcache_server.explaining.places import MOST_MISSED, place
from mlx_hybridcache_server.explaining.texts import kind_between
from mlx_hybridcache_server.explaining.turns import changed
from mlx_hybridcache_server.schema.requests import ChatBody

TOOLS = ["look_up", "write_down"]
SAID = [
    ("system", "Be kind."),
    ("system", "Be brief."),
    ("user", "Where is Omar?"),
    ("assistant", "In the kitchen."),
    ("user", "Where is Lena?"),
]
PROMPT = (
    '<tools>{"name": "look_up", "description": "a"} {"name": "write_down", "description": "b"}'
    "</tools>Be kind.\n\nBe brief.<user>Where is Omar?<assistant>In the kitchen.<user>Where is Lena?"
)


def chat(said: list[tuple[str, str]] = SAID, tools: list[str] = TOOLS) -> ChatBody:
    functions = [{"type": "function", "function": {"name": name}} for name in tools]
    messages = [{"role": role, "content": text} for role, text in said]
    return ChatBody.model_validate({"messages": messages, "tools": functions or None})


@pytest.mark.parametrize(
    ("letters", "where"),
    [
        ('"look_up"', Where("tools", 0, "look_up")),
        ('"b"', Where("tools", 1, "write_down")),
        ("kind", Where("messages", 0, "system")),
        ("brief", Where("messages", 0, "system")),
        ("Where is Omar", Where("messages", 2, "user")),
        ("kitchen", Where("messages", 3, "assistant")),
        ("Lena", Where("messages", 4, "user")),
    ],
)
def test_a_letter_belongs_to_the_part_that_began_last(letters, where):
    """From a part's own first letter on; of several system messages, which templates read as one, to the first."""
    assert place(chat(), PROMPT, PROMPT.index(letters)) == where


def test_before_all_parts_nothing_is_known():
    """Of a template's own words at the beginning."""
    assert place(chat(), PROMPT, 0) is None


def test_a_part_that_a_template_leaves_out_hides_no_other():
    """Up to eight of them; behind so many the template writes everything in another way."""
    for missing, found in ((MOST_MISSED, True), (MOST_MISSED + 1, False)):
        hidden = [("user", f"hidden {at}") for at in range(missing)]
        body = chat([*SAID[:3], *hidden, SAID[4]], [])
        told = place(body, PROMPT, PROMPT.index("Lena"))
        assert told == (
            Where("messages", 3 + missing, "user") if found else Where("messages", 2, "user")
        )


RESULT = "one two three four five six seven eight nine ten"


@pytest.mark.parametrize(
    ("left", "kind"),
    [
        ("one two three", "tool_result_shortened"),
        ("ten, nine, eight", "tool_result_shortened"),
        ("one two three four (...) seven eight nine ten", "tool_result_shortened"),
        ("One, Two, Three, Four, Five, Six, Seven, Eight", "tool_result_edited"),
        (RESULT + " eleven", "tool_result_edited"),
    ],
)
def test_a_result_is_shortened_where_half_of_it_or_its_own_ends_are_left(left, kind):
    """A text as long as most of it that shares neither beginning nor end is another one."""

    def history(result: str) -> list[dict[str, Any]]:
        call = {"id": "a", "type": "function", "function": {"name": "look_up", "arguments": {}}}
        return [
            {"role": "user", "content": "Where is Omar?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": result},
        ]

    (turn,) = changed(history(RESULT), history(left))
    assert (turn.kind.value, turn.index, turn.field) == (kind, 2, "content")


@pytest.mark.parametrize(
    ("one", "other", "kind"),
    [
        ("Look into /srv/one\nfirst", "Look into /srv/one\nthen", None),
        ("Look into /srv/one first", "Look into /srv/two first", Kind.PATH),
        ("Look into / first", "Look into /srv first", None),
        ("It is 5 o'clock.", "It is 17 o'clock.", Kind.NUMBER),
    ],
)
def test_a_change_is_named_by_what_stands_in_its_own_line(one, other, kind):
    """In both texts: a path that ended the line before, or that one of them ends, is not what changed."""
    assert kind_between(one, other) is kind
