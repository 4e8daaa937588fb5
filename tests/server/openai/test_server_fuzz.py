"""What our own OpenAPI allows or forbids: answered, or refused with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from long import forms
from mlx_hybridcache_server.schema.fields import FIELDS
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks
from servers import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    OURS,
    Server,
    Stream,
    events_of,
    read_stream,
    running,
)
from texts import strict

VOCABULARY = 3072  # the bundled model's

# What the OpenAPI says

BODIES = {
    f"POST {CHAT}": 12,
    "POST /chat/completions": 3,
    f"POST {COMPLETIONS}": 15,
    f"POST {MESSAGES}": 12,
    f"POST {MESSAGES}/count_tokens": 6,
    "POST /v1/responses": 12,
    "POST /tokenize": 5,
    "POST /detokenize": 5,
    "POST /apply-template": 5,
    "POST /v1/cache/warm": 10,
    "POST /v1/cache/pin": 5,
    "DELETE /v1/cache/pin": 5,
    "POST /v1/cache/drop": 5,
    "POST /v1/cache/explain": 5,
}
"""Operations that take a body, and how many random ones each gets, good and bad."""

NO_BODIES = [
    "GET /health",
    "GET /metrics",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /v1/cache",
    "DELETE /v1/cache",
    "GET /v1/cache/recent",
    "GET /props",
    "GET /slots",
    "GET /v1/responses/{name}",
    "GET /v1/responses/{name}/input_items",
    "DELETE /v1/responses/{name}",
    "POST /v1/responses/{name}/cancel",
]

LAST_EVENTS = {
    MESSAGES: {"message_stop"},
    "/v1/responses": {"response.completed", "response.incomplete"},
}
"""Of streams that end with an event of their own, not with [DONE]."""

BEFORE = {"POST /v1/cache/drop": "/v1/cache/warm", "DELETE /v1/cache/pin": "/v1/cache/pin"}
"""Only what is stored can go, and only what is pinned be unpinned."""

ANY_TYPE_IS_JSON = ("malformed_content_type", "unsupported_content_type")
"""Bodies are read as JSON whatever their Content-Type says, as mlx_lm.server reads them."""

CONFORMS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
]


class Fuzzed:
    """A server and what its /openapi.json says."""

    def __init__(self, server: Server):
        self.server = server
        self.schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        self.operations = {
            found.ok().label: found.ok() for found in self.schema.get_all_operations()
        }
        self.session = requests.Session()
        self.session.trust_env = False

    def limits(self, label: str, mode: GenerationMode) -> Iterator[schemathesis.Case]:
        """Each field with its least, its greatest, its other types, and what is just outside."""
        return self.schema.iter_coverage_cases(
            self.operations[label],
            generation_modes=[mode],
            generation_config=self.schema.config.generation,
        )

    def at_random(
        self, label: str, mode: GenerationMode, count: int, judge: Callable[[Any], None]
    ) -> None:
        """Show `judge` so many cases, the same ones in every run."""

        @settings(
            max_examples=count,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=self.operations[label].as_strategy(generation_mode=mode))
        def judged(case: schemathesis.Case) -> None:
            judge(case)

        judged()

    def send(self, case: schemathesis.Case) -> tuple[int, Any]:
        """The status and the reply, which must be a documented one, in its API's shape if an error."""
        response = case.call(base_url=self.server.url, session=self.session, timeout=60)
        case.validate_response(response, checks=CONFORMS)
        assert response.status_code < 500, f"{case!r}: {response.text}"
        (kind,) = response.headers.get("content-type", [""])
        if response.status_code >= 400:
            return response.status_code, error_of(response.json(), str(case.path))
        if kind.startswith("text/event-stream") and case.path in LAST_EVENTS:
            events = events_of(response.text)
            assert events[-1]["type"] in LAST_EVENTS[case.path]
            return response.status_code, events
        if kind.startswith("text/event-stream"):
            stream = Stream(response.status_code, {})
            list(read_stream(iter(response.text.split("\n")), stream))
            assert stream.done
            assert not any("error" in event for event in stream.events), f"{case!r}: {stream}"
            return response.status_code, stream.events
        is_json = kind.startswith("application/json")
        return response.status_code, response.json() if is_json else response.text


