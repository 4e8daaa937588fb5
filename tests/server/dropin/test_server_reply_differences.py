"""What differs on purpose in what a reply says."""

from __future__ import annotations

import json
import re

import pytest
from bundled import load
from mlx_hybridcache_server.calls.argument_types import offered
from mlx_hybridcache_server.calls.formats import FORMATS
from mlx_hybridcache_server.calls.incoming import Arguments
from mlx_hybridcache_server.calls.section import Section
from mlx_lm.tool_parsers import qwen3_coder
from servers import (
    CHAT,
    COMPLETIONS,
    INSTANT,
    Server,
    user,
)
from serving.comparing import (
    disagreements,
    offering,
)
from serving.differences import difference, rows_of, survives


@difference(
    "`response_format`",
    theirs="Ignored",
    ours="Followed: the reply is JSON, of the schema if one is given",
)
def response_formats(theirs: Server, ours: Server) -> None:
    city = {"type": "string", "enum": ["Oslo", "Rome"]}
    schema = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    schema["additionalProperties"] = False
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    body = {"messages": user("Hello, I am Ken."), "response_format": wanted, **INSTANT}
    expected, reply = (
        server.answer(CHAT, **body)["choices"][0]["message"]["content"] for server in (theirs, ours)
    )
    assert expected == "Hello Ken, how can I help?"
    assert json.loads(reply)["city"] in city["enum"]


@difference(
    "Stop texts",
    theirs="Any number, matched token by token; one that the model spells with other tokens is cut out and the reply goes on",
    ours="Up to 16, matched as text in the content, however it is tokenized; the reply ends there, and reasoning and calls are not cut",
)
def stop_texts(theirs: Server, ours: Server) -> None:
    body = {"prompt": "The for statement is used to", "max_tokens": 30}
    whole = theirs.answer(COMPLETIONS, **body)["choices"][0]["text"]
    assert "result" in whole
    expected, reply = (
        server.answer(COMPLETIONS, **body, stop="ult")["choices"][0] for server in (theirs, ours)
    )
    assert (expected["finish_reason"], expected["text"]) == ("length", whole.replace("ult", ""))
    assert (reply["finish_reason"], reply["text"]) == ("stop", whole.partition("ult")[0])
    body = {"messages": user("What is 3 + 4?"), "max_tokens": 60, "stop": "plus"}
    message = ours.answer(CHAT, **body)["choices"][0]["message"]
    assert "plus" in message["reasoning"]
    assert message["content"]
    many = {"prompt": "def g(", "max_tokens": 2, "stop": [f"stop {i}" for i in range(17)]}
    asked = [server.post(COMPLETIONS, **many).status_code for server in (theirs, ours)]
    assert asked == [200, 400]


@difference(
    "`content` of a reply without any",
    theirs="`null`",
    ours='`""`, and `null` beside calls',
)
def no_content(theirs: Server, ours: Server) -> None:
    body = {"messages": user("Hello, I am Otto."), "max_tokens": 5}
    messages = [server.answer(CHAT, **body)["choices"][0]["message"] for server in (theirs, ours)]
    assert messages[0]["reasoning"] == messages[1]["reasoning"]
    assert [message["content"] for message in messages] == [None, ""]


@difference(
    "A list of prompts, and prompts as token ids",
    theirs="Ends the server, and 404",
    ours="One choice for each; ids are taken as they are",
)
def lists_of_prompts(theirs: Server, ours: Server) -> None:
    assert not survives(theirs, COMPLETIONS, prompt=["a", "b"], max_tokens=2)
    theirs.revive()
    assert theirs.post(COMPLETIONS, prompt=[464, 500], max_tokens=2).status_code == 404
    two = ours.answer(COMPLETIONS, prompt=[[464, 500], [464, 500, 600]], max_tokens=2)
    assert [choice["index"] for choice in two["choices"]] == [0, 1]
    assert two["usage"]["prompt_tokens"] == 5


@difference(
    "`n` and `echo`",
    theirs="Ignored",
    ours="Up to 8 choices; the prompt's text in front of the completion",
)
def choices_and_echo(theirs: Server, ours: Server) -> None:
    body = {"prompt": "def f(", "max_tokens": 3, "n": 2, "echo": True}
    expected, reply = (server.answer(COMPLETIONS, **body)["choices"] for server in (theirs, ours))
    assert len(expected) == 1
    assert not expected[0]["text"].startswith("def f(")
    assert len(reply) == 2
    assert all(choice["text"].startswith("def f(") for choice in reply)


