"""Fields of other servers' clients: followed, said in a header and the log, or refused."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from mlx_hybridcache_server.errors import ApiError
from mlx_hybridcache_server.generation.limits import NotBefore, ThinkingLimit
from mlx_hybridcache_server.schema.dialects import NOT_FOLLOWED, REFUSED, Dialect
from servers import CHAT, COMPLETIONS, INSTANT, user

from mlx_hybridcache.demo.functions import FUNCTIONS

WARNED = "x-mlx-hybridcache-warning"
WEATHER = next(each.declaration() for each in FUNCTIONS if each.name == "get_weather")["function"]
MESSAGES = {"messages": user("x")}


def read(**sent):
    """What fields are read as, and the names of what is warned of."""
    dialect = Dialect()
    fields = dialect.followed({**MESSAGES, **sent})
    assert fields.pop("messages") == MESSAGES["messages"]
    return fields, [name for name, _ in dialect.warnings]


@pytest.mark.parametrize(
    ("sent", "switch"),
    [
        ({"enable_thinking": False}, False),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, True),
        ({"thinking": True}, True),
        ({"think": False}, False),
        ({"reasoning": {"enabled": False}}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning": {"effort": "none"}}, False),
        ({"thinking": True, "enable_thinking": False}, False),
        ({"reasoning_effort": "low"}, None),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": None, "enable_thinking": None}, None),
    ],
)
def test_switches_of_thinking_go_to_the_template(sent, switch):
    """`thinking: {"type": "disabled"}` is enable_thinking false; what a request names itself wins."""
    fields, warned = read(**sent)
    expected = {"enable_thinking": switch, "thinking": switch}
    assert fields.get("chat_template_kwargs") == (None if switch is None else expected)
    own = {"chat_template_kwargs": {"enable_thinking": "own"}}
    fields, _ = read(**sent, **own)
    assert fields["chat_template_kwargs"]["enable_thinking"] == "own"
    assert not warned


@pytest.mark.parametrize(
    "sent",
    [
        {"thinking_budget": 9},
        {"thinking": {"type": "enabled", "budget_tokens": 9}},
        {"reasoning": {"max_tokens": 9}},
        {"reasoning_budget": 9},
    ],
)
def test_a_budget_of_thinking_has_several_names(sent):
    """All mean nine tokens; -1 means no limit."""
    assert read(**sent)[0]["thinking_budget"] == 9
    assert "thinking_budget" not in read(reasoning_budget=-1, reasoning={"max_tokens": -1})[0]


@pytest.mark.parametrize(
    "sent",
    [
        {"guided_json": {"type": "object"}},
        {"guided_json": '{"type": "object"}'},
        {"structured_outputs": {"json": {"type": "object"}}},
        {"json_schema": {"type": "object"}},
        {"format": {"type": "object"}},
    ],
)
def test_a_schema_under_another_name_is_a_response_format(sent):
    """vLLM's, llama.cpp's and Ollama's; one that is given under our name wins."""
    form = read(**sent)[0]["response_format"]
    assert form["json_schema"]["schema"] == {"type": "object"}
    text = {"type": "text"}
    assert read(**sent, response_format=text)[0]["response_format"] == text
    assert read(format="json")[0]["response_format"] == {"type": "json_object"}


def test_other_names_of_our_own_fields_are_followed():
    """llama.cpp's and Ollama's; our own name wins; -1 is no limit."""
    fields, _ = read(repeat_penalty=1.1, n_predict=7)
    assert (fields["repetition_penalty"], fields["max_tokens"]) == (1.1, 7)
    assert read(n_predict=7, max_tokens=3)[0]["max_tokens"] == 3
    assert "max_tokens" not in read(n_predict=-1)[0]
    assert read(max_tokens=-1)[0] == {"max_tokens": -1}  # which is refused, as by mlx_lm.server


def test_the_first_form_of_tools_is_read_as_tools():
    """`functions` and `function_call`, as OpenAI had them before `tools`."""
    fields, _ = read(functions=[WEATHER], function_call={"name": "get_weather"})
    assert fields["tools"] == [{"type": "function", "function": WEATHER}]
    assert fields["tool_choice"] == {"type": "function", "function": {"name": "get_weather"}}
    assert fields["parallel_tool_calls"] is False
    assert read(functions=[WEATHER], function_call="auto")[0]["tool_choice"] == "auto"
    own = [{"type": "function", "function": {"name": "of_today"}}]
    fields, _ = read(
        tools=own, functions=[WEATHER], function_call="auto"
    )  # `tools` took their place
    assert fields["tools"] == own
    assert "tool_choice" not in fields


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        ({"enable_thinking": "no"}, "enable_thinking"),
        ({"enable_thinking": 0}, "enable_thinking"),
        ({"functions": {}}, "functions"),
        ({"functions": [5]}, "functions"),
        ({"functions": [{}]}, "functions"),
        ({"function_call": {"name": "get_weather"}}, "function_call"),
    ],
)
def test_what_cannot_be_read_is_refused_under_the_name_that_was_sent(sent, named):
    """A switch that is no boolean was ignored, and a mistake in `functions` was said to be in `tools`."""
    with pytest.raises(ApiError, match=f"{named} ") as refused:
        read(**sent)
    assert refused.value.param == named