def error_of(reply: dict[str, Any], path: str) -> dict[str, Any]:
    """What is wrong, from either API's shape. Anthropic's message begins with the name of a field."""
    error: dict[str, Any] = reply["error"]
    assert error["message"]
    assert error["type"]
    if path.startswith(MESSAGES):
        assert (reply.keys(), reply["type"]) == ({"type", "error"}, "error")
        assert error.keys() == {"type", "message"}
        name = re.split("[.: ]", error["message"], maxsplit=1)[0]
        is_general = error["message"].startswith("The body ")
        return {**error, "param": name if name in FIELDS else None, "code": is_general or None}
    assert reply.keys() == {"error"}
    assert error.keys() == {"message", "type", "param", "code"}
    return error


FLAGS = ("--max-tokens", "2", "--max-prompt-tokens", "2000", "--prefill-step-size", "256")


@contextmanager
def fuzzing(*flags: str) -> Iterator[Fuzzed]:
    with running(OURS, *FLAGS, *flags) as server:
        fuzzed = Fuzzed(server)
        with fuzzed.session:
            yield fuzzed


@pytest.fixture(scope="module")
def process():
    with fuzzing() as fuzzed:
        yield fuzzed


@pytest.fixture
def fuzzed(process):
    """Whatever a test sent, afterwards the server is healthy, and nothing failed unforeseen."""
    process.server.newly_logged()
    yield process
    assert process.server.healthy
    assert "Traceback" not in (log := process.server.newly_logged()), log


def bounded(case: schemathesis.Case) -> schemathesis.Case:
    """A case that takes no time: two tokens of a reply at most."""
    if isinstance(case.body, dict):
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            asked = case.body.get(name)
            if isinstance(asked, int | float) and asked > 2:
                case.body[name] = 2
    return case


def test_the_openapi_names_every_endpoint(fuzzed):
    """Twenty-seven operations, and none of the page's; the alias of the chat is described as the chat is."""
    assert fuzzed.operations.keys() == {*BODIES, *NO_BODIES}
    paths = fuzzed.server.client.get("/openapi.json").json()["paths"]
    alias, chat = paths["/chat/completions"]["post"], paths[CHAT]["post"]
    assert {**alias, "operationId": ""} == {**chat, "operationId": ""}
    for path, methods in paths.items():
        for method, said in methods.items():
            assert {"200", "4XX", "5XX"} <= said["responses"].keys(), f"{method} {path}"
            assert "422" not in said["responses"]  # the framework's own, which is never sent


@pytest.mark.parametrize("stride", forms(6, 1))
@pytest.mark.parametrize(
    "label", [label for label in BODIES if not label.endswith(" /chat/completions")]
)
def test_values_at_the_limits_are_answered_and_those_beyond_refused(fuzzed, label, stride):
    """`top_p` 0, 1, -1, 2, "0", null, ...: about 180 bodies that the schema allows, 300 that it forbids, or
    every sixth of them.
    """
    answered = refused = 0
    fuzzed.server.client.delete("/v1/cache")  # what other tests have pinned cannot be dropped
    for case in islice(fuzzed.limits(label, GenerationMode.POSITIVE), None, None, stride):
        if label in BEFORE:
            fuzzed.server.post(BEFORE[label], **case.body)
        status, reply = fuzzed.send(bounded(case))
        answered += status == 200
        refused += status != 200
        assert status == 200 or reply["param"] or reply["code"], f"{case!r}: {reply}"
    # What is stored, which tokens a model has, and what a request to be explained has, no schema can say.
    least = 0 if "explain" in label else 100 if "completions" in label else 4
    assert answered >= least // stride
    assert refused < answered or "cache" in label or "detokenize" in label
    for case in islice(fuzzed.limits(label, GenerationMode.NEGATIVE), None, None, stride):
        scenario = case.meta.phase.data.scenario
        status, reply = fuzzed.send(bounded(case))
        if scenario in ANY_TYPE_IS_JSON or case.method == "OPTIONS":
            continue
        assert 400 <= status < 500, f"{case.meta.phase.data.description}: {case!r}: {reply}"