@difference(
    "`logprobs` in chats",
    theirs="`top_logprobs` up to 11, unordered; with them an entry's own token is not always the generated one, and tokens are spelled as in the vocabulary; none in streams",
    ours="OpenAI's shape: up to 20, most likely first, tokens as text with their bytes, in streams too",
)
def logprobs(theirs: Server, ours: Server) -> None:
    body = {"messages": user("Repeat: nine bottles"), "logprobs": True, **INSTANT}
    contents = [
        [server.answer(CHAT, **body, **top)["choices"][0]["logprobs"]["content"] for top in ({}, {"top_logprobs": 3})]
        for server in (theirs, ours)
    ]  # fmt: skip
    ids = [[[entry["id"] for entry in content] for content in pair] for pair in contents]
    assert ids[0][0] == ids[1][0] == ids[1][1] != ids[0][1]
    assert any("Ġ" in entry["token"] for entry in contents[0][1])
    assert not any("Ġ" in entry["token"] for entry in contents[1][1])
    asked = [server.post(CHAT, **body, top_logprobs=20).status_code for server in (theirs, ours)]
    assert asked == [400, 200]
    streams = [server.stream(CHAT, **body).joined() for server in (theirs, ours)]
    assert "logprobs" not in streams[0]
    assert [entry["id"] for entry in streams[1]["logprobs"]["content"]] == ids[1][0]


