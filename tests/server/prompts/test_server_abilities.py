"""What is learnt of a chat template by asking it: whether it renders things in their place, and all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import pytest
from mlx_hybridcache_server.prompts.abilities import Abilities

ALL = asdict(Abilities())


def plain(messages: Iterable[dict[str, Any]], tools: Any = None) -> str:
    """A template that renders everything where it stands."""
    said = []
    for message in messages:
        calls = json.dumps(message.get("tool_calls", ""))
        said.append(f"<{message['role']}>{message['content']}{calls}")
    return "".join(said)


def system_first(messages: list[dict[str, Any]], tools: Any = None) -> str:
    """One that moves what the system says to the front."""
    return plain(sorted(messages, key=lambda message: message["role"] != "system"))


def one_call(messages: list[dict[str, Any]], tools: Any = None) -> str:
    """One that renders a message's first call."""
    return plain({**each, "tool_calls": each.get("tool_calls", [])[:1]} for each in messages)


def no_results(messages: list[dict[str, Any]], tools: Any = None) -> str:
    return plain(each for each in messages if each["role"] != "tool")


def alternates(messages: list[dict[str, Any]], tools: Any = None) -> str:
    roles = [message["role"] for message in messages]
    if any(a == b for a, b in pairwise(roles)):
        raise ValueError("roles must alternate")
    return plain(messages)


def short_ids(messages: list[dict[str, Any]], tools: Any = None) -> str:
    for message in messages:
        if any(len(call["id"]) != 9 for call in message.get("tool_calls", ())):
            raise ValueError("an id has nine letters")
    return plain(messages)


@pytest.mark.parametrize(
    ("render", "cannot"),
    [
        (plain, set()),
        (system_first, {"late_system"}),
        (one_call, {"several_calls"}),
        (no_results, {"results"}),
        (alternates, {"repeats"}),
        (short_ids, {"any_id"}),
    ],
)
def test_what_a_template_cannot_is_learnt_and_nothing_else(render, cannot):
    """Each template lacks one ability."""
    learnt = asdict(Abilities.learn(render))
    assert {name for name in ALL if not learnt[name]} == cannot


def test_a_template_that_renders_no_question_is_taken_at_its_word():
    """It may need what the probes have not; its own errors are told later."""

    def fails(messages: Any, tools: Any) -> str:
        raise KeyError("documents")

    assert Abilities.learn(fails) == Abilities()
