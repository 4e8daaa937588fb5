"""`POST /v1/cache/explain`: what a server would restore, what it tells of others, and what it does with odd bodies."""

from __future__ import annotations

import json
import random
import threading
from contextlib import suppress

import pytest
from bundled import text
from in_process import Client, served
from long import mostly_long
from mlx_hybridcache_server.explaining import comparison
from mlx_hybridcache_server.explaining.comparison import compared
from mlx_hybridcache_server.explaining.differences import differences
from mlx_hybridcache_server.explaining.kinds import Kind
from mlx_hybridcache_server.explaining.turns import carried_over
from mlx_hybridcache_server.prompts.chat import Renderer
from mlx_hybridcache_server.schema.requests import ChatBody
from servers import CHAT, COMPLETIONS, INSTANT, user
from texts.changed_requests import PLANTED, as_messages, as_response, pair

EXPLAIN, MESSAGES, RESPONSES = "/v1/cache/explain", "/v1/messages", "/v1/responses"

SECRET = "the harbour master keeps a green parrot"

ASKED = {
    CHAT: lambda body: {**body, "max_tokens": 1},
    MESSAGES: lambda body: as_messages(body) | {"max_tokens": 1},
    RESPONSES: lambda body: {**as_response(body), "max_output_tokens": 1, "store": False},
}


ALWAYS = range(0, len(PLANTED), 4)
"""Of each protocol some; that all kinds are told is proven without a server, too."""


def read(reply: dict) -> int:
    """Tokens of a reply's prompt that were not restored."""
    usage = reply["usage"]
    if "cache_read_input_tokens" in usage:
        return usage["input_tokens"] + usage["cache_creation_input_tokens"]
    details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
    return usage.get("prompt_tokens", usage.get("input_tokens")) - details["cached_tokens"]


def endpoint_of(kind: str, seed: int) -> str:
    """Each in turn; Responses has no switch for the template."""
    return CHAT if kind == "template_arguments" else [*ASKED][seed % len(ASKED)]


@pytest.mark.parametrize("seed", mostly_long(range(len(PLANTED)), ALWAYS), ids=PLANTED)
def test_what_is_said_to_be_read_is_what_is_read(server, seed):
    """Behind the first request; of every kind of change, in every protocol, with checkpoints as they are."""
    drawn = pair(seed)
    path = endpoint_of(drawn.kind, seed)
    first, second = (
        ASKED[path](body) | {"cache_salt": f"pair {seed}"} for body in (drawn.first, drawn.second)
    )
    server.answer(path, **first)
    told = server.answer(EXPLAIN, requests=[first, second])
    assert (told["change"], told["checkpoints"]) == (drawn.kind, "store")
    assert told["read_tokens"] == read(server.answer(path, **second))
    assert told["tokens_per_second"] > 0
    assert told["read_seconds"] == pytest.approx(
        told["read_tokens"] / told["tokens_per_second"], rel=0.1, abs=0.01
    )


def test_behind_the_models_own_reply_the_next_turn_is_counted_alike(server):
    """What is stored goes on behind the first prompt; this template writes a past turn in another way."""
    asked = {"messages": user("Where is Omar?"), "cache_salt": "reply", "max_tokens": 20, **INSTANT}
    said = server.answer(CHAT, **asked)["choices"][0]["message"]["content"]
    goes_on = [*asked["messages"], {"role": "assistant", "content": said}, *user("Why?")]
    follows = asked | {"messages": goes_on}
    told = server.answer(EXPLAIN, requests=[asked, follows])
    assert told["change"] == "appended"
    assert told["read_tokens"] == read(server.answer(CHAT, **follows))


def test_behind_both_requests_it_is_still_told_what_such_a_change_costs(server):
    """The second is stored too, up to its end: what is behind the place of change counts all the same."""
    drawn = pair([*PLANTED].index("date"))
    bodies = [
        each | {"cache_salt": "both", "max_tokens": 1} for each in (drawn.first, drawn.second)
    ]
    for body in bodies:
        server.answer(CHAT, **body)
    told = server.answer(EXPLAIN, requests=bodies)
    assert told["change"] == "date"
    assert told["restored_tokens"] <= told["common_tokens"] < told["again_tokens"]
    assert server.answer(EXPLAIN, requests=bodies[1:])["change"] == "same"