def test_a_choice_without_functions_that_asks_for_nothing_is_none():
    """Clients send `function_call: "auto"` with every request."""
    assert read(function_call="auto", functions=[], enable_thinking=None)[1] == []


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_the_reply_would_be_wrong_without_is_refused_by_name(name):
    """`grammar: "root ::= ..."` is 400; empty or null it asks for nothing."""
    with pytest.raises(ApiError, match=name):
        read(**{name: "root ::= x"})
    assert read(**{name: ""}) == ({name: ""}, [])
    assert read(**{name: None}) == ({}, [])


@pytest.mark.parametrize("name", sorted(NOT_FOLLOWED))
def test_what_is_not_followed_is_warned_of_unless_it_asks_for_nothing(name):
    """`mirostat: 2` is said, `mirostat: 0` is not."""
    assert read(**{name: "something"})[1] == [name]
    assert all(read(**{name: nothing})[1] == [] for nothing in NOT_FOLLOWED[name])


def test_a_search_of_the_web_without_options_is_a_search():
    """`web_search_options: {}`, as OpenAI's documentation writes it."""
    assert read(web_search_options={})[1] == ["web_search_options"]


def test_what_changes_nothing_is_silent():
    """Fields of OpenAI's for its own accounts and machines, and LM Studio's and Ollama's."""
    sent = {
        "user": "u",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "safety_identifier": "s",
    }
    sent |= {
        "prompt_cache_key": "k",
        "keep_alive": "5m",
        "ttl": 60,
        "id_slot": 1,
        "modalities": ["text"],
    }
    assert read(**sent) == (sent, [])


# Limits of a reply's length, as logits processors


def likeliest(processor, tokens, favourite=0, size=8):
    logits = mx.where(mx.arange(size) == favourite, 1.0, 0.0)[None]
    return int(mx.argmax(processor(mx.array(tokens), logits)[0]))


def test_no_end_comes_before_so_many_tokens():
    """Of two: neither 3 nor 5 before, either afterwards; ids that there are none of are no harm."""
    processor = NotBefore(2, {3, 5, 10_000})
    assert likeliest(processor, [1, 1], 3) != 3
    assert likeliest(processor, [1, 1, 2], 5) != 5
    assert likeliest(processor, [1, 1, 2, 2], 3) == 3


def test_reasoning_of_so_many_tokens_is_ended_by_its_whole_marker():
    """Of three, behind a marker that the reply wrote: then 6 and 7, then what is likeliest again."""
    processor = ThinkingLimit(3, start=[4], end=[6, 7], is_open=False)
    tokens = [1, 4]  # a marker in the prompt is not the reply's
    written = []
    for _ in range(8):
        written.append(likeliest(processor, tokens + written, 4 if not written else 2))
    assert written == [4, 2, 2, 2, 6, 7, 2, 2]


def test_a_marker_that_is_begun_is_finished_and_tokens_taken_back_are_forgotten():
    """The model wrote 6 as its third token: 7 comes next. One that ended by itself is left alone."""
    processor = ThinkingLimit(3, start=[4], end=[6, 7], is_open=True)
    assert likeliest(processor, [1], 2) == 2
    assert likeliest(processor, [1, 2, 2, 6], 2) == 7
    assert likeliest(processor, [1, 2], 2) == 2
    assert likeliest(processor, [1, 2, 6, 7, 2, 2], 2) == 2
    assert likeliest(ThinkingLimit(0, [4], [6], is_open=True), [1], 2) == 6
    alike = ThinkingLimit(0, [4, 6], [6, 7], is_open=False)  # the end begins as the beginning ends
    assert likeliest(alike, [1], 2) == 2
    assert likeliest(alike, [1, 4, 6], 2) == 6


# Over HTTP


def test_thinking_is_switched_off_at_the_top_level_as_in_the_template_arguments(server):
    """`enable_thinking: false` gives the reply of `chat_template_kwargs`, without a warning."""
    messages = user("Hello, I am Ken.")
    expected = server.answer(CHAT, messages=messages, **INSTANT)["choices"]
    for sent in ({"enable_thinking": False}, {"thinking": {"type": "disabled"}}):
        response = server.post(CHAT, messages=messages, **sent)
        assert response.json()["choices"] == expected
        assert WARNED not in response.headers


