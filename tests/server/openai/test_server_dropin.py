"""The same requests to ours and to mlx_lm.server: equal replies, and a list of what differs on purpose."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import mlx.core as mx
import mlx_lm
import mlx_lm.server
import pytest
import strict
from bundled import load
from mlx.utils import tree_flatten
from mlx_hybridcache_server.calls.argument_types import offered
from mlx_hybridcache_server.calls.formats import FORMATS
from mlx_hybridcache_server.calls.incoming import Arguments
from mlx_hybridcache_server.calls.section import Section
from mlx_lm.tool_parsers import qwen3_coder
from mlx_lm.tuner.utils import linear_to_lora_layers
from places import ROOT
from servers import (
    CHAT,
    COMPLETIONS,
    INSTANT,
    OURS,
    THEIRS,
    Server,
    Stream,
    command,
    raw_exchange,
    raw_post,
    raw_status,
    read_stream,
    running,
    user,
)

from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.demo.functions import FUNCTIONS

PAGE = ROOT / "docs" / "mlx-lm-differences.md"
FUNCTION = {function.name: function.declaration() for function in FUNCTIONS}


@pytest.fixture(scope="module")
def ours():
    with running(OURS) as server:
        yield server


@pytest.fixture(scope="module")
def their_process():
    with running(THEIRS) as server:
        yield server


@pytest.fixture
def theirs(their_process):
    """Started again when the test before ended it."""
    their_process.revive()
    return their_process


# Replies that agree

VOLATILE = {"id", "created", "system_fingerprint", "token"}
"""Random, the clock's, the host's; and `token`, whose spelling is a listed difference."""
ROUNDING = 0 if mx.default_device() == mx.cpu else 1e-2
"""Of log-probabilities: none on the CPU; on Metal the two cut prompts into other shapes."""
CHOSEN = {"id", "token", "logprob"}
"""Beside `top_logprobs` mlx_lm.server tells of any of these, which is a listed difference too."""


def disagreements(theirs: Any, ours: Any, where: str = "") -> Iterator[str]:
    """Fields of mlx_lm.server's reply that ours lacks or fills otherwise. Ours may say more."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        skipped = CHOSEN if "top_logprobs" in theirs else VOLATILE
        for name in theirs.keys() - skipped:
            if name in ours:
                yield from _field_disagreements(name, theirs[name], ours[name], f"{where}.{name}")
            else:
                yield f"{where}.{name} is missing"
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for i, (one, other) in enumerate(zip(theirs, ours, strict=True)):
            yield from disagreements(one, other, f"{where}[{i}]")
    elif isinstance(theirs, float) and isinstance(ours, float):
        if abs(theirs - ours) > ROUNDING:
            yield f"{where}: {theirs!r} there, {ours!r} here"
    elif theirs != ours:
        yield f"{where}: {theirs!r} there, {ours!r} here"


def _field_disagreements(name: str, theirs: Any, ours: Any, where: str) -> Iterator[str]:
    if name == "cached_tokens":
        theirs = max(theirs, ours)  # ours may have found more
    elif name in ("text", "content") and not isinstance(theirs, list):
        theirs, ours = (_trimmed(text) for text in (theirs, ours))
    elif name == "arguments":
        theirs, ours = json.loads(theirs), json.loads(ours)
    elif name == "top_logprobs":  # theirs come in no order
        theirs, ours = ({e["id"]: e["logprob"] for e in side} for side in (theirs, ours))
    yield from disagreements(theirs, ours, where)


def _trimmed(text: str | None) -> str:
    """Without what the two servers treat differently on purpose: a first space, white space alone."""
    return (text or "").removeprefix(" ") if (text or "").strip() else ""


def essence(choice: dict[str, Any]) -> dict[str, Any]:
    """What a choice says, streamed or not."""
    message = choice.get("message", {})
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return {
        "finish_reason": choice["finish_reason"],
        "text": _trimmed(choice.get("text")),
        "content": _trimmed(message.get("content")),
        "reasoning": message.get("reasoning") or "",
        "calls": [(call["name"], json.loads(call["arguments"])) for call in calls],
    }


def _tools(*names: str, **more: Any) -> dict[str, Any]:
    return {"tools": [FUNCTION[name] for name in names], **more}


_CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "find_person", "arguments": '{"person": "Nora"}'},
        }
    ],
}
_RESULT = {"role": "tool", "tool_call_id": "call_1", "content": '{"room": "attic"}'}
_FIRST_TURN = [
    *user("Note that the lamp of Ada is red."),
    {"role": "assistant", "content": "Noted: red."},
]
_THOUGHT = {"role": "assistant", "content": "5 + 4 = 9.", "reasoning": "5 plus 4 is 9."}
_PARTS = [{"type": "text", "text": "Repeat: piano "}, {"type": "text", "text": "kettle blue"}]
_RAW = "The global statement is a declaration which holds for"