def test_without_the_first_one_stored_the_best_case_is_told_and_named(server):
    drawn = pair(0)
    bodies = [each | {"cache_salt": "never asked"} for each in (drawn.first, drawn.second)]
    told = server.answer(EXPLAIN, requests=bodies)
    assert told["checkpoints"] == "best_case"
    assert "best case" in told["assumed"]
    assert told["restored_tokens"] == told["common_tokens"]


def test_requests_that_share_nothing_are_told_apart_before_their_prompts(server):
    """Salts, and a request that is read without the cache."""
    body = {"messages": user("Hello."), "cache_salt": "one"}
    for other, kind in (
        ({"cache_salt": "other"}, "other_salt"),
        ({"cache_prompt": False}, "not_cached"),
    ):
        told = server.answer(EXPLAIN, requests=[body, body | other])
        assert (told["change"], told["restored_tokens"], told["is_hot"]) == (kind, 0, False)


def test_where_one_model_serves_every_name_names_part_nothing(server):
    body = {"messages": user("Hello."), "cache_salt": "named"}
    told = server.answer(EXPLAIN, requests=[body | {"model": "one"}, body | {"model": "another"}])
    assert told["change"] == "same"


def test_where_requests_choose_their_model_two_models_share_nothing():
    async def work(_, app):
        body = {"messages": user("Hello.")}
        both = {"requests": [body, body | {"model": "someone/other"}]}
        told = (await Client(app, EXPLAIN, both).answer()).reply
        assert (told["change"], told["restored_tokens"]) == ("other_model", 0)

    served(work, "--allow-model-switching")


def test_what_is_stored_for_another_adapter_is_not_taken_for_its_own():
    """It was said to be restored, out of what the model has without one. Names of Anthropic's mean what is served."""

    async def work(serving, app):
        async def told(*requests):
            return await Client(app, EXPLAIN, {"requests": [*requests]}).answer()

        body = {"messages": user("Hello."), "max_tokens": 1}
        await Client(app, CHAT, body).answer()
        adapted = body | {"adapters": "/another"}
        alone = await told(adapted)
        assert (alone.status, alone.reply["error"]["code"]) == (409, "model_not_in_use")
        both = (await told(adapted, adapted)).reply
        assert (both["change"], both["checkpoints"]) == ("same", "best_case")
        as_served = body | {"model": "claude-any", "system": "Be brief."}
        assert (await told(as_served)).status == 200
        assert (await told(body)).reply["change"] == "same"

    served(work, "--allow-model-switching")


def test_one_request_that_declines_the_cache_is_not_said_to_be_restored(server):
    """It was: `cache_prompt` was looked at in pairs only."""
    asked = {"messages": user("Hello."), "cache_salt": "declined"}
    server.answer(CHAT, **asked, max_tokens=1)
    told = server.answer(EXPLAIN, requests=[asked | {"cache_prompt": False}])
    assert (told["change"], told["restored_tokens"], told["is_hot"]) == ("not_cached", 0, False)
    assert told["read_tokens"] == told["prompt_tokens"]


# One request


def system(day: str) -> list[dict]:
    content = f"You are an agent. Today is {day}. {text(300, 2000)}"
    return [{"role": "system", "content": content}, *user("What is new?")]


def test_one_request_is_explained_by_what_is_stored(server):
    """Nothing, then itself, then what was stored yesterday."""
    asked = {"messages": system("2026-11-25"), **INSTANT, "cache_salt": "alone"}
    told = server.answer(EXPLAIN, requests=[asked])
    assert (told["change"], told["reason"], told["is_hot"]) == (None, "cold", False)
    server.answer(CHAT, **asked, max_tokens=1)
    told = server.answer(EXPLAIN, requests=[asked])
    assert (told["change"], told["read_tokens"], told["is_hot"]) == ("same", 1, True)
    later = asked | {"messages": system("2026-11-26")}
    told = server.answer(EXPLAIN, requests=[later])
    assert (told["change"], told["where"]) == ("date", "messages[0] (system)")
    assert (told["text"]["asked"][:2], told["text"]["stored"][:2]) == ("6.", "5.")
    assert told["read_tokens"] == read(server.answer(CHAT, **later, max_tokens=1))
    goes_on = [*asked["messages"], {"role": "assistant", "content": "Not much."}, *user("And?")]
    told = server.answer(EXPLAIN, requests=[asked | {"messages": goes_on}])
    assert told["change"] in ("appended", "branched")


