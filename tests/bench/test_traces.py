"""Traces: what is generated, and what a file holds."""

import json

import numpy as np
import pytest
from mlx_hybridcache_bench import cli
from mlx_hybridcache_bench.policies.traces import FORMAT, TracedRequest, read_trace, write_trace
from mlx_hybridcache_bench.policies.workloads import OPEN, WORKLOADS, workload

from mlx_hybridcache.errors import PromptError
from mlx_hybridcache.store.tree import common_length

SMALL = 30
every_workload = pytest.mark.parametrize("name", list(WORKLOADS))


def same(one: TracedRequest, other: TracedRequest) -> bool:
    return one.as_json() == other.as_json()


@every_workload
def test_a_seed_gives_the_same_trace_always_and_another_seed_another(name):
    """The first 30 requests of seeds 1, 1 and 2."""
    first, again, other = (workload(name, seed, requests=SMALL) for seed in (1, 1, 2))
    assert len(first) == SMALL
    assert all(map(same, first, again))
    assert not any(map(same, first, other))


@every_workload
def test_turns_stand_just_behind_an_opener(name):
    """One token behind `<|im_start|>`, or three behind it where a user speaks."""
    for asked in workload(name, 1, requests=SMALL):
        assert list(asked.turns) == sorted(set(asked.turns))
        assert all(OPEN in asked.tokens[max(0, turn - 3) : turn] for turn in asked.turns)
        assert len(asked.turns) == int((asked.tokens == OPEN).sum())


@pytest.mark.parametrize("name", ["agents", "alternating", "chats"])
def test_a_kept_reply_is_where_the_conversation_goes_on(name):
    """The next prompt of a conversation begins with the reply, unless the reply is not kept."""
    latest: dict[str | None, TracedRequest] = {}
    went_on = 0
    for asked in workload(name, 1, requests=120):
        before = latest.get(asked.conversation)
        if before is not None and name != "chats" and before.keeps_reply:
            went_on += common_length(before.history, asked.tokens) == len(before.history)
        if before is not None and name == "chats":
            assert not before.keeps_reply
            shared = common_length(before.tokens, asked.tokens)
            assert len(before.tokens) - shared in (0, 2)  # the prepared `<think>` is left out
            went_on += 1
        latest[asked.conversation] = asked
    assert went_on > 80


def test_a_file_gives_back_what_was_written(tmp_path):
    """All workloads, 30 requests each."""
    for name in WORKLOADS:
        trace = workload(name, 1, requests=SMALL)
        write_trace(tmp_path / "trace.jsonl", trace)
        assert all(map(same, trace, read_trace(tmp_path / "trace.jsonl")))


def test_recorded_numbers_have_32_bits(tmp_path):
    """What a server records are hashes: 4,294,967,295 is one of them. Unknown replies stay unknown."""
    file = tmp_path / "trace.jsonl"
    request = {"t": 0.5, "conversation": None, "tokens": [2**32 - 1, 0, 2**31], "turns": [1]}
    request |= {"reply": 7, "keeps_reply": True}
    file.write_text(json.dumps({"format": FORMAT}) + "\n" + json.dumps(request) + "\n")
    (asked,) = read_trace(file)
    assert asked.tokens.dtype == np.int32
    assert asked.tokens.view(np.uint32).tolist() == [2**32 - 1, 0, 2**31]
    assert (asked.reply_tokens, len(asked.reply), asked.keeps_reply) == (7, 0, False)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"t": 0, "conversation": null, "tokens": [1, 2], "turns": [1], "rep', "Line 2"),
        ('{"t": 0, "conversation": null, "tokens": [], "turns": [], "reply": 0}', "no tokens"),
        ('{"t": 0, "conversation": null, "tokens": [-1], "turns": [], "reply": 0}', "Line 2"),
        (
            '{"t": 0, "conversation": null, "tokens": [1], "turns": [2], "reply": 0}',
            "ascend within the prompt",
        ),
        ("[]", "Line 2"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path, line, said):
    """Cut short, empty, out of range, out of order, something else."""
    file = tmp_path / "trace.jsonl"
    file.write_text(json.dumps({"format": FORMAT}) + "\n" + line + "\n")
    with pytest.raises(PromptError, match=said):
        read_trace(file)


def test_a_file_of_another_format_is_refused(tmp_path):
    """A JSONL file without the header."""
    file = tmp_path / "other.jsonl"
    file.write_text('{"prompt": "hello"}\n')
    with pytest.raises(PromptError, match="mlx_hybridcache trace 1"):
        read_trace(file)


def test_the_command_writes_files_that_can_be_read(tmp_path):
    """One workload of seed 5."""
    out, result = tmp_path / "out", tmp_path / "result.json"
    asked = [
        "traces",
        "--out",
        str(out),
        "--only",
        "few-shot",
        "--seed",
        "5",
        "--json",
        str(result),
    ]
    assert cli.main(asked) == 0
    told = json.loads(result.read_text())["traces"]["few-shot"]
    assert len(read_trace(out / "few-shot-5.jsonl")) == told["requests"] == 400
