"""Items as turns of a chat, and what is kept of responses; both without a model."""

from __future__ import annotations

import gc
import json
import tracemalloc
from typing import Any

import pytest
from mlx_hybridcache_server.errors import ApiError
from mlx_hybridcache_server.responses.conversation import SEALED, sealed, turns
from mlx_hybridcache_server.responses.kept import Kept, KeptResponses


def call(number: int) -> dict[str, Any]:
    return {"type": "function_call", "call_id": str(number), "name": "f", "arguments": "{}"}


def thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "output_text", "text": text}]}


def result(number: int) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": str(number), "output": "o"}


def texts(turn: dict[str, Any], kind: str) -> list[str]:
    parts = turn["content"] if turn["role"] == "assistant" else []
    return [part["text"] for part in parts if part["type"] == kind]


def shape(items: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (
            turn["role"],
            "\n".join(texts(turn, "reasoning")),
            "".join(texts(turn, "output_text")),
            len(turn.get("tool_calls", ())),
        )
        for turn in turns(items)
    ]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([thought("t"), said("a"), call(1), call(2)], [("assistant", "t", "a", 2)]),
        ([thought("t"), call(1)], [("assistant", "t", "", 1)]),
        ([thought("t"), thought("u"), said("a")], [("assistant", "t\nu", "a", 0)]),
        ([thought("t"), thought("u"), call(1)], [("assistant", "t\nu", "", 1)]),
        ([said("a"), said("b")], [("assistant", "", "ab", 0)]),
        ([said("a"), thought("t")], [("assistant", "", "a", 0), ("assistant", "t", "", 0)]),
        ([call(1), said("a")], [("assistant", "", "", 1), ("assistant", "", "a", 0)]),
        ([call(1), thought("t")], [("assistant", "", "", 1), ("assistant", "t", "", 0)]),
        (
            [call(1), result(1), call(2), result(2)],
            [("assistant", "", "", 1), ("tool", "", "", 0)] * 2,
        ),
    ],
)
def test_what_the_assistant_did_in_a_row_is_one_turn(items, expected):
    """As the template wrote it: thought, text, calls; what comes behind calls is a turn of its own."""
    assert shape(items) == expected


def test_a_sealed_thought_is_read_and_a_foreign_one_is_not():
    """Ours are the text itself; of others', and of what is damaged, nothing is read."""
    for content, expected in (
        (sealed("Hm, ü."), "Hm, ü."),
        ("gAAAAAB-of-another-server", None),
        (f"{SEALED}%%%", None),
        (f"{SEALED}/w==", None),
        (5, None),
    ):
        (turn,) = turns([{"type": "reasoning", "summary": [], "encrypted_content": content}])
        assert texts(turn, "reasoning") == ([expected] if expected else [])


def test_an_item_that_nobody_knows_leaves_a_part_that_prompts_put_a_sentence_for():
    """It is not dropped: the assistant did something there."""
    (turn,) = turns([{"type": "web_search_call", "id": "1", "status": "completed"}])
    assert (turn["role"], turn["content"][0]["type"]) == ("assistant", "web_search_call")


def response(name: str, before: str | None = None, text: str = "a") -> dict[str, Any]:
    return {"id": name, "previous_response_id": before, "output": [{"text": text}]}


def test_what_is_kept_has_a_bound_and_the_least_recently_used_goes():
    """Bytes of all together; what is too large for the whole of it is not kept, and drives nothing out."""
    kept = KeptResponses(most_bytes=8000)
    for number in range(10):
        kept.keep(Kept.of(response(f"r{number}", text="x" * 300), [], None))
        assert kept.nbytes <= 8000
        kept.find("r0", None)  # used again and again
    assert len(kept) == 5
    kept.keep(Kept.of(response("large", text="x" * 8000), [], None))
    with pytest.raises(ApiError, match="large"):
        kept.find("large", None)
    assert len(kept) == 5
    kept.drop("r0", None)
    with pytest.raises(ApiError, match="r0"):
        kept.find("r0", None)
    for name in ("r9", "r8", "r7", "r6"):
        kept.drop(name, None)
    assert (len(kept), kept.nbytes) == (0, 0)


@pytest.mark.parametrize(
    ("added", "salt"),
    [([{"input": [{}] * 5000}], None), ([{"input": [[]] * 5000}], None), ([], "s" * 15_000)],
)
def test_what_is_kept_is_no_larger_than_it_is_said_to_be(added, salt):
    """Small things that are large in memory, and a salt: what one takes more is counted, byte by byte."""
    kept = KeptResponses()
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(20):
            own = json.loads(json.dumps([response(f"r{number}"), added]))
            kept.keep(Kept.of(*own, salt and f"{number}{salt}"))
        del own
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before <= kept.nbytes
    finally:
        tracemalloc.stop()


def test_a_conversation_is_all_that_was_added_and_put_out():
    """Oldest first, and refused where one of it is gone or another salt's."""
    kept = KeptResponses()
    kept.keep(Kept.of(response("r1", text="b"), [{"text": "a\r\n"}], "s"))
    kept.keep(Kept.of(response("r2", "r1", text="d"), [{"text": "c"}], "s"))
    items = [item for each in kept.conversation("r2", "s") for item in each.items()]
    assert [item["text"] for item in items] == ["a\r\n", "b", "c", "d"]
    assert kept.conversation(None, "s") == []
    with pytest.raises(ApiError) as refused:
        kept.conversation("r2", "t")
    assert (refused.value.status_code, refused.value.param) == (404, "previous_response_id")
    kept.drop("r1", "s")
    with pytest.raises(ApiError, match="r1"):
        kept.conversation("r2", "s")
