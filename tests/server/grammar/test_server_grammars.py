"""What compiled grammars cost: what is kept is bounded by its weight, and no schema takes long."""

from __future__ import annotations

import ctypes
import gc
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from bundled import load
from mlx_hybridcache_server.errors import ApiError
from mlx_hybridcache_server.grammar.compiled import (
    KEPT_BYTES,
    MOST_BYTES,
    Compiled,
    weight,
)
from mlx_hybridcache_server.grammar.constrain import Constraint, Constraints
from mlx_hybridcache_server.grammar.narrowing import (
    MOST_PATTERNS,
    MOST_PROPERTIES,
    MOST_REMAINDERS,
    remainders,
    without_notes,
)
from mlx_hybridcache_server.prompts.chat import Rendered
from mlx_hybridcache_server.schema.requests import ChatBody
from servers import CHAT, INSTANT, OURS, running, user


def body(schema: Any) -> ChatBody:
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    return ChatBody.model_validate({"messages": user("Hello"), "response_format": wanted})


def made(constraints: Constraints, schema: Any) -> Constraint:
    found = constraints.of(body(schema), Rendered([1]))
    assert found is not None
    return found


@pytest.fixture
def constraints() -> Constraints:
    return Constraints(load()[1])


# What counts


def test_what_a_schema_says_to_people_is_no_part_of_its_grammar() -> None:
    """Notes go wherever a schema stands; a property called `description`, and data, stay."""
    inner = {"type": "string", "title": "T", "description": "D", "examples": ["e"], "default": "d"}
    schema = {
        "$comment": "c",
        "type": "object",
        "properties": {"description": inner, "title": {"enum": [{"title": "kept"}]}},
        "$defs": {"examples": {"items": inner, "anyOf": [inner, {"const": {"default": 1}}]}},
        "required": ["description"],
        "additionalProperties": inner,
    }
    bare = {"type": "string"}
    assert without_notes(schema) == {
        "type": "object",
        "properties": {"description": bare, "title": {"enum": [{"title": "kept"}]}},
        "$defs": {"examples": {"items": bare, "anyOf": [bare, {"const": {"default": 1}}]}},
        "required": ["description"],
        "additionalProperties": bare,
    }


def test_what_is_referred_to_stays() -> None:
    """`$ref` to a schema among the examples."""
    schema = {"examples": [{"type": "integer"}], "$ref": "#/examples/0"}
    assert without_notes(schema) is schema


def test_schemas_that_differ_in_words_only_share_a_grammar(constraints: Constraints) -> None:
    """42 descriptions of a megabyte each: one grammar is kept, of less than a megabyte."""
    found = {
        made(constraints, {"type": "integer", "description": f"{n}" + "x" * 2**20}).matchers
        for n in range(42)
    }
    assert len(found) == len(constraints.compiled) == 1
    assert constraints.compiled.nbytes < 2**20


# What is kept


def test_a_grammar_is_compiled_once_by_all_who_ask_at_once() -> None:
    """Eight threads ask for one, which takes until all wait; one that fails fails for all, and is tried again."""
    compiled: Compiled[int] = Compiled()
    barrier, calls = threading.Barrier(8), []
    fails = True

    def make() -> int:
        calls.append(threading.get_ident())
        while len(asking) < 8:
            time.sleep(0.001)
        if fails:
            raise LookupError
        return 7

    asking: list[int] = []

    def ask(_: int) -> Any:
        barrier.wait()
        asking.append(1)
        try:
            return compiled.get(["a"], 10, make)
        except LookupError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
        assert {type(one) for one in found} == {LookupError}
        assert (len(compiled), compiled.nbytes) == (0, 0)
        fails = False
        calls.clear()
        asking.clear()
        assert list(pool.map(ask, range(8))) == [7] * 8
    assert len(calls) == 1


def test_what_is_kept_never_weighs_more_than_it_may() -> None:
    """Room for 100: of 60, 30 and 40, the first goes; used again, 30 outlives 40; 101 is not kept."""
    compiled: Compiled[str] = Compiled(100)

    def has(name: str, nbytes: int) -> bool:
        told: list[str] = []
        compiled.get([name], nbytes, lambda: told.append(name) or name)  # type: ignore[func-returns-value]
        assert compiled.nbytes <= 100
        return not told

    assert [has("a", 60), has("b", 30), has("c", 40)] == [False] * 3
    assert (len(compiled), compiled.nbytes) == (2, 70)
    assert has("b", 30)
    assert not has("d", 60)
    assert has("b", 30)
    assert not has("c", 40)
    assert not has("heavy", 101)
    assert (len(compiled), compiled.nbytes) == (0, 0)


def test_the_heaviest_grammar_that_is_compiled_can_be_kept() -> None:
    """So that who uses it with every request does not pay for it each time."""
    assert weight(["x" * MOST_BYTES], MOST_REMAINDERS) <= KEPT_BYTES


