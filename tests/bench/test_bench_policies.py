"""Policies on small traces: counts, never times."""

import json
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from long import forms, mostly_long
from mlx_hybridcache_bench import cli
from mlx_hybridcache_bench.policies import smaller
from mlx_hybridcache_bench.policies.baselines import LlamaCpp, MlxLm, Overlaps
from mlx_hybridcache_bench.policies.offline import Clairvoyant, floor
from mlx_hybridcache_bench.policies.outcomes import BASELINES, OFFLINE, OURS, POLICIES, measure
from mlx_hybridcache_bench.policies.simulate import SPACE, Marks, Simulation
from mlx_hybridcache_bench.policies.sized import SHAPES, SizedLayout, SizedRequest
from mlx_hybridcache_bench.policies.traces import TracedRequest, write_trace
from mlx_hybridcache_bench.policies.workloads import Chance, workload
from stores.traced_requests import SCENES

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.caches.kinds.smaller import StorePrecision
from mlx_hybridcache.store.tree import common_length

SHAPE = SHAPES["qwen3-next-80b"]
GB = 10**9
AMPLE = 10**12

ALWAYS = ("last line changed", "a new branch", "the same, reasoning left out", "exact repeat")


def asked(tokens, reply=(), turns=(), keeps_reply=True):
    reply = np.array(reply, dtype=np.int32)
    tokens = np.array(tokens, dtype=np.int32)
    return TracedRequest(0.0, None, tokens, tuple(turns), reply, len(reply), keeps_reply)


def replays(server, trace):
    return [server.serve(index) for index in range(len(trace))]


@pytest.fixture(scope="module")
def chats():
    """The first 120 requests of some chats: 0.5 M tokens."""
    return workload("chats", 1, requests=120)


def test_the_shapes_weigh_what_the_design_says():
    """24 KiB a token and 74 MiB a checkpoint; 20 KiB and 61 MiB."""
    weights = [(s.row_bytes / 1024, round(s.checkpoint_bytes / 1024**2)) for s in SHAPES.values()]
    assert weights == [(24, 74), (20, 61)]


def test_overlaps_are_those_of_the_tokens(chats):
    """Of 120 requests every pair, prompts and replies."""
    overlaps = Overlaps(chats)
    whole = [np.concatenate([each.tokens, each.reply]) for each in chats]
    for i, one in enumerate(whole):
        expected = [common_length(one, each.tokens) for each in chats]
        assert overlaps.of_prompts(i).tolist() == expected
        assert overlaps.shared(i, 7) == common_length(one, whole[7])


def test_every_policy_reads_a_prompt_once_when_memory_is_ample():
    """A prompt of 3,000, asked again after its reply, then its next turn: 1 or a few, then what is new."""
    prompt, reply, question = list(range(3000)), list(range(5000, 5100)), [7] * 50
    trace = [asked(prompt, reply), asked(prompt, reply), asked(prompt + reply + question)]
    for name, make in POLICIES.items():
        server = make(trace, Overlaps(trace), SHAPE, 16 * GB)
        first, again, on = replays(server, trace)
        assert first == 3000, name
        assert 1 <= again <= 4, name
        assert on in (50, 51), name


def test_the_simulated_store_keeps_to_its_budget(chats):
    """2 GB with the running request, after every one."""
    simulation = Simulation(chats, SHAPE, 2 * GB)
    for index in range(len(chats)):
        simulation.serve(index)
        stats = simulation.store.stats()
        assert stats.running_bytes == 0
        assert stats.held_bytes <= 2 * GB
    assert stats.evictions > 100


def test_a_running_request_weighs_the_same_for_every_policy():
    """A prompt of 1,000 and a reply of 100: the rows of both, rounded up, and one state."""
    one = asked(range(1000), range(100))
    request = SizedRequest(one.tokens, SPACE, one.reply_tokens)
    weight = SizedLayout.of_shape(SHAPE).running_bytes(request.rows)
    assert weight == SHAPE.running_bytes(one) >= 1100 * SHAPE.row_bytes + SHAPE.checkpoint_bytes