@difference(
    "`logprobs` in completions",
    theirs="Must be a boolean, answered in the shape of chats",
    ours="A number or a boolean, answered in OpenAI's shape for completions",
)
def legacy_logprobs(theirs: Server, ours: Server) -> None:
    body = {"prompt": "import", "max_tokens": 3}
    asked = [server.post(COMPLETIONS, **body, logprobs=2).status_code for server in (theirs, ours)]
    assert asked == [400, 200]
    expected, reply = (
        server.answer(COMPLETIONS, **body, logprobs=True)["choices"][0]["logprobs"]
        for server in (theirs, ours)
    )
    assert expected.keys() == {"content"}
    assert reply.keys() >= {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    values = [entry["logprob"] for entry in expected["content"]]
    assert not list(disagreements(values, reply["token_logprobs"]))


_THINKING = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"


@difference(
    "Completions that reason or call tools",
    theirs="Reasoning and calls are left out of the text",
    ours="The text is everything the model wrote",
)
def completions_are_everything(theirs: Server, ours: Server) -> None:
    body = {"prompt": _THINKING, "max_tokens": 16}
    expected, reply = (
        server.answer(COMPLETIONS, **body)["choices"][0]["text"] for server in (theirs, ours)
    )
    assert "should" not in expected
    assert reply.startswith("<think>\nI should")


@difference(
    "The space before a completion's first word",
    theirs="Dropped",
    ours="Kept, in `/v1/completions` and where a message is continued",
)
def first_spaces(theirs: Server, ours: Server) -> None:
    body = {"prompt": "If a name is bound in a block,", "max_tokens": 4, "stop": "\n"}
    body["logit_bias"] = {"265": 100}  # " a"
    expected, reply = (
        server.answer(COMPLETIONS, **body)["choices"][0]["text"] for server in (theirs, ours)
    )
    assert expected == "a a a a"
    assert reply == " a a a a"


@difference(
    "White space between reasoning and a tool call",
    theirs="Is content",
    ours="Left out: `content` is `null`",
)
def space_before_calls(theirs: Server, ours: Server) -> None:
    body = {"messages": user("Order 9 pieces of the saw."), **offering("order_item")}
    messages = [server.answer(CHAT, **body)["choices"][0]["message"] for server in (theirs, ours)]
    assert all(message["tool_calls"] for message in messages)
    assert [message["content"] for message in messages] == ["\n\n", None]


@difference(
    "Reasoning",
    theirs="In `reasoning`",
    ours="In `reasoning` and `reasoning_content`",
)
def reasoning_fields(theirs: Server, ours: Server) -> None:
    body = {"messages": user("What is 2 + 2?"), "max_tokens": 40}
    expected, reply = (
        server.answer(CHAT, **body)["choices"][0]["message"] for server in (theirs, ours)
    )
    assert "reasoning_content" not in expected
    assert reply["reasoning_content"] == reply["reasoning"] == expected["reasoning"]


@difference(
    "Ids of tool calls",
    theirs="A bare UUID",
    ours="`call_` and letters",
)
def call_ids(theirs: Server, ours: Server) -> None:
    body = {"messages": user("Where is Kofi?"), **offering("find_person"), **INSTANT}
    ids = [
        server.answer(CHAT, **body)["choices"][0]["message"]["tool_calls"][0]["id"]
        for server in (theirs, ours)
    ]
    assert not ids[0].startswith("call_")
    assert re.fullmatch(r"call_[0-9A-Za-z]{8,}", ids[1])


@difference(
    "A tool call that cannot be parsed",
    theirs="Vanishes",
    ours="Comes back as content; one that breaks off within its arguments keeps them as they were written",
)
def failed_calls(theirs: Server, ours: Server) -> None:
    body = {"messages": user("Where is Tariq?"), **offering("find_person"), **INSTANT}
    expected, reply = (
        server.answer(CHAT, **body, max_tokens=10)["choices"][0] for server in (theirs, ours)
    )
    assert expected["finish_reason"] == reply["finish_reason"] == "length"
    assert not expected["message"]["content"]
    assert not expected["message"].get("tool_calls")
    assert reply["message"]["content"].startswith("<tool_call>")
    assert not reply["message"].get("tool_calls")
    (call,) = ours.answer(CHAT, **body, max_tokens=17)["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"person": "T'


@difference(
    "Calls of what was not offered",
    theirs="Are calls: in requests without `tools` too, and in blocks of code",
    ours="Are text",
)
def calls_not_offered(theirs: Server, ours: Server) -> None:
    for body in (
        {"messages": user("What is the weather in Oslo?"), "max_tokens": 80},
        {"messages": user("Where is Zoe?"), **offering("get_price"), **INSTANT},
    ):
        expected, reply = (server.answer(CHAT, **body)["choices"][0] for server in (theirs, ours))
        assert expected["finish_reason"] == "tool_calls"
        assert reply["finish_reason"] == "stop"
        assert not reply["message"].get("tool_calls")
        assert reply["message"]["content"].strip().startswith("<tool_call>")


@difference(
    "Tool calls in streams",
    theirs="One chunk when a call is complete",
    ours="Name and id at once, then the arguments as they are written",
)
def streamed_calls(theirs: Server, ours: Server) -> None:
    body = {"messages": user("Where is Ivan?"), **offering("find_person"), **INSTANT}
    told = [
        [
            call
            for choice in server.stream(CHAT, **body).choices
            for call in choice["delta"].get("tool_calls") or ()
        ]
        for server in (theirs, ours)
    ]
    assert len(told[0]) == 1
    assert len(told[1]) > 3
    assert told[1][0].keys() == {"index", "id", "type", "function"}
    assert all(call.keys() == {"index", "function"} for call in told[1][1:])
    assert len({"".join(c["function"]["arguments"] for c in each) for each in told}) == 1


@difference(
    "Types of arguments",
    theirs="Guessed by parsers of formats like XML: `null` in a text is null, whole numbers beyond 2^53 lose digits, a value without its end vanishes",
    ours="By the whole schema of the parameter, exactly as written",
)
def types_of_arguments(theirs: Server, ours: Server) -> None:
    """Of parsers, as the bundled model writes JSON."""
    properties = {"a": {"type": "string"}, "b": {"type": "integer"}, "c": {"type": "string"}}
    tools = [{"function": {"name": "f", "parameters": {"properties": properties}}}]
    text = (
        "<function=f>\n<parameter=a>\nnull\n</parameter>\n<parameter=b>\n9007199254740993\n"
        "</parameter>\n<parameter=c>\nx\n</function>"
    )
    lossy = {"a": None, "b": 2**53}
    assert qwen3_coder.parse_tool_call(text, tools)["arguments"] == lossy
    section = Section(FORMATS["qwen3_coder"], offered(tools))
    events = section.feed(text) + section.end(is_whole=True)
    found = "".join(event.text for event in events if isinstance(event, Arguments))
    assert json.loads(found) == {"a": "null", "b": 2**53 + 1, "c": "x"}


@difference(
    "`tool_choice` and `parallel_tool_calls`",
    theirs="Ignored",
    ours="`none` lets no call begin; `required` and a named function bring a call, `allowed_tools` only those; the prompt, and so its cache, stays what it was; `parallel_tool_calls: false` ends the reply behind the first",
)
def tool_choices(theirs: Server, ours: Server) -> None:
    body = {"messages": user("Where is Maya?"), **offering("find_person", tool_choice="none")}
    expected, reply = (
        server.answer(CHAT, **body, **INSTANT)["choices"][0] for server in (theirs, ours)
    )
    assert expected["finish_reason"] == "tool_calls"
    assert reply["finish_reason"] != "tool_calls"
    assert not reply["message"].get("tool_calls")
    body |= {"messages": user("Hello, I am Grace."), "tool_choice": "required"}
    expected, reply = (
        server.answer(CHAT, **body, **INSTANT)["choices"][0] for server in (theirs, ours)
    )
    assert [choice["finish_reason"] for choice in (expected, reply)] == ["stop", "tool_calls"]
    eos = dict.fromkeys(map(str, load()[1].eos_token_ids), -100)  # may not end by itself
    body = {"messages": user("Where is Diego?"), **offering("find_person"), "logit_bias": eos}
    body |= {"parallel_tool_calls": False, "max_tokens": 60}
    expected, reply = (
        server.answer(CHAT, **body, **INSTANT)["choices"][0] for server in (theirs, ours)
    )
    assert [choice["finish_reason"] for choice in (expected, reply)] == ["length", "tool_calls"]


@difference(
    "`continue_final_message`",
    theirs="Ignored",
    ours="A trailing assistant message is continued",
)
def continued_messages(theirs: Server, ours: Server) -> None:
    begun = {"role": "assistant", "content": "lamp piano"}
    body = {"messages": [*user("Repeat: lamp piano kettle"), begun], **INSTANT}
    body |= {"continue_final_message": True, "add_generation_prompt": False}
    expected, reply = (
        server.answer(CHAT, **body)["choices"][0]["message"]["content"] for server in (theirs, ours)
    )
    assert expected.startswith("lamp")
    assert reply == " kettle"


@difference(
    "Usage and timings",
    theirs="`cached_tokens`",
    ours="Also `reasoning_tokens`, and `timings` under llama.cpp's names",
)
def usage_and_timings(theirs: Server, ours: Server) -> None:
    body = {"messages": user("What is 4 + 5?"), "max_tokens": 8}
    expected, reply = (server.answer(CHAT, **body) for server in (theirs, ours))
    assert expected.keys().isdisjoint({"timings"})
    assert "completion_tokens_details" not in expected["usage"]
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 8
    assert reply["timings"].keys() >= {"cache_n", "prompt_n", "prompt_ms", "predicted_n"}


@difference(
    "Chunks of a stream",
    theirs="The role in each; the usage chunk calls itself `chat.completion`; `stream_options: {}` breaks the stream",
    ours="The role in the first; all are `chat.completion.chunk`; usage is sent when `include_usage` is true",
)
def stream_chunks(theirs: Server, ours: Server) -> None:
    body = {"messages": user("Repeat: pencil"), **INSTANT}
    usage = {"stream_options": {"include_usage": True}}
    expected, stream = (server.stream(CHAT, **body, **usage) for server in (theirs, ours))
    assert all("role" in choice["delta"] for choice in expected.choices)
    assert ["role" in choice["delta"] for choice in stream.choices].index(False) == 1
    assert expected.events[-1]["object"] == "chat.completion"
    assert {event["object"] for event in stream.events} == {"chat.completion.chunk"}
    assert ours.stream(CHAT, **body, stream_options={}).done
    assert not theirs.stream(CHAT, **body, stream_options={}).done


@pytest.mark.parametrize("row", rows_of(__name__), ids=lambda row: row.probe.__name__)
def test_every_listed_difference_is_there(row, theirs, ours):
    """On mlx_lm.server as its column says, on ours as ours says."""
    ours.revive()
    row.probe(theirs, ours)