@pytest.mark.parametrize(("common", "change"), [(7, None), (8, "prompt_edited")])
def test_what_any_two_prompts_begin_with_is_no_likeness(server, common, change):
    """A template's opener: only from eight tokens on a prompt is told what parts it from another."""
    salt = f"{common} in common"
    stored = [100 + at for at in range(40)]
    server.answer(COMPLETIONS, prompt=stored, max_tokens=1, cache_salt=salt)
    other = stored[:common] + [200 + at for at in range(40)]
    told = server.answer(EXPLAIN, requests=[{"prompt": other, "cache_salt": salt}])
    assert (told["change"], told["text"]["stored"] is None) == (change, change is None)


def test_one_request_whose_tool_differs_from_what_is_stored_is_told_so(server):
    def asked(what):
        function = {"name": "look_up", "description": what, "parameters": {"type": "object"}}
        tools = [{"type": "function", "function": function}]
        return {"messages": user("Look."), "tools": tools, "cache_salt": "tool"}

    server.answer(CHAT, **asked("Find a town."), max_tokens=1)
    told = server.answer(EXPLAIN, requests=[asked("Find a river.")])
    assert told["change"] == "tool_edited"


def test_stored_letters_are_told_to_who_names_their_salt_and_to_nobody_else(server):
    """Else who may ask could have all that others have asked, a few letters at a time."""
    asked = f"{text(80, 3000)} {SECRET}"
    for salt in (None, "owner"):
        server.answer(COMPLETIONS, prompt=asked, max_tokens=1, cache_salt=salt)
    guess = {"prompt": f"{text(80, 3000)} ?"}
    told = server.post(EXPLAIN, requests=[guess])
    assert told.json()["text"]["stored"] is None
    assert told.json()["common_tokens"] > 40
    assert "harbour" not in told.text
    told = server.answer(EXPLAIN, requests=[guess | {"cache_salt": "owner"}])
    assert "harbour" in told["text"]["stored"]
    told = server.post(EXPLAIN, requests=[guess | {"cache_salt": "stranger"}])
    assert (told.json()["change"], told.json()["common_tokens"]) == (None, 0)
    assert "harbour" not in told.text


def test_with_show_prompts_the_operator_sees_what_has_no_salt():
    """As `/v1/cache/recent` shows it."""

    async def work(_, app):
        asked = f"{text(80, 3000)} {SECRET}"
        await Client(app, COMPLETIONS, {"prompt": asked, "max_tokens": 1}).answer()
        guess = {"requests": [{"prompt": f"{text(80, 3000)} ?"}]}
        told = (await Client(app, EXPLAIN, guess).answer()).reply
        assert "harbour" in told["text"]["stored"]

    served(work, "--show-prompts")


def test_looking_stores_nothing(server):
    """Nor reads: the figures of the cache stay what they are."""

    def figures() -> dict:
        told = server.client.get("/v1/cache").json()
        return {name: told[name] for name in ("checkpoints", "conversations", "requests")}

    before = figures()
    drawn = pair(3)
    server.answer(EXPLAIN, requests=[drawn.first])
    server.answer(EXPLAIN, requests=[drawn.first, drawn.second])
    assert figures() == before


def test_a_response_that_is_kept_is_explained_with_what_it_goes_on_from(server):
    """By its id; without the server that keeps it there is nothing to tell."""
    first = {"input": "Where is Omar?", "max_output_tokens": 4, "cache_salt": "kept"}
    kept = server.answer(RESPONSES, **first)
    follows = {"input": "Why?", "previous_response_id": kept["id"], "cache_salt": "kept"}
    told = server.answer(EXPLAIN, requests=[first, follows])
    assert told["change"] in ("appended", "reasoning_not_rendered")
    assert told["prompt_tokens"] > told["first_tokens"]
    unknown = server.post(EXPLAIN, requests=[follows | {"cache_salt": "other"}])
    assert unknown.status_code == 404


# What cannot be explained


