"""What the simulator of `bench policies` counts is what the engine does, request by request."""

from typing import Any

import mlx.core as mx
import pytest
import tiny
from long import mostly_long
from mlx_hybridcache_bench.policies.simulate import Marks, Simulation
from mlx_hybridcache_bench.policies.sized import SHAPES
from mlx_hybridcache_bench.policies.workloads import Chance
from traced_requests import SCENES

from mlx_hybridcache import HybridPromptCache

SHAPE = SHAPES["qwen3-next-80b"]
AMPLE = 10**12

ALWAYS = ("last line changed", "a new branch", "the same, reasoning left out", "exact repeat")


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
