"""What the simulator of `bench policies` counts is what the engine does, request by request."""

from collections.abc import Callable, Container
from typing import Any

import mlx.core as mx
import pytest
import tiny
from mlx_hybridcache_bench.policies.simulate import SHAPES, Simulation
from mlx_hybridcache_bench.policies.traces import TracedRequest
from mlx_hybridcache_bench.policies.workloads import Chance
from traced_requests import SCENES

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.tokens import Tokens

SHAPE = SHAPES["qwen3-next-80b"]
AMPLE = 10**12


class Watched(Simulation):
    """A simulation that tells what its last request was spared and what it took.

    `saved` counts checkpoints on the way, `slices` forwards but for the last token's.
    """

    restored: int
    saved: int
    slices: int

    def serve(self, index: int) -> int:
        """As ever; returns the tokens replayed."""
        self.saved = self.slices = 0
        self._tokens = len(self.trace[index].tokens)
        replayed = super().serve(index)
        self.restored = self._tokens - replayed
        return replayed

    def _afford(self, tokens: Tokens, b: int, cuts: list[int], parted: Container[int]) -> list[int]:
        self.slices += 1  # this is asked once for each
        return super()._afford(tokens, b, cuts, parted)

    def _save(self, tokens: Tokens, *more: Any, **options: Any) -> bool:
        is_stored = super()._save(tokens, *more, **options)
        self.saved += is_stored and len(tokens) < self._tokens  # beyond it lies the reply's end
        return is_stored


class Turns:
    """Turn marks of the request that is asked."""

    def __init__(self) -> None:
        self.turns: tuple[int, ...] = ()

    def starts(self, tokens: Tokens) -> tuple[int, ...]:
        """As the trace has them."""
        return self.turns

    def strips(self, reply: Tokens) -> bool:
        """Decided by the trace."""
        return False


@pytest.mark.parametrize("asks", SCENES.values(), ids=list(SCENES))
def test_what_is_read_again_is_what_the_engine_reads_again(
    asks: Callable[[Chance, int], list[TracedRequest]],
) -> None:
    """1,700 tokens on a tiny Qwen3-Next, every request: restored tokens, forwards, checkpoints."""
    trace = asks(Chance(3), 1700)
    simulation = Watched(trace, SHAPE, AMPLE)
    model = tiny.build("qwen3_next")
    with HybridPromptCache(model, memory_budget="1TiB") as cache:
        marks: Any = Turns()
        cache.engine.marks = marks
        for index, asked in enumerate(trace):
            replayed = simulation.serve(index)
            tokens, reply = ((x % 151).tolist() for x in (asked.tokens, asked.reply))
            marks.turns = asked.turns
            ready = cache.prefill(tokens)
            report = ready.report
            assert simulation.restored == report.restored_tokens
            assert replayed == report.replayed_tokens
            assert simulation.slices + 1 == report.forwards
            assert simulation.saved == report.checkpoints_taken
            if asked.keeps_reply:
                # The reply's end, which the simulation saves too.
                model(mx.array([[*ready.rest, *reply]]), cache=ready.prompt_cache)
                cache.save([*tokens, *reply], ready.prompt_cache)
            ready.release()