@pytest.mark.parametrize(
    ("requests", "said"),
    [
        ([], "at least 1"),
        ([{}, {}, {}], "at most 2"),
        ([{"model": "x"}], "This is no request"),
        ([{"messages": []}], "Not a request for /v1/chat/completions: messages"),
        ([{"messages": [{"role": "user"}], "system": "x"}], "Not a request for /v1/messages"),
        ([{"input": [{"role": 5}]}], "Not a request for /v1/responses"),
        ([{"prompt": ["a", "b"]}], "several prompts"),
        ([{"prompt": [99999]}], "outside the model's vocabulary"),
        ([{"messages": user("x"), "continue_final_message": True}], "needs an assistant message"),
        ("x", "requests"),
    ],
)
def test_what_is_no_request_is_refused_with_a_sentence(server, requests, said):
    refused = server.post(EXPLAIN, requests=requests)
    assert refused.status_code == 400, refused.text
    assert said in refused.json()["error"]["message"]


def test_an_endpoint_may_be_named(server):
    """A plain conversation is a chat by its fields; for messages its last turn is gone on with."""
    body = {"messages": [*user("Hi"), {"role": "assistant", "content": "He"}], "max_tokens": 5}
    as_chat, as_message = (
        server.answer(EXPLAIN, requests=[body], endpoint=path)["prompt_tokens"]
        for path in (CHAT, MESSAGES)
    )
    assert server.answer(EXPLAIN, requests=[body])["prompt_tokens"] == as_chat > as_message
    assert server.post(EXPLAIN, requests=[body], endpoint="/v1/else").status_code == 400


def test_a_server_without_a_cache_says_so():
    async def work(_, app):
        refused = await Client(app, EXPLAIN, {"requests": [{"prompt": "x"}]}).answer()
        assert refused.status == 400
        assert "turned off" in refused.reply["error"]["message"]

    served(work, "--prompt-cache-size", "0")


# Within bounds


def rendered(one: dict, other: dict, monkeypatch) -> tuple[int, Kind]:
    """How many prompts are rendered to compare two chats, and what is found."""
    from mlx_hybridcache_server.explaining.local import renderer

    from mlx_hybridcache.demo import BUNDLED_MODEL

    count = 0
    whole = Renderer.chat

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return whole(*args, **kwargs)

    monkeypatch.setattr(Renderer, "chat", counted)
    steps = compared(*map(ChatBody.model_validate, (one, other)), renderer(str(BUNDLED_MODEL)))
    with suppress(StopIteration):
        while True:
            next(steps)
    return count, steps


def turns(count: int, word: str) -> dict:
    return {
        "messages": [
            *user("Hi"),
            *({"role": "user", "content": f"{word} {k}"} for k in range(count)),
        ]
    }


def test_however_much_differs_few_prompts_are_rendered(monkeypatch):
    """Two, and one for each halving of sixteen changes, and a last one."""
    count, _ = rendered(turns(300, "lamp"), turns(300, "door"), monkeypatch)
    assert count <= 8


def test_what_no_prompt_shows_is_never_work_for_the_thread_of_short_prompts(monkeypatch):
    """Three megabytes beside messages: all that reads them weighs as much, however short the prompts are."""
    seen = {
        "content": text(6000, 5),
        "note": "x" * 3_000_000,
    }  # the prompt is read in several pieces
    large = {"messages": [user("a")[0] | seen, *user("b")]}
    monkeypatch.setattr(comparison, "differences", _on_lanes(differences))
    monkeypatch.setattr(comparison, "carried_over", _on_lanes(carried_over))
    monkeypatch.setattr(Renderer, "chat", _on_lanes(Renderer.chat))
    lanes.clear()

    async def work(_, app):
        other = {**large, "messages": [large["messages"][0], *user("c")]}
        told = await Client(app, EXPLAIN, {"requests": [large, other]}).answer()
        assert told.reply["change"] == "message_edited"

    served(work)
    assert len(lanes) >= 5
    assert set(lanes) == {"render-2"}


lanes: list[str] = []


def _on_lanes(work):
    """The same, which notes the thread that it begins on."""

    def noted(*args, **kwargs):
        lanes.append(threading.current_thread().name.removesuffix("_0"))
        return work(*args, **kwargs)

    return noted