def test_a_reply_that_the_template_strips_is_not_saved():
    """A prompt of 3,000 and a reply of 100, then both and a question: from 3,100 or from 2,999."""
    prompt, reply, question = list(range(3000)), list(range(5000, 5100)), [7] * 50
    for keeps, on in ((True, 50), (False, 151)):
        first = replace(asked(prompt, reply), keeps_reply=keeps)
        trace = [first, asked(prompt + reply + question)]
        assert replays(Simulation(trace, SHAPE, 16 * GB), trace) == [3000, on]


def test_a_prompt_that_no_budget_holds_is_read_in_full():
    """50,000 tokens are 1.2 GB of rows; the next one is served again."""
    trace = [asked(range(50_000)), asked(range(1000)), asked(range(1000))]
    for name, make in POLICIES.items():
        server = make(trace, Overlaps(trace), SHAPE, GB)
        assert replays(server, trace)[:2] == [50_000, 1000], name


def test_mlx_lm_restores_whole_prefixes_alone():
    """A changed ending finds the system prompt's end, an exact repeat the prompt's end."""
    prompt = list(range(2000))
    changed = [*prompt[:1900], *[9] * 100]
    turns = (1, 303, 1998)
    trace = [asked(prompt, turns=turns), asked(changed, turns=turns), asked(prompt, turns=turns)]
    server = MlxLm(trace, Overlaps(trace), SHAPE, 16 * GB)
    assert replays(server, trace) == [2000, 2000 - 303, 1]


def test_llama_cpp_erases_checkpoints_beyond_the_common_prefix():
    """20,000 tokens with a turn at 13,000, back to 12,000, then another ending: from 8,192."""
    old = list(range(20_000))
    new = [*old[:12_000], *[7] * 3000]
    trace = [asked(old, turns=(1, 13_000)), asked(new), asked([*new[:14_000], *[8] * 500])]
    server = LlamaCpp(trace, Overlaps(trace), SHAPE, 16 * GB)
    assert replays(server, trace) == [20_000, 15_000 - 8192, 14_500 - 8192]


def test_the_clairvoyant_replays_least_and_the_floor_is_lower_still(chats):
    """Where everything fits it reaches the floor."""
    overlaps = Overlaps(chats)
    lowest = floor(chats, overlaps)
    counts = [sum(replays(Clairvoyant(chats, overlaps, SHAPE, b * GB), chats)) for b in (1, 2, 16)]
    assert counts[0] > counts[1] > counts[2] == lowest


@pytest.mark.parametrize("measured", forms((["qwen3-next-80b"], (1, 4)), (SHAPES, (1, 2, 4))))
def test_ours_replays_less_than_every_baseline(chats, measured):
    """120 requests of six chats at 1 and 4 GB with one shape, or at 2 GB too and with all."""
    shapes, budgets = measured
    for shape in shapes:
        outcome = measure("chats", chats, SHAPES[shape], [each * GB for each in budgets])
        ours = outcome.replayed[OURS]
        for name in BASELINES:
            assert all(map(int.__lt__, ours, outcome.replayed[name])), (name, outcome.replayed)
        assert ours[-1] <= 1.25 * outcome.replayed[OFFLINE][-1]


def test_a_replay_gives_the_same_counts_always(chats):
    """Twice at 2 GB, request by request."""
    runs = [replays(Simulation(chats, SHAPE, 2 * GB), chats) for _ in range(2)]
    assert runs[0] == runs[1]