# Every case asks another question: repeating some of them would end mlx_lm.server.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "a chat": (CHAT, {"messages": user("Hello, I am Zoe."), **INSTANT}),
    "the shorter path": ("/chat/completions", {"messages": user("Hi, I am Yuki."), **INSTANT}),
    "reasoning": (CHAT, {"messages": user("Good morning, I am Leo."), "max_tokens": 60}),
    "reasoning cut short": (CHAT, {"messages": user("What is 3 + 4?"), "max_tokens": 6}),
    "a system message": (
        CHAT,
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                *user("Which is the first of saw, rope, tent?"),
            ],
            **INSTANT,
        },
    ),
    "a second turn": (
        CHAT,
        {"messages": [*_FIRST_TURN, *user("Which colour is the lamp of Ada?")], **INSTANT},
    ),
    "reasoning in the history": (
        CHAT,
        {"messages": [*user("Add 5 and 4."), _THOUGHT, *user("Hello, I am Emil.")], **INSTANT},
    ),
    "content in parts": (CHAT, {"messages": [{"role": "user", "content": _PARTS}], **INSTANT}),
    "an assistant message last": (
        CHAT,
        {"messages": [*user("Repeat: oven"), {"role": "assistant", "content": "oven"}], **INSTANT},
    ),
    "a tool call": (
        CHAT,
        {"messages": user("Where is Hugo?"), **_tools("find_person", "get_price"), **INSTANT},
    ),
    "a tool call after reasoning": (
        CHAT,
        {"messages": user("Order 7 pieces of the piano."), **_tools("order_item")},
    ),
    "a tool's result": (
        CHAT,
        {
            "messages": [*user("Where is Nora?"), _CALLED, _RESULT],
            **_tools("find_person"),
            **INSTANT,
        },
    ),
    "tools that are not called": (
        CHAT,
        {"messages": user("Hello, I am Hana."), **_tools("get_time"), **INSTANT},
    ),
    "tool_choice auto": (
        CHAT,
        {
            "messages": user("How much is a violin?"),
            **_tools("get_price", tool_choice="auto"),
            **INSTANT,
        },
    ),
    "max_completion_tokens": (
        CHAT,
        {"messages": user("What does len do in Python?"), "max_completion_tokens": 5, **INSTANT},
    ),
    "a stop word": (
        CHAT,
        {"messages": user("What does abs do in Python?"), "stop": [" value"], **INSTANT},
    ),
    "unknown fields": (
        CHAT,
        {"messages": user("Hi, I am Raj."), "user": "u", "metadata": {"a": "b"}, **INSTANT},
    ),
    "logprobs": (
        CHAT,
        {"messages": user("Repeat: red lamp"), "logprobs": True, **INSTANT},
    ),
    "top_logprobs": (
        CHAT,
        {"messages": user("Repeat: pink boat"), "logprobs": True, "top_logprobs": 5, **INSTANT},
    ),
    "a completion": (COMPLETIONS, {"prompt": _RAW, "max_tokens": 24}),
    "a completion of one token": (COMPLETIONS, {"prompt": "import", "max_tokens": 1}),
    "penalties": (
        COMPLETIONS,
        {
            "prompt": "If a name is bound in a block,",
            "max_tokens": 24,
            "repetition_penalty": 1.3,
            "repetition_context_size": 10,
            "presence_penalty": 0.4,
            "presence_context_size": 8,
            "frequency_penalty": 0.3,
            "frequency_context_size": 12,
        },
    ),
    "a bias": (
        COMPLETIONS,
        {"prompt": "for x in range", "max_tokens": 6, "logit_bias": {"700": 100, "12": -3.5}},
    ),
    "a seeded sample": (
        COMPLETIONS,
        {"prompt": "class Lamp:", "max_tokens": 20, "temperature": 1.0, "seed": 3},
    ),
    "a seeded sample from the likeliest": (
        COMPLETIONS,
        {
            "prompt": "def area(",
            "max_tokens": 20,
            "temperature": 0.8,
            "top_p": 0.9,
            "top_k": 30,
            "min_p": 0.01,
            "seed": 2**31,
        },
    ),
    "a seeded sample without the top choices": (
        COMPLETIONS,
        {
            "prompt": "while True:",
            "max_tokens": 20,
            "temperature": 1.0,
            "xtc_probability": 0.5,
            "xtc_threshold": 0.05,
            "seed": 11,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_replies_agree_field_by_field(case, theirs, ours):
    """Text, reasoning, calls, finish reasons, token counts and every float of a logprob."""
    path, body = CASES[case]
    body = {"model": "default_model", **body}
    expected, reply = (server.answer(path, **body) for server in (theirs, ours))
    assert not list(disagreements(expected, reply)), f"{expected}\n{reply}"


@pytest.mark.parametrize("case", CASES)
def test_streams_agree_with_theirs_and_with_the_reply_that_is_not_streamed(case, theirs, ours):
    """The deltas add up to the same choice; usage comes in a last chunk of its own; [DONE] ends it."""
    path, body = CASES[case]
    body = {"model": "default_model", "stream_options": {"include_usage": True}, **body}
    expected, stream = (server.stream(path, **body) for server in (theirs, ours))
    assert stream.done
    assert expected.done
    assert essence(stream.joined()) == essence(expected.joined())
    assert not list(disagreements(expected.usage, stream.usage))
    assert stream.events[-1]["choices"] == []
    assert stream.headers["content-type"].startswith(expected.headers["content-type"])
    whole = ours.answer(path, **{**body, "stream": False, "stream_options": None})
    assert essence(stream.joined()) == essence(whole["choices"][0])


@pytest.fixture(scope="module")
def strict_servers():
    model = ("--model", str(strict.directory()))
    with running(THEIRS, *model) as theirs, running(OURS, *model) as ours:
        yield theirs, ours


UNDER_A_STRICT_TEMPLATE = [
    "a chat",
    "reasoning",
    "reasoning cut short",
    "a system message",
    "a second turn",
    "reasoning in the history",
    "content in parts",
    "a tool's result",
    "tools that are not called",
    "logprobs",
]


@pytest.mark.parametrize("case", UNDER_A_STRICT_TEMPLATE)
def test_replies_agree_under_a_strict_template(case, strict_servers):
    """Prompts that begin inside of reasoning, arguments as mappings, calls in XML: the same fields."""
    path, body = CASES[case]
    body = {"model": "default_model", **body}
    expected, reply = (server.answer(path, **body) for server in strict_servers)
    assert not list(disagreements(expected, reply)), f"{expected}\n{reply}"


def test_streams_without_include_usage_carry_none(theirs, ours):
    """No chunk with `usage`, no chunk without choices."""
    for server in (theirs, ours):
        stream = server.stream(CHAT, messages=user("Repeat: one bicycle"), **INSTANT)
        assert stream.usage is None
        assert len(stream.events) > 1
        assert all(event["choices"] for event in stream.events)


def test_keepalives_tell_how_much_of_the_prompt_was_read(theirs, ours):
    """`: keepalive read/total`, ascending; at the last one at most the last token is unread."""
    body = {"prompt": " ".join(f"word {i}" for i in range(200)), "max_tokens": 2}
    for server in (theirs, ours):
        stream = server.stream(COMPLETIONS, **body)
        told = [re.fullmatch(r"keepalive (\d+)/(\d+)", comment) for comment in stream.comments]
        assert told
        assert all(told)
        read = [(int(t[1]), int(t[2])) for t in told if t]
        assert read == sorted(read)
        assert read[-1][0] >= read[-1][1] - 1


def test_what_both_refuse_gets_the_same_status(theirs, ours):
    """400 for a number out of range or a wrong type, 404 for a path or a model that is not there."""
    hello = user("Hello, I am Ivan.")
    refused: list[dict[str, Any]] = [
        {"messages": hello, "max_tokens": 0},
        {"messages": hello, "max_tokens": "5"},
        {"messages": hello, "temperature": -1},
        {"messages": hello, "top_p": 1.5},
        {"messages": hello, "top_k": -1},
        {"messages": hello, "min_p": 2},
        {"messages": hello, "repetition_penalty": -1},
        {"messages": hello, "repetition_context_size": -1},
        {"messages": hello, "presence_penalty": "x"},
        {"messages": hello, "xtc_probability": 1.5},
        {"messages": hello, "top_logprobs": -2},
        {"messages": hello, "logprobs": "yes"},
        {"messages": hello, "logit_bias": {"x": 1}},
        {"messages": hello, "logit_bias": [1]},
        {"messages": hello, "seed": "x"},
        {"messages": hello, "model": 5},
        {"messages": hello, "stream": "yes"},
        {"messages": hello, "model": "nobody/has-this"},
        {},
    ]
    for body in refused:
        statuses = [server.post(CHAT, **body).status_code for server in (theirs, ours)]
        assert statuses[0] == statuses[1] >= 400, body
    assert [s.client.get("/v1/nothing").status_code for s in (theirs, ours)] == [404, 404]
    assert [s.post("/v1/nothing").status_code for s in (theirs, ours)] == [404, 404]
    for body in (b"{", b"[1]", b'"text"', b""):
        sent = raw_post(CHAT, body, Content_Length=str(len(body)))
        assert [raw_status(raw_exchange(s, sent)) for s in (theirs, ours)] == [400, 400], body


def test_health_and_preflight_agree(theirs, ours):
    """200 with `{"status": "ok"}`, and 204."""
    assert [s.client.get("/health").json() for s in (theirs, ours)] == [{"status": "ok"}] * 2
    assert [s.client.options(CHAT).status_code for s in (theirs, ours)] == [204, 204]


# Flags


def their_parser() -> argparse.ArgumentParser:
    """mlx_lm.server's own, caught in its `main`."""
    caught: list[argparse.ArgumentParser] = []

    class Caught(Exception):  # noqa: N818  # it ends `main`, nothing went wrong
        pass

    def catch(self: argparse.ArgumentParser, *args: Any) -> None:
        caught.append(self)
        raise Caught

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        with pytest.raises(Caught):
            mlx_lm.server.main()
    return caught[0]


def our_parser() -> argparse.ArgumentParser:
    """Ours."""
    from mlx_hybridcache_server.settings import build_parser

    return build_parser("mlx_hybridcache.server")


def _flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {
        option: action
        for action in parser._actions
        for option in action.option_strings
        if option not in ("-h", "--help")
    }


def test_every_flag_of_mlx_lm_server_is_there_under_its_name():
    """25 in 0.32.2, from --model to --pipeline."""
    theirs = _flags(their_parser())
    assert len(theirs) >= 25
    assert theirs.keys() - _flags(our_parser()).keys() == set()


def test_defaults_agree_but_for_the_listed_ones():
    """A default that differs has a row in the table of differences."""
    parsers = their_parser(), our_parser()
    parsed = [vars(parser.parse_args([])) for parser in parsers]
    flags = [_flags(parser) for parser in parsers]
    differing = {
        option
        for option in flags[0]
        if parsed[0][flags[0][option].dest] != parsed[1][flags[1][option].dest]
    }
    assert differing == {row.flag for row in DIFFERENCES if row.flag}


SAMPLES = {int: ["7"], float: ["0.25", "1"], str: ["a-word"], json.loads: ['{"a": [1]}']}


def test_values_are_read_alike():
    """`--max-tokens 7` is 7 here and there, `--prompt-cache-bytes 3GB` the same bytes."""
    parsers = their_parser(), our_parser()
    for option, action in _flags(parsers[0]).items():
        if action.nargs == 0:
            given = [[option]]
        elif option == "--allowed-origins":
            given = [[option, "http://a,http://b"]]
        elif option == "--prompt-cache-bytes":
            given = [[option, size] for size in ("3GB", "10MB", "2G", "5M", "1000", "1.5GB")]
        else:
            values = action.choices or SAMPLES[action.type]
            given = [[option, str(value)] for value in values]
        for arguments in given:
            values = [
                vars(parser.parse_args(arguments))[_flags(parser)[option].dest]
                for parser in parsers
            ]
            assert values[0] == values[1], arguments


CONFIGURED = [
    *("--temp", "0.9", "--top-p", "0.95", "--top-k", "40", "--min-p", "0.005"),
    *("--max-tokens", "9", "--prefill-step-size", "64", "--log-level", "WARNING"),
    *("--chat-template-args", '{"enable_thinking": false}'),
    *("--decode-concurrency", "2", "--prompt-concurrency", "1", "--trust-remote-code"),
    *("--prompt-cache-size", "2", "--pipeline"),
]


@pytest.fixture(scope="module")
def configured():
    with running(THEIRS, *CONFIGURED) as theirs, running(OURS, *CONFIGURED) as ours:
        yield theirs, ours


def test_flags_set_the_defaults_of_requests_alike(configured):
    """Sampling, length and the template's arguments come from the flags, and the seed from the request."""
    for seed in (1, 2):
        body = {"model": "default_model", "messages": user("Hi, I am Otto."), "seed": seed}
        expected, reply = (server.answer(CHAT, **body) for server in configured)
        assert not list(disagreements(expected, reply)), f"{expected}\n{reply}"
        assert reply["usage"]["completion_tokens"] <= 9


def test_a_flag_without_effect_says_so(configured):
    """--pipeline on one machine changes nothing, here with a line in the log."""
    _, ours = configured
    assert re.search("WARNING.*--pipeline", ours.log)


def test_a_request_wins_over_the_flags(configured):
    """Its temperature, its length, its template arguments."""
    body = {
        "model": "default_model",
        "messages": user("Hello, I am Felix."),
        "temperature": 0,
        "max_tokens": 12,
        "chat_template_kwargs": {"enable_thinking": True},
    }
    expected, reply = (server.answer(CHAT, **body) for server in configured)
    assert not list(disagreements(expected, reply)), f"{expected}\n{reply}"
    assert reply["choices"][0]["message"]["reasoning"]
    assert reply["usage"]["completion_tokens"] == 12


def test_a_number_of_conversations_is_a_limit_when_it_is_given(configured):
    """--prompt-cache-size 2: of three conversations the first is forgotten."""
    _, ours = configured
    cached = []
    for _ in range(2):
        for name in ("Ada", "Ken", "Hedy"):
            body = {"prompt": f"{name} wrote this: {name * 30}", "max_tokens": 1}
            cached.append(ours.answer(COMPLETIONS, **body)["usage"]["prompt_tokens_details"])
    assert [told["cached_tokens"] for told in cached] == [0] * 6
    assert ours.answer(COMPLETIONS, **body)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter for the bundled model, with random weights that change its replies."""
    model = mlx_lm.load(str(BUNDLED_MODEL))[0]
    settings = {"rank": 2, "scale": 4.0, "dropout": 0.0}
    linear_to_lora_layers(model, 2, settings)
    mx.random.seed(1)
    weights = {
        name: mx.random.normal(array.shape) * 0.1
        for name, array in tree_flatten(model.parameters())
        if "lora" in name
    }
    assert weights
    folder = tmp_path_factory.mktemp("adapter")
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}!<|im_end|>\n{% endfor %}"
)


def test_adapters_templates_and_quantized_keys_and_values_agree(adapter, theirs):
    """--adapter-path, --chat-template, --kv-bits: the same replies, other than without them."""
    flags = ["--model", str(BUNDLED_MODEL), "--adapter-path", str(adapter)]
    flags += ["--chat-template", TEMPLATE, "--kv-bits", "8", "--quantized-kv-start", "8"]
    body = {"model": "default_model", "messages": user("Hello, I am Linus."), "logprobs": True}
    body["max_tokens"] = 12
    with running(THEIRS, *flags) as one, running(OURS, *flags) as other:
        for _ in range(2):
            expected, reply = (server.answer(CHAT, **body) for server in (one, other))
            assert not list(disagreements(expected, reply)), f"{expected}\n{reply}"
        assert re.search("WARNING.*--kv-bits", other.log)
    plain = theirs.answer(CHAT, **body)
    assert plain["usage"]["prompt_tokens"] != reply["usage"]["prompt_tokens"]


# What differs on purpose


@dataclass(frozen=True)
class Difference:
    """A row of docs/mlx-lm-differences.md, and how to see on both servers that it is true."""

    about: str
    theirs: str
    ours: str
    probe: Callable[[Server, Server], None]
    flag: str = ""


DIFFERENCES: list[Difference] = []


def difference(about: str, *, theirs: str, ours: str, flag: str = "") -> Callable[..., Any]:
    """Register a probe with its row; `flag` names a default that differs."""

    def register(probe: Callable[[Server, Server], None]) -> Callable[[Server, Server], None]:
        DIFFERENCES.append(Difference(about, theirs, ours, probe, flag))
        return probe

    return register


def survives(server: Server, path: str, **body: Any) -> bool:
    """Whether the server answers the request at all, and is healthy afterwards."""
    try:
        answered = server.post(path, **body).status_code < 500
    except httpx2.TransportError:
        return False
    return answered and server.healthy


FATAL: dict[str, tuple[str, dict[str, Any]]] = {
    "stop: 5": (CHAT, {"messages": user("Hello, I am Ada."), "stop": 5}),
    'prompt: ""': (COMPLETIONS, {"prompt": "", "max_tokens": 2}),
    "logit_bias": (COMPLETIONS, {"prompt": "a", "max_tokens": 2, "logit_bias": {"99999999": 1}}),
    "seed: -1": (COMPLETIONS, {"prompt": "a", "max_tokens": 2, "seed": -1}),
}


@difference(
    "Requests that end the server",
    theirs='Ended by `stop: 5`, `prompt: ""` or `logit_bias` beyond the vocabulary; `seed: -1` drops the connection',
    ours="Answers them, or refuses them with 400",
)
def fatal_requests(theirs: Server, ours: Server) -> None:
    theirs.kill()  # whether some of them end it depends on what was served before
    for path, body in FATAL.values():
        theirs.revive()
        assert not survives(theirs, path, **body), body
        assert survives(ours, path, **body), body


@difference(
    "A prompt that is the beginning of an earlier one",
    theirs="May end the server",
    ours="Answered from the cache",
)
def beginning_of_an_earlier_prompt(theirs: Server, ours: Server) -> None:
    said = " ".join(f"The oven of number {i} is white." for i in range(40))
    asked = {"messages": user(said), "max_tokens": 4}
    for server in (theirs, ours):
        server.answer(CHAT, **asked, **INSTANT)
    assert not survives(theirs, CHAT, **asked)
    reply = ours.answer(CHAT, **asked)
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@difference(
    "A changed ending, or a prompt made shorter",
    theirs="Everything behind the system message is read again",
    ours="Only the tokens behind the nearest checkpoint are read again",
)
def changed_ending(theirs: Server, ours: Server) -> None:
    text = " ".join(f"line {i} says {i * i}," for i in range(120))
    cached = []
    for server in (theirs, ours):
        server.answer(COMPLETIONS, prompt=f"{text} and so it begins.", max_tokens=2)
        reply = server.answer(COMPLETIONS, prompt=f"{text} but it ends.", max_tokens=2)
        cached.append(reply["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == 0
    assert cached[1] >= 0.8 * reply["usage"]["prompt_tokens"]


@difference(
    "Stored conversations (`--prompt-cache-size`)",
    theirs="The last 10",
    ours="As many as fit into the memory budget, unless the flag is given; 0 turns the cache off",
    flag="--prompt-cache-size",
)
def twelve_conversations(theirs: Server, ours: Server) -> None:
    cached = []
    for server in (theirs, ours):
        for _ in range(2):
            replies = [
                server.answer(COMPLETIONS, prompt=f"{name} said {name}, {name}!", max_tokens=1)
                for name in map(chr, range(65, 77))
            ]
        cached.append([r["usage"]["prompt_tokens_details"]["cached_tokens"] for r in replies])
    assert sum(cached[0]) == 0
    assert all(cached[1])


@difference(
    "`max_tokens` not sent (`--max-tokens`)",
    theirs="512 tokens",
    ours="As many as fit into the model's context and the memory, unless the flag is given",
    flag="--max-tokens",
)
def replies_of_no_named_length(theirs: Server, ours: Server) -> None:
    body = {"prompt": "The", "logit_bias": {"700": 100}}
    assert theirs.answer(COMPLETIONS, **body)["usage"]["completion_tokens"] == 512
    stream = Stream(0, {})
    with ours.client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as response:
        for _ in read_stream(response.iter_lines(), stream):
            if len(stream.events) > 600:  # it would go on for the whole context
                break
    assert all(choice["finish_reason"] is None for choice in stream.choices)


@difference(
    "The address itself, in a browser",
    theirs="404",
    ours="The [page](page.md) of the cache",
)
def the_page(theirs: Server, ours: Server) -> None:
    found = [server.client.get("/") for server in (theirs, ours)]
    assert [each.status_code for each in found] == [404, 200]
    assert found[1].headers["content-type"].startswith("text/html")


@difference(
    "The model when `--model` is not given",
    theirs="None until a request names one",
    ours="The bundled one",
)
def default_model(theirs: Server, ours: Server) -> None:
    assert their_parser().parse_args([]).model is None
    assert "--model" not in command(OURS, *ours.flags)
    (served,) = ours.client.get("/v1/models").json()["data"]
    assert served["id"]


@difference(
    "Pages that may ask (`--allowed-origins`)",
    theirs="Those of any site",
    ours="Those of this computer and its apps (`vscode-webview://`, `app://`, `tauri://`), and what the flag adds; a request from elsewhere gets 403",
    flag="--allowed-origins",
)
def foreign_origins(theirs: Server, ours: Server) -> None:
    page = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    allowed = "access-control-allow-origin"
    assert theirs.client.options(CHAT, headers=page).headers[allowed] == "*"
    assert allowed not in ours.client.options(CHAT, headers=page).headers
    body = {"messages": user("Hello, I am Nora."), "max_tokens": 2, **INSTANT}
    asked = [s.client.post(CHAT, json=body, headers=page).status_code for s in (theirs, ours)]
    assert asked == [200, 403]
    for own in ("http://localhost:3000", "vscode-webview://abc", "app://obsidian.md"):
        page["Origin"] = own
        assert ours.client.options(CHAT, headers=page).headers[allowed] in ("*", own)


@difference(
    "The `Host` header",
    theirs="Any",
    ours="Must name this computer, also as its containers do (`host.docker.internal`), the address given by `--host`, or what `--allowed-hosts` adds, else 403",
)
def foreign_hosts(theirs: Server, ours: Server) -> None:
    strange = {"Host": "elsewhere.example"}
    asked = [s.client.get("/v1/models", headers=strange).status_code for s in (theirs, ours)]
    assert asked == [200, 403]
    inside = {"Host": "host.docker.internal:8080"}
    assert ours.client.get("/v1/models", headers=inside).status_code == 200


@difference(
    "Images and their URLs",
    theirs="URLs are fetched, even for a model that reads only text",
    ours="Refused with 400 in the question to be answered, a sentence in their place elsewhere; nothing is fetched",
)
def images(theirs: Server, ours: Server) -> None:
    for server, fetched in ((theirs, True), (ours, False)):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(2 if fetched else 0.3)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/cat.png"
            part = {"type": "image_url", "image_url": {"url": url}}
            messages = [{"role": "user", "content": [part]}]
            asking = threading.Thread(
                target=lambda s=server, m=messages: survives(s, CHAT, messages=m)
            )
            asking.start()
            try:
                listener.accept()[0].close()
                came = True
            except TimeoutError:
                came = False
            asking.join()
        assert came is fetched
    refused = ours.post(CHAT, messages=messages)
    assert refused.status_code == 400
    assert "image" in refused.json()["error"]["message"].lower()


@difference(
    "Body size (`--max-body-bytes`)",
    theirs="Unlimited",
    ours="64 MiB, beyond it 413",
)
def large_bodies(theirs: Server, ours: Server) -> None:
    sent = raw_post(CHAT, b"{", Content_Length=str(2**26 + 1))
    assert raw_status(raw_exchange(ours, sent)) == 413
    assert raw_status(raw_exchange(theirs, sent, wait_seconds=1)) == 0  # it waits for the rest


@difference(
    "A request without `Content-Length`",
    theirs="Refused with 411",
    ours="Read in chunks as HTTP/1.1 has it",
)
def chunked_bodies(theirs: Server, ours: Server) -> None:
    body = json.dumps({"messages": user("Hello, I am Lars."), "max_tokens": 2, **INSTANT})
    asked = [
        s.client.post(CHAT, content=iter([body[:9].encode(), body[9:].encode()]))
        for s in (theirs, ours)
    ]
    assert [response.status_code for response in asked] == [411, 200]


@difference(
    "The signals SIGTERM and SIGINT",
    theirs="Running replies are cut off",
    ours="Running streams end with an error event and `[DONE]`; exit status 0",
)
def signals(theirs: Server, ours: Server) -> None:
    body = {"prompt": "Tell me everything.", "max_tokens": 2000, "stream": True}
    body["logit_bias"] = {"700": 100}  # without an end
    for server in (theirs, ours):
        with server.client.stream("POST", COMPLETIONS, json=body) as response:
            lines = response.iter_lines()
            next(line for line in lines if line.startswith("data:"))
            assert server.process is not None
            server.process.send_signal(signal.SIGTERM)
            rest = []
            with contextlib.suppress(httpx2.TransportError):
                rest.extend(line for line in lines if line.startswith("data:"))
        status = server.process.wait(30)
        if server is theirs:
            assert status != 0
            assert "data: [DONE]" not in rest
        else:
            assert status == 0
            assert "error" in json.loads(rest[-2].removeprefix("data: "))
            assert rest[-1] == "data: [DONE]"
        server.revive()


@difference(
    "A model that is not the served one",
    theirs="Any request may load one",
    ours="404, unless started with `--allow-model-switching`",
)
def other_models(theirs: Server, ours: Server) -> None:
    other = Path(theirs._log.name).with_suffix(".model")
    shutil.copytree(BUNDLED_MODEL, other)
    try:
        body = {"model": str(other), "messages": user("Hello, I am Dora."), "max_tokens": 2}
        asked = [server.post(CHAT, **body) for server in (theirs, ours)]
    finally:
        shutil.rmtree(other)
    assert [response.status_code for response in asked] == [200, 404]
    assert asked[1].json()["error"]["code"] == "model_not_found"


@difference(
    "`/v1/models`",
    theirs="Downloaded models, or an empty answer when nothing was ever downloaded; one model is a list too",
    ours="The served model, always; `/v1/models/{id}` is OpenAI's object or 404",
)
def models(theirs: Server, ours: Server) -> None:
    assert theirs.client.get("/v1/models").text == ""
    listed = ours.client.get("/v1/models").json()["data"]
    assert len(listed) == 1
    assert ours.client.get(f"/v1/models/{listed[0]['id']}").json() == listed[0]
    assert ours.client.get("/v1/models/nothing").status_code == 404


@difference(
    "`model` in replies to requests that named none",
    theirs="`default_model`",
    ours="The served model's id",
)
def named_models(theirs: Server, ours: Server) -> None:
    body = {"messages": user("Hello, I am Omar."), "max_tokens": 2, **INSTANT}
    assert theirs.answer(CHAT, **body)["model"] == "default_model"
    served = ours.client.get("/v1/models").json()["data"][0]["id"]
    assert ours.answer(CHAT, **body)["model"] == served


@difference(
    "Errors",
    theirs='`{"error": "text"}`, and 404 for much that is the request\'s fault',
    ours='OpenAI\'s `{"error": {"message", "type", "param", "code"}}` with OpenAI\'s status',
)
def errors(theirs: Server, ours: Server) -> None:
    body = {"prompt": [1, 2, "three"], "max_tokens": 2}
    asked = [server.post(COMPLETIONS, **body) for server in (theirs, ours)]
    assert [response.status_code for response in asked] == [404, 400]
    assert isinstance(asked[0].json()["error"], str)
    assert asked[1].json()["error"].keys() == {"message", "type", "param", "code"}
    assert theirs.client.get("/v1/nothing").text == "Not Found"
    assert ours.client.get("/v1/nothing").json()["error"]["message"]


@difference(
    "`null` for a field",
    theirs="Refused for most fields",
    ours="The default",
)
def nulls(theirs: Server, ours: Server) -> None:
    body = {"messages": user("Hello, I am Lena."), **INSTANT}
    assert theirs.post(CHAT, **body, temperature=None).status_code == 400
    plain, null = ours.answer(CHAT, **body), ours.answer(CHAT, **body, temperature=None)
    assert plain["choices"] == null["choices"]


@difference(
    "Booleans and whole numbers",
    theirs="`max_tokens: true` is 1; `xtc_probability: 0` is refused",
    ours="`true` is not a number, 0 is",
)
def numbers(theirs: Server, ours: Server) -> None:
    body = {"messages": user("Hello, I am Mary."), **INSTANT}
    for field, status in (({"max_tokens": True}, [200, 400]), ({"xtc_probability": 0}, [400, 200])):
        asked = [server.post(CHAT, **body, **field).status_code for server in (theirs, ours)]
        assert asked == status


@difference(
    "Fields that would change the reply and are not supported",
    theirs="Ignored",
    ours="Refused with 400 where the reply would be wrong (`suffix`, `best_of` above `n`, `grammar`), else named in the header `X-Mlx-Hybridcache-Warning` and the log (`mirostat`)",
)
def unsupported_fields(theirs: Server, ours: Server) -> None:
    body = {"prompt": "Hello, I am Alan.", "max_tokens": 2}
    for field in ({"suffix": "."}, {"best_of": 2}, {"grammar": "root ::= x"}):
        asked = [server.post(COMPLETIONS, **body, **field).status_code for server in (theirs, ours)]
        assert asked == [200, 400]
    headers = [server.post(COMPLETIONS, **body, mirostat=2).headers for server in (theirs, ours)]
    assert ["x-mlx-hybridcache-warning" in each for each in headers] == [False, True]


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
    theirs="Matched token by token; one that the model spells with other tokens is cut out and the reply goes on",
    ours="Matched as text in the content, however it is tokenized; the reply ends there, and reasoning and calls are not cut",
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
    body = {"messages": user("Order 9 pieces of the saw."), **_tools("order_item")}
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
    body = {"messages": user("Where is Kofi?"), **_tools("find_person"), **INSTANT}
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
    body = {"messages": user("Where is Tariq?"), **_tools("find_person"), **INSTANT}
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
        {"messages": user("Where is Zoe?"), **_tools("get_price"), **INSTANT},
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
    body = {"messages": user("Where is Ivan?"), **_tools("find_person"), **INSTANT}
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
    body = {"messages": user("Where is Maya?"), **_tools("find_person", tool_choice="none")}
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
    body = {"messages": user("Where is Diego?"), **_tools("find_person"), "logit_bias": eos}
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


@pytest.mark.parametrize("row", DIFFERENCES, ids=lambda row: row.probe.__name__)
def test_every_listed_difference_is_there(row, theirs, ours):
    """On mlx_lm.server as its column says, on ours as ours says."""
    ours.revive()
    row.probe(theirs, ours)


def table() -> str:
    """The table of the page."""
    rows = [f"| {row.about} | {row.theirs} | {row.ours} |" for row in DIFFERENCES]
    return "\n".join(
        ["| | `mlx_lm.server` 0.32.2 | `mlx_hybridcache.server` |", "|---|---|---|", *rows]
    )


def test_the_page_lists_exactly_these_differences():
    """Between its markers, row by row; the text to put there is in the failure."""
    begin, end = "<!-- differences:begin -->", "<!-- differences:end -->"
    written = PAGE.read_text(encoding="utf-8")
    assert begin in written
    assert written.partition(begin)[2].partition(end)[0].strip() == table()
