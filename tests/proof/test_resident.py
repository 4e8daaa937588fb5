"""Resident memory: a store's bytes are as many to MLX and to the system, filled, evicting and cleared.

The measuring runs in a process of its own, this file as a script: what other tests leave in theirs
would be most of the difference.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass

import mlx.core as mx
import mlx.nn as nn
import oracle
import psutil
import pytest
import tiny
import tiny_models
from long import forms
from mlx_lm.models import qwen3_next
from places import SUPPORT

from mlx_hybridcache import HybridPromptCache

BUDGETS = forms(350_000_000, 1_000_000_000)
PROMPT = 128
"""Tokens of each prompt: half of what a request has room for, so that few pages are touched for nothing."""

PAGES = 50_000_000
"""Bytes by which resident memory may be more however little is held: a seventh of the smaller budget."""

REUSED = 66_000_000
"""Bytes that the process may have had free when it began, in which something that is stored lies now."""

SAMPLES = 6
"""While twice the budget is written."""


@dataclass(frozen=True)
class Sample:
    """Between two requests: reported bytes, and those active in MLX and resident since the start."""

    written: int
    reported: int
    active: int
    resident: int
    evictions: int


def wide_model() -> nn.Module:
    """A Qwen3-Next of one Gated-DeltaNet and one attention layer, narrow but for what is cached.

    A token's rows weigh 128 KiB, a checkpoint 256 KiB. Two heads have them: a new cache tries batches of as many.
    """
    mx.random.seed(tiny.SEED)
    wide = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "full_attention_interval": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8192,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    }
    model = qwen3_next.Model(
        qwen3_next.ModelArgs(
            model_type="qwen3_next",
            shared_expert_intermediate_size=32,
            mlp_only_layers=[],
            rope_theta=10000.0,
            partial_rotary_factor=0.25,
            **{**tiny_models.COMMON, **tiny_models.GATED_DELTA, **tiny_models.EXPERTS, **wide},
        )
    )
    model.eval()
    mx.eval(model.parameters())
    return model


def measure(budget: int) -> None:
    """Print a sample a line: while twice the budget is written, and one of the store cleared."""
    process = psutil.Process()
    with HybridPromptCache(wide_model(), oracle.word_tokenizer(), memory_budget=budget) as cache:
        written = read = active = resident = 0

        def ask() -> None:
            nonlocal written, read
            read += 1
            list(cache.stream_generate(oracle.prompt(PROMPT, seed=read), 1))
            written += PROMPT * cache.engine.layout.row_bytes

        def sample() -> Sample:
            held = cache.stats()
            assert held.running_bytes == 0
            return Sample(
                written,
                held.held_bytes,
                mx.get_active_memory() - active,
                process.memory_info().rss - resident,
                held.evictions,
            )

        ask()  # what the first forward loads stays, whatever is stored
        cache.clear()
        gc.collect()
        first = sample()
        written, active, resident = 0, first.active, first.resident
        for part in range(1, SAMPLES + 1):
            while written < 2 * budget * part / SAMPLES:
                ask()
            print(json.dumps(asdict(sample())), flush=True)
        cache.clear()
        print(json.dumps(asdict(sample())), flush=True)


@pytest.fixture(scope="module", params=BUDGETS)
def budget(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def samples(budget: int) -> list[Sample]:
    """What a process of its own measured; the last one with everything let go."""
    ended = subprocess.run(
        [sys.executable, __file__, str(budget)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return [Sample(**json.loads(line)) for line in ended.stdout.splitlines()]


def test_the_store_fills_evicts_and_is_empty_in_the_end(samples: list[Sample], budget: int) -> None:
    """Twice the budget is written: it is full from the third of six samples on, and never more."""
    *filling, cleared = samples
    assert len(filling) == SAMPLES
    assert filling[1].evictions == 0
    assert filling[-1].evictions > budget / 20_000_000
    assert filling[-1].written >= 2 * budget
    assert all(0.9 * budget < each.reported <= budget for each in filling[SAMPLES // 2 - 1 :])
    assert cleared.reported == 0


def test_mlx_holds_what_is_reported(samples: list[Sample], budget: int) -> None:
    """Active memory is within 1 % of the reported bytes, and of the budget once cleared."""
    *filling, cleared = samples
    for each in filling:
        assert abs(each.active - each.reported) <= each.reported / 100, each
    assert abs(cleared.active) <= budget / 100, cleared


@pytest.mark.skipif(sys.platform != "linux", reason="Metal's buffers are not all resident memory")
def test_the_system_holds_what_is_reported(samples: list[Sample], budget: int) -> None:
    """Resident memory is at most 10 % more than the reported bytes, and than none once cleared.

    It is hardly less: what MLX holds is exact, and tested beside this.
    """
    *filling, cleared = samples
    for each in filling:
        off = each.resident - each.reported
        assert -REUSED <= off <= max(each.reported / 10, PAGES), each
    assert abs(cleared.resident) <= budget / 10, cleared


if __name__ == "__main__":
    measure(int(sys.argv[1]))