def test_a_body_of_many_megabytes_stops_nobody():
    """Others are answered while it is worked on; it is refused as its request would be, by its length."""

    async def work(_, app):
        many = {
            "messages": [{"role": "user", "content": f"{k} {'word ' * 8}"} for k in range(60_000)]
        }
        sent = json.dumps({"requests": [many, many]}).encode()
        large = Client(app, EXPLAIN, sent)
        answered = 0
        while not large.task.done():
            health = await Client(app, "/health", method="GET", body=b"").answer()
            answered += health.status == 200
        assert large.status == 400
        assert "context length" in large.reply["error"]["message"]
        assert answered >= 3

    served(work)


@pytest.mark.parametrize(
    ("first", "second", "change"),
    [
        (user("a"), [{"role": "system", "content": "x"}], "system_edited"),
        ([*user("a"), *user("b")], [{"role": "developer", "content": "x"}], "system_edited"),
        ([{"role": "system", "content": "x"}], user("a"), "system_edited"),
        (
            [{**user("a")[0], "tool_calls": [{"x": 1}]}, *user("b")],
            [{**user("a")[0], "tool_calls": [{"x": 2}]}, *user("c")],
            "message_edited",
        ),
        (
            [{**user("a")[0], "tool_calls": None}, *user("b")],
            [{**user("a")[0], "tool_calls": [{"function": 5}]}, *user("c")],
            "message_edited",
        ),
    ],
)
def test_odd_conversations_are_explained_too(server, first, second, change):
    """Of which the one has no question, or whose user calls tools: chats are answered, so they are explained."""
    told = server.answer(EXPLAIN, requests=[{"messages": first}, {"messages": second}])
    assert told["change"] == change


@pytest.mark.parametrize("kind", [[], {}, 5])
def test_a_part_of_no_kind_is_refused_as_by_its_endpoint(server, kind):
    messages = [{"role": "user", "content": [{"type": kind, "text": "x"}]}]
    refused = [
        server.post(EXPLAIN, requests=[{"messages": messages}]),
        server.post(CHAT, messages=messages),
    ]
    assert [each.status_code for each in refused] == [400, 400]
    assert len({each.json()["error"]["message"] for each in refused}) == 1


def test_a_character_that_was_cut_in_two_is_explained_as_it_is_read(server):
    """As every endpoint reads it that a text is sent to."""
    said = b'{"messages": [{"role": "user", "content": "a \\ud83d b"}]}'
    whole = {"messages": user("a \ufffd b")}
    told = server.client.post(EXPLAIN, content=b'{"requests": [%s]}' % said)
    assert told.json() == server.answer(EXPLAIN, requests=[whole])


@pytest.mark.parametrize("depth", [20, 450])
def test_what_is_nested_deeply_is_explained_or_refused(server, depth):
    """In a tool's schema, which is compared level by level."""
    schema = '{"properties": {"a": ' * depth + "{}" + "}}" * depth
    bodies = [
        f'{{"messages": [{{"role": "user", "content": "x"}}], "tools": [{{"function": {{"name": "t", '
        f'"description": "{said}", "parameters": {schema}}}}}]}}'
        for said in ("It.", "That.")
    ]
    sent = f'{{"requests": [{", ".join(bodies)}]}}'
    answer = server.client.post(EXPLAIN, content=sent)
    assert answer.status_code in (200, 400), answer.text
    assert server.client.get("/health").status_code == 200


def test_fuzzed_changes_get_an_answer(server):
    """Whatever is taken out of a request or put into it: an explanation, or a refusal with a sentence."""
    draw = random.Random(7)
    odd = [None, 5, "x", [], {}, [None], [{"type": "image"}], {"a": 1}]
    for seed in range(60):
        drawn = pair(seed)
        body = drawn.second
        for _ in range(draw.randint(1, 3)):
            holder = draw.choice([body, draw.choice(body["messages"] or [{}])])
            holder[draw.choice([*holder, "tools", "content", "role", "name"])] = draw.choice(odd)
            if not isinstance(body.get("messages"), list):
                break
        answer = server.post(EXPLAIN, requests=[drawn.first, body])
        assert answer.status_code in (200, 400), answer.text
        assert answer.json().get("change") or answer.json()["error"]["message"]
