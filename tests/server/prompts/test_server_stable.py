"""What a line that changes costs: counts of tokens that are read again, in each of the modes."""

from __future__ import annotations

import random
import uuid
from typing import Any

import pytest
from bundled import load, text
from long import forms
from mlx_hybridcache_server.replies.notices import WARNING_HEADER
from replies import cached, content
from servers import CHAT, MESSAGES, user

KINDS = ("billing", "date", "uuid", "path")
NAMES = ("Omar", "Ada", "Zoe", "Ivy", "Leo")


def changing(kind: str, chance: random.Random) -> str:
    """A line of that kind, drawn anew."""
    drawn = uuid.UUID(int=chance.getrandbits(128))
    return {
        "billing": f"x-anthropic-billing-header: cc_version=9.9.9; cch={drawn.hex[:5]}1;",
        "date": f"Today's date: 2026-{chance.randint(1, 12):02}-{chance.randint(1, 28):02}",
        "uuid": f"Instance {drawn} answers.",
        "path": f"Scratchpad: /tmp/agent-1000/{drawn.hex}/scratchpad",
    }[kind]


def heads(size: int, chance: random.Random) -> tuple[str, str]:
    """A head of about so many tokens, as what is before and behind a line of it."""
    lines = text(size).replace("1", "one").splitlines()
    at = chance.randint(len(lines) // 3, len(lines) - 2)
    return "\n".join(lines[:at]), "\n".join(lines[at:])


def system(head: tuple[str, str], line: str) -> list[dict[str, Any]]:
    before, behind = head
    return [{"role": "system", "content": f"{before}\n{line}\n{behind}"}]


def ask(server, head, line, messages, **fields: Any) -> dict[str, Any]:
    """A reply of eight tokens at most, always as many where it is asked twice."""
    asked = [*system(head, line), *messages]
    reply: dict[str, Any] = server.answer(CHAT, messages=asked, max_tokens=8, **fields)
    return reply


def prompt(server, head, line, messages, **fields: Any) -> str:
    asked = [*system(head, line), *messages]
    return str(server.answer("/apply-template", messages=asked, **fields)["prompt"])


def tokens(said: str) -> list[int]:
    found: list[int] = load()[1].encode(said, add_special_tokens=False)
    return found


def agree(one: list[int], other: list[int]) -> int:
    """How many tokens two prompts begin with alike."""
    return next(
        (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )


def read(reply: dict[str, Any]) -> int:
    return int(reply["timings"]["prompt_n"])


CASES = [(kind, size) for kind in KINDS for size in (800,)]
WHOLE = [(kind, 20_000) for kind in ("date", "uuid")]


@pytest.mark.parametrize("cases", forms(CASES, WHOLE))
def test_a_line_that_changed_costs_what_stands_behind_it_and_no_more(instant, cases):
    """`mark`, from the second request on: restored exactly in front of the line, wherever it stands. The
    same line again costs nothing: all but the last token is restored, as if it had never changed.
    """
    for kind, size in cases:
        chance = random.Random(f"{kind} {size}")
        head = heads(size, chance)
        first, second = changing(kind, chance), changing(kind, chance)
        fields = {"stable_prefix": "mark", "cache_salt": f"mark {kind} {size}"}
        question = user("Where is Omar?")
        cold, hot, again = (
            ask(instant, head, one, question, **fields) for one in (first, second, second)
        )
        whole = tokens(prompt(instant, head, second, question))
        before = tokens(prompt(instant, head, second, question).partition(second)[0])
        # An id that begins with a letter may share its first token with the space before it.
        marked = [reply["timings"]["stable_n"] for reply in (cold, hot)]
        stable = min(marked)
        assert max(marked) - stable <= 1
        assert (
            len(before) - 1
            <= stable
            <= agree(whole, tokens(prompt(instant, head, first, question)))
        )
        assert (cached(cold), cached(hot), cached(again)) == (0, stable, len(whole) - 1)
        assert read(hot) == len(whole) - stable


@pytest.mark.parametrize("cases", forms(CASES, WHOLE))
def test_a_line_that_is_moved_costs_nothing_when_it_changes(instant, cases):
    """`move`: whether each step of a conversation has a new line or the old one, as many tokens are read;
    the head is not among them, and neither is it in another conversation with another line.
    """
    for kind, size in cases:
        chance = random.Random(f"{kind} {size}")
        head = heads(size, chance)
        lines = [changing(kind, chance) for _ in NAMES]
        steps = {
            "changed": _conversation(instant, head, lines, f"{kind} {size} a"),
            "same": _conversation(instant, head, lines[:1] * len(lines), f"{kind} {size} b"),
        }
        assert steps["changed"][0] > size / 2
        assert max(steps["changed"][1:]) < 200
        longest = max(len(tokens(line)) for line in lines) - min(
            len(tokens(line)) for line in lines
        )
        for changed, same in zip(steps["changed"], steps["same"], strict=True):
            assert abs(changed - same) <= longest  # of the line itself
        other = ask(
            instant,
            head,
            changing(kind, chance),
            user("What is the honey of Ada?"),
            stable_prefix="move",
            cache_salt=f"{kind} {size} a",
        )
        assert read(other) < 200


def _conversation(server, head, lines, salt) -> list[int]:
    """What is read in each step. Replies are said to be equal, so that steps can be compared."""
    said: list[dict[str, Any]] = []
    counts = []
    for name, line in zip(NAMES, lines, strict=True):
        said += user(f"Where is {name}?")
        counts.append(read(ask(server, head, line, said, stable_prefix="move", cache_salt=salt)))
        said.append({"role": "assistant", "content": "In the garden."})
    return counts


def test_a_mark_changes_no_reply(instant):
    """Text and tokens are those of a request without one, hot and cold."""
    chance = random.Random(3)
    head = heads(600, chance)
    for line in (changing("date", chance) for _ in range(3)):
        replies = [
            ask(
                instant,
                head,
                line,
                user("Where is Omar?"),
                stable_prefix=mode,
                logprobs=True,
                **more,
            )
            for mode, more in (("off", {"cache_prompt": False}), ("mark", {}), ("mark", {}))
        ]
        assert [one["choices"] for one in replies] == [replies[0]["choices"]] * 3


def test_what_is_moved_gets_the_reply_that_it_gets_without_the_cache(instant):
    """Restored in front of the note: the tokens and log-probabilities of a request that restores nothing."""
    chance = random.Random(4)
    head = heads(600, chance)
    for line in (changing("uuid", chance) for _ in range(3)):
        hot, cold = (
            ask(
                instant,
                head,
                line,
                user("Where is Ada?"),
                stable_prefix="move",
                logprobs=True,
                **more,
            )
            for more in ({}, {"cache_prompt": False})
        )
        assert hot["choices"] == cold["choices"]


def test_messages_are_marked_unless_they_say_no_and_chats_if_they_say_so(instant):
    """Of itself in Anthropic's protocol; by a request's own field in every one."""
    chance = random.Random(5)
    head = heads(300, chance)
    (message,) = system(head, changing("date", chance))
    body = {"system": message["content"], "messages": user("Hi."), "max_tokens": 1}
    assert "stable_n" in instant.answer(MESSAGES, **body)["timings"]
    assert "stable_n" not in instant.answer(MESSAGES, **body, stable_prefix="off")["timings"]
    chat = {"messages": [message, *user("Hi.")], "max_tokens": 1}
    assert "stable_n" not in instant.answer(CHAT, **chat)["timings"]
    assert "stable_n" in instant.answer(CHAT, **chat, stable_prefix="mark")["timings"]
    items = {"instructions": message["content"], "input": "Hi.", "max_output_tokens": 1}
    assert "stable_n" not in instant.answer("/v1/responses", **items)["timings"]
    assert "stable_n" in instant.answer("/v1/responses", **items, stable_prefix="mark")["timings"]


def test_what_was_done_is_told(instant):
    """In the header where the prompt is another, in `timings`, and in the reports."""
    chance = random.Random(6)
    head = heads(300, chance)
    asked = [*system(head, changing("date", chance)), *user("Today is Monday.")]
    moved = instant.post(CHAT, messages=asked, max_tokens=1, stable_prefix="move")
    assert "1 line of the system prompt (date) moved" in moved.headers[WARNING_HEADER]
    (newest,) = instant.client.get("/v1/cache/recent").json()["data"][:1]
    told = newest["stable_prefix"]
    assert (told["mode"], told["moved"], told["tokens"]) == ("move", ["date"], None)
    (boundary,) = told["boundaries"]
    assert 300 < boundary < newest["prompt_tokens"]
    marked = instant.post(CHAT, messages=asked, max_tokens=1, stable_prefix="mark")
    assert WARNING_HEADER not in marked.headers
    (newest,) = instant.client.get("/v1/cache/recent").json()["data"][:1]
    assert newest["stable_prefix"]["boundaries"] == [marked.json()["timings"]["stable_n"]]


def test_what_stands_at_the_very_beginning_gets_no_mark(instant):
    """A checkpoint behind a few tokens saves nothing; the next volatile thing gets one."""
    line = "x-anthropic-billing-header: cch=0a1b2;"
    said = f"{line}\n{text(200).replace('1', 'one')}\nToday's date: 2026-11-29"
    asked = [{"role": "system", "content": said}, *user("Hi.")]
    reply = instant.answer(CHAT, messages=asked, max_tokens=1, stable_prefix="mark")
    (newest,) = instant.client.get("/v1/cache/recent").json()["data"][:1]
    assert reply["timings"]["stable_n"] < 10
    assert newest["stable_prefix"]["boundaries"][0] > 190


def test_a_conversation_is_rendered_alike_wherever_it_is_counted_warmed_or_shown(instant):
    """`count_tokens`, warming and `/apply-template` follow the same fields as replies do."""
    chance = random.Random(7)
    head = heads(300, chance)
    (message,) = system(head, changing("path", chance))
    fields = {"stable_prefix": "move", "cache_salt": "alike"}
    instant.answer("/v1/cache/warm", messages=[message], **fields)
    other = system(head, changing("path", chance))
    reply = instant.answer(CHAT, messages=[*other, *user("Hi.")], max_tokens=1, **fields)
    assert cached(reply) > 300
    body = {"system": other[0]["content"], "messages": user("Hi."), "stable_prefix": "move"}
    counted = instant.answer(f"{MESSAGES}/count_tokens", **body)["input_tokens"]
    assert counted == reply["usage"]["prompt_tokens"]
    assert content(reply)