class _Allocated(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def allocated() -> Callable[[], int]:
    """Bytes that the main thread has from the system's allocator, exactly."""
    try:
        count = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        pytest.skip("only glibc tells what is allocated")
    count.restype = _Allocated

    def bytes_now() -> int:
        gc.collect()
        found = count()
        return int(found.uordblks + found.hblkhd)

    return bytes_now


def named(count: int, schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"{n:x}": schema for n in range(count)}}


WEIGHED = {
    "little": {"type": "integer"},
    "open": named(1000, {}),
    "more": named(2000, {}),
    "arrays": named(300, {"type": "array", "minItems": 3, "maxItems": 200}),
    "enum": {"enum": [f"word {n}" for n in range(5000)]},
    "strings": named(300, {"type": "string", "maxLength": 9}),
    "numbers": named(300, {"type": "number", "minimum": 0.125, "maximum": 1e9}),
    "formats": named(300, {"type": "string", "format": "date-time"}),
    "patterns": {"anyOf": [{"type": "string", "pattern": f"^[a-z]{{{n}}}x$"} for n in range(200)]},
    "remainders": {"type": "integer", "multipleOf": 19_997},
    "combined": {"allOf": [{"type": "integer", "multipleOf": 139}, {"multipleOf": 137}]},
    "many": named(20, {"type": "integer", "multipleOf": 997})
    | {"required": [f"{n:x}" for n in range(20)]},
}


@pytest.mark.parametrize("kind", WEIGHED)
def test_grammars_weigh_no_more_than_is_said(constraints: Constraints, kind: str) -> None:
    """Against what the allocator gave, before a reply and after one has used a copy."""
    bytes_now = allocated()
    made(constraints, {"type": "boolean"})
    before, told = bytes_now(), constraints.compiled.nbytes
    found = made(constraints, WEIGHED[kind])
    weighs = bytes_now() - before
    assert weighs <= constraints.compiled.nbytes - told
    for matcher in found.start()._matchers:
        for _ in range(20):
            matcher.compute_bitmask()
            matcher.consume_token(constraints.vocabulary.greedy_tokenize('{"')[0])
    del matcher
    assert bytes_now() - before <= constraints.compiled.nbytes - told


# What is refused


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"enum": ["x" * MOST_BYTES]}, "descriptions left out"),
        (named(MOST_PROPERTIES + 1, {}), "4,001 properties"),
        (named(3, named(MOST_PROPERTIES // 3, {})), "4,002 properties"),
        (
            {"patternProperties": {f"^{n:x}x": {} for n in range(MOST_PATTERNS + 1)}},
            "101 patternProperties",
        ),
        ({"type": "integer", "multipleOf": MOST_REMAINDERS + 1}, "multipleOf"),
        ({"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 991}]}, "multipleOf"),
        ({"type": "number", "multipleOf": 3.1415926}, "multipleOf"),
        (named(30, {"type": "integer", "multipleOf": 997}), "multipleOf"),
        ({"type": "integer", "multipleOf": 1e300}, "multipleOf"),
    ],
)
def test_schemas_that_would_take_too_much_are_refused(
    constraints: Constraints, schema: Any, why: str
) -> None:
    """400 with a sentence that says what was found and what may be; nothing is compiled."""
    with pytest.raises(ApiError, match=why) as refused:
        made(constraints, schema)
    assert refused.value.status_code == 400
    assert len(str(refused.value.detail)) < 300
    assert len(constraints.compiled) == 0


def test_multiples_that_people_use_are_kept_to(constraints: Constraints) -> None:
    """Cents, fives and thousands, beside one another and combined."""
    money = {"type": "number", "multipleOf": 0.01}
    schema = {
        "anyOf": [money, {"allOf": [{"type": "integer", "multipleOf": 5}, {"multipleOf": 1000}]}]
    }
    made(constraints, schema)
    assert remainders(schema) == 1000 + 5 + 1


def test_no_schema_keeps_the_server_or_its_memory() -> None:
    """Twelve schemas with four megabytes of words each, at once: all answered, less than 2 MB is kept."""

    def schema(n: int) -> dict[str, Any]:
        words = f"{n}" + "x" * (4 * 2**20)
        return {"type": "object", "description": words, "properties": {"a": {"enum": [n % 3]}}}

    with running(OURS, "--cache-ram", "64") as server:
        ask = lambda n: server.answer(  # noqa: E731
            CHAT,
            messages=user("Hello"),
            max_tokens=12,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": schema(n)},
            },
            **INSTANT,
        )
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(ask, range(12)))
        told = server.client.get("/v1/cache").json()["grammars"]
        assert told["count"] == 3
        assert 0 < told["bytes"] < 2**21 < told["most_bytes"]


def test_half_a_surrogate_pair_is_no_text(constraints: Constraints) -> None:
    """Valid JSON, but no tokenizer can write it."""
    with pytest.raises(ApiError):
        made(constraints, json.loads('{"const": "\\ud800"}'))