def test_the_command_reads_recorded_traces(tmp_path, chats):
    """A file, two budgets; the documented keys; exit status 1 tells of a target that is missed."""
    file, result = tmp_path / "recorded.jsonl", tmp_path / "result.json"
    write_trace(file, chats[:40])
    options = ["--trace", str(file), "--budget", "2GB", "--budget", "8GB", "--json", str(result)]
    plot = tmp_path / "policies.png"
    assert cli.main(["policies", *options, "--plot", str(plot)]) in (0, 1)
    told = json.loads(result.read_text())
    assert set(told) == {"command", "machine", "figures", "outcomes"}
    (outcome,) = told["outcomes"]
    assert outcome["trace"] == "recorded"
    assert outcome["budget_bytes"] == [2 * GB, 8 * GB]
    assert set(outcome["replayed_tokens"]) == set(POLICIES)
    assert outcome["prompt_tokens"] == sum(len(each.tokens) for each in chats[:40])
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize("name", mostly_long(SCENES, ALWAYS))
def test_what_is_read_again_is_what_the_engine_reads_again(
    name: str,
) -> None:
    """1,700 tokens on a tiny Qwen3-Next, every request: replayed tokens, forwards, checkpoints."""
    trace = SCENES[name](Chance(3), 1700)
    simulation = Simulation(trace, SHAPE, AMPLE)
    model = tiny.build("qwen3_next")
    with HybridPromptCache(model, memory_budget="1TiB") as cache:
        marks: Any = Marks()
        cache.engine.prefill.marks = marks
        for index, asked in enumerate(trace):
            replayed = simulation.serve(index)
            tokens, reply = ((x % 151).tolist() for x in (asked.tokens, asked.reply))
            marks.turns = tuple(asked.turns)
            ready = cache.prefill(tokens)
            report = ready.report
            assert replayed == report.replayed_tokens
            assert simulation.account.forwards == report.forwards
            assert simulation.account.taken == report.checkpoints_taken
            if asked.keeps_reply:
                # The reply's end, which the simulation saves too.
                model(mx.array([[*ready.rest, *reply]]), cache=ready.prompt_cache)
                cache.save([*tokens, *reply], ready.prompt_cache)
            ready.release()


# A smaller store


SMALL = SHAPE.smaller(StorePrecision(8, 8))


def test_a_smaller_store_holds_more_conversations_of_the_same_trace(chats):
    """At 1 GB, with fewer tokens replayed; what it holds is within its budget, small."""
    found = smaller.measure("chats", chats, SHAPE, StorePrecision(8, 8), 1 * GB)
    assert found.small.conversations > found.full.conversations > 0
    assert found.small.replayed < found.full.replayed
    rows, states = SMALL.stored_row_bytes, SMALL.stored_checkpoint_bytes
    assert found.small.tokens * rows + found.small.checkpoints * states <= 1 * GB


def test_what_a_smaller_store_can_hold_follows_from_the_shapes():
    """1.94 x of rows, 3.64 x of states: 2.5 x where checkpoints lie every 3,404 tokens, at any distance with 4 bits."""
    at = smaller.tokens_for(SMALL, 2.5)
    assert at == pytest.approx(3404, abs=1)
    held = smaller.Held(1.0, 10 * at, 10.0, 0)
    assert smaller.Smaller("", GB, SMALL, held, held).same_contents == pytest.approx(2.5)
    assert smaller.tokens_for(SHAPE.smaller(StorePrecision(4, 8)), 2.5) is None


def test_the_command_shows_what_a_smaller_store_holds(tmp_path, chats, capsys):
    """A row, the bytes it is reckoned from, and a target that counts."""
    file, json_file = tmp_path / "chats.jsonl", tmp_path / "out.json"
    write_trace(file, chats[:40])
    words = ["--trace", str(file), "--budget", "1GB", "--store-kv", "8", "--store-state", "int8"]
    status = cli.main(["policies", *words, "--json", str(json_file)])
    written = json.loads(json_file.read_text())
    assert status == int(not written["figures"][0]["kept"])
    assert len(written["smaller"]) == 1
    assert "24,576 bytes and 12,672" in " ".join(capsys.readouterr().out.split())