@pytest.mark.parametrize("label", NO_BODIES)
def test_other_methods_and_headers_are_answered_or_refused(fuzzed, label):
    """PUT, PATCH, TRACE, QUERY: 405 with the methods that are allowed. A body that nobody asked for."""
    for mode in GenerationMode:
        for case in fuzzed.limits(label, mode):
            status, _ = fuzzed.send(case)
            assert status in (200, 204, 400, 404, 405)
            assert status not in (400, 404) or "{name}" in label


@pytest.mark.parametrize("part", forms(4, 1))
@pytest.mark.parametrize("label", BODIES)
def test_random_bodies_that_the_schema_allows_are_answered_or_refused_with_a_reason(
    fuzzed, label, part
):
    """The reason names a field, or has a code."""

    def judge(case: schemathesis.Case) -> None:
        status, reply = fuzzed.send(bounded(case))
        assert status == 200 or reply["param"] or reply["code"], f"{case!r}: {reply}"

    fuzzed.at_random(label, GenerationMode.POSITIVE, -(-BODIES[label] // part), judge)


@pytest.mark.parametrize("part", forms(4, 1))
@pytest.mark.parametrize("label", BODIES)
def test_random_bodies_that_the_schema_forbids_are_refused(fuzzed, label, part):
    """A field missing or of another type, no JSON at all."""

    def judge(case: schemathesis.Case) -> None:
        status, reply = fuzzed.send(bounded(case))
        assert 400 <= status < 500, f"{case!r}: {reply}"

    fuzzed.at_random(label, GenerationMode.NEGATIVE, -(-BODIES[label] // part), judge)


def test_random_names_of_models_are_not_found(fuzzed):
    """Any text, slashes and controls among it: 404, with the code of it."""

    def judge(case: schemathesis.Case) -> None:
        status, reply = fuzzed.send(case)
        assert status == 404, f"{case!r}: {reply}"

    fuzzed.at_random("GET /v1/models/{name}", GenerationMode.POSITIVE, 20, judge)


# Left out of a random request: what refers to things that may not be there.
REFERENCES = {
    *("model", "adapters", "draft_model", "response_format", "chat_template_kwargs"),
    *("tool_choice", "continue_final_message", "suffix", "best_of", "echo"),
}


def tamed(body: dict[str, Any]) -> dict[str, Any]:
    """A random body with everything put right that no schema can say: it must be answered."""
    found = {name: value for name, value in body.items() if name not in REFERENCES}
    for name, value in found.items():
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**31:
            found[name] = int(value)  # 1.0 is an integer for JSON schema, not for OpenAI
    found["stop_token_ids"] = [int(token) for token in found.get("stop_token_ids") or ()] or None
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if found.get(name) is not None:
            found[name] = 1 + int(found[name]) % 3
    for name in ("temperature", "top_p", "min_p", "xtc_probability", "xtc_threshold"):
        if found.get(name) is not None:
            found[name] = round(min(found[name], 1))  # MLX compiles each value for a second
    if found.get("n") is not None:
        found["n"] = min(found["n"], 2)
    if found.get("logit_bias"):
        biases = found["logit_bias"].values()
        found["logit_bias"] = {str(token): bias for token, bias in enumerate(biases)}
    if "prompt" in found:
        found["prompt"] = tamed_prompt(found["prompt"])
    for number, message in enumerate(found.get("messages", ())):
        message["role"] = ("system", "user", "assistant", "tool")[number % 4]
        for name in ("tool_calls", "reasoning", "reasoning_content"):
            message.pop(name, None)
        if isinstance(message.get("content"), list):
            message["content"] = [{"type": "text", "text": "abc"} for _ in message["content"]]
    found["seed"] = 7
    return found


def tamed_prompt(prompt: Any) -> Any:
    if isinstance(prompt, list):
        return [
            int(item) % VOCABULARY if isinstance(item, int | float) else tamed_prompt(item)
            for item in prompt[:5]
        ]
    return prompt


def answered_hot_as_cold(fuzzed: Fuzzed, path: str, count: int) -> None:
    """So many random requests are answered, every second one streamed, and again from the cache.

    Few of them, whose tools take all of the tokens that a prompt may have, are refused both times.
    """
    streams = cycle((False, True))
    too_long = []

    def judge(case: schemathesis.Case) -> None:
        case.body = {**tamed(case.body), "stream": next(streams)}
        told = []
        for _ in range(2):
            status, reply = fuzzed.send(case)
            if status == 400 and reply["code"] == "context_length_exceeded":
                too_long.append(reply)
                continue
            assert status == 200, f"{case.body}: {reply}"
            events = reply if isinstance(reply, list) else [reply]
            told.append([choice for event in events for choice in event["choices"]])
        if not told:
            return
        assert len(told) == 2, "it was too long once only"
        prompts = case.body.get("prompt")
        is_list = isinstance(prompts, list) and not isinstance(prompts[0], int)
        choices = (case.body.get("n") or 1) * (len(prompts) if is_list else 1)
        assert {choice["index"] for choice in told[0]} == set(range(choices))
        finishes = [choice["finish_reason"] for choice in told[0] if choice["finish_reason"]]
        assert len(finishes) == choices
        assert set(finishes) <= {"stop", "length", "tool_calls"}
        order = [sorted(each, key=lambda choice: choice["index"]) for each in told]
        assert order[0] == order[1], case.body

    fuzzed.at_random(f"POST {path}", GenerationMode.POSITIVE, count, judge)
    assert len(too_long) // 2 <= -(-count // 4)


@pytest.mark.parametrize("count", forms(5, 20))
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_random_requests_in_order_are_answered_and_hot_as_they_were_cold(fuzzed, path, count):
    """With any fields."""
    answered_hot_as_cold(fuzzed, path, count)


@pytest.mark.parametrize("chats", forms(3, 8))
def test_random_chats_are_answered_under_a_strict_template(chats):
    """System messages late, alone and behind each other, results of no call, replies first."""
    with fuzzing("--model", str(strict.directory())) as fuzzed:
        answered_hot_as_cold(fuzzed, CHAT, chats)


LARGEST, TINIEST = 1.7e308, 5e-324
AT_THE_LIMITS: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    ({"top_k": VOCABULARY - 1}, None),
    ({"top_k": VOCABULARY}, {}),
    ({"top_k": 2**31 - 1}, {}),
    ({"xtc_probability": 1, "xtc_threshold": 1}, {"xtc_probability": 1, "xtc_threshold": 0.5}),
    ({"min_p": TINIEST, "top_p": TINIEST}, None),
    ({"temperature": TINIEST}, None),
    ({"temperature": LARGEST, "presence_penalty": LARGEST, "frequency_penalty": -LARGEST}, None),
    ({"repetition_penalty": TINIEST, "logit_bias": {"5": LARGEST, "6": -LARGEST}}, None),
    (
        {"repetition_penalty": 1.1, "repetition_context_size": 2**31 - 1},
        {"repetition_penalty": 1.1, "repetition_context_size": 1000},
    ),
]
"""Settings that are the last or the first of their kind, and others that mean the same."""


@pytest.mark.parametrize(("given_", "same"), AT_THE_LIMITS, ids=str)
def test_a_sampler_at_its_limits_answers(fuzzed, given_, same):
    """`top_k` of the whole vocabulary is none at all; mlx-lm fails there, in the middle of a reply."""
    body = {"prompt": "def", "temperature": 1, "max_tokens": 3, "seed": 5}
    choices = fuzzed.server.answer(COMPLETIONS, **{**body, **given_})["choices"]
    if same is not None:
        assert fuzzed.server.answer(COMPLETIONS, **{**body, **same})["choices"] == choices