def test_reasoning_ends_at_its_budget_and_the_reply_goes_on(server):
    """Three tokens of reasoning and the marker; the same cold, hot, and without the cache."""
    body = {
        "messages": user("What is the weather in Oslo?"),
        "thinking_budget": 3,
        "max_tokens": 40,
    }
    replies = [server.answer(CHAT, **body, **more) for more in ({}, {}, {"cache_prompt": False})]
    choices = [reply["choices"] for reply in replies]
    assert choices[0] == choices[1] == choices[2]
    details = [reply["usage"]["completion_tokens_details"] for reply in replies]
    free = server.answer(CHAT, **{**body, "thinking_budget": 10_000})
    unlimited = free["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert all(3 <= each["reasoning_tokens"] <= 6 < unlimited for each in details)
    assert choices[0][0]["message"]["content"] or choices[0][0]["message"].get("tool_calls")


def test_a_budget_of_thinking_goes_with_a_form(server):
    """Reasoning ends at three tokens and its marker, and what follows is JSON by the schema."""
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    body = {"messages": user("What is the weather in Oslo?"), "guided_json": schema}
    reply = server.answer(CHAT, **body, thinking={"type": "enabled", "budget_tokens": 3})
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 6
    assert json.loads(reply["choices"][0]["message"]["content"])["a"] in (1, 2)


def test_what_is_not_followed_is_in_a_header_and_once_in_the_log(server):
    """`top_a`, which no other test of this server names, in a stream and in a whole reply; and an effort that the
    template does not know.
    """
    server.newly_logged()
    body = {"prompt": "Hello", "max_tokens": 1, "top_a": 0.5}
    assert server.post(COMPLETIONS, **body).headers[WARNED].startswith("top_a: ")
    assert server.stream(COMPLETIONS, **body).headers[WARNED].startswith("top_a: ")
    assert server.newly_logged().count("top_a") == 1
    response = server.post(CHAT, messages=user("Hi"), max_tokens=1, reasoning_effort="high")
    assert response.headers[WARNED].startswith("reasoning_effort: ")


def test_replies_end_at_token_ids_and_not_before_so_many_tokens(server):
    """A token of the reply as `stop_token_ids`; `min_tokens` and `ignore_eos` keep its end away."""
    body = {"messages": user("Hello, I am Ken."), **INSTANT, "logprobs": True}
    whole = server.answer(CHAT, **body)["choices"][0]
    ids = [entry["id"] for entry in whole["logprobs"]["content"]]
    stopped = server.answer(CHAT, **body, stop_token_ids=[ids[2]])
    assert stopped["usage"]["completion_tokens"] == ids.index(ids[2]) + 1
    assert stopped["choices"][0]["finish_reason"] == "stop"
    said = stopped["choices"][0]["message"]["content"]
    assert whole["message"]["content"].startswith(said)
    assert said != whole["message"]["content"]
    more = len(ids) + 5
    later = server.answer(CHAT, **body, min_tokens=more, max_tokens=2 * more)
    assert later["usage"]["completion_tokens"] >= more
    longer = server.answer(CHAT, **body, ignore_eos=True, max_tokens=more)
    assert longer["choices"][0]["finish_reason"] == "length"
    form = {"response_format": {"type": "json_object"}}
    assert server.post(CHAT, **body, **form, min_tokens=3).status_code == 400


def test_the_first_form_of_tools_is_answered_in_that_form(server):
    """`function_call` with a name and arguments, whole and streamed; finish_reason function_call."""
    body = {"messages": user("What is the weather in Oslo?"), **INSTANT}
    body |= {"functions": [WEATHER], "function_call": {"name": "get_weather"}}
    whole = server.answer(CHAT, **body)["choices"][0]
    call = whole["message"]["function_call"]
    assert call["name"] == "get_weather"
    assert isinstance(json.loads(call["arguments"]), dict)
    assert whole["finish_reason"] == "function_call"
    assert "tool_calls" not in whole["message"]
    deltas = [choice["delta"] for choice in server.stream(CHAT, **body).choices]
    parts = [delta["function_call"] for delta in deltas if "function_call" in delta]
    assert "".join(part.get("name", "") for part in parts) == "get_weather"
    assert "".join(part.get("arguments", "") for part in parts) == call["arguments"]


@pytest.mark.parametrize("field", [{"suffix": "."}, {"best_of": 2}, {"guided_regex": "a+"}])
def test_what_would_make_a_reply_wrong_is_refused_in_chats_too(server, field):
    """400 that names the field."""
    response = server.post(CHAT, messages=user("x"), **field)
    assert response.status_code == 400
    assert response.json()["error"]["param"] in field
