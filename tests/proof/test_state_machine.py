"""Both tiers under thousands of operations in any order, checked after each: structure, bytes, replies.

A thousand always, ten thousand by `pytest -m long`. The same every time that the same tests are collected:
hypothesis tries the numbers that it reads in them. `STATE_MACHINE_SEED=7` runs others,
`STATE_MACHINE_OPERATIONS=100000` has more in the long form.
"""

import gc
import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from long import forms
from state_machine import cases
from state_machine.operations import CacheMachine

from mlx_hybridcache.store.tree import PrefixTree

SHORT = 1000
OPERATIONS = forms(SHORT, int(os.environ.get("STATE_MACHINE_OPERATIONS", "10000")))
"""Of all cases together."""

SEED = int(os.environ.get("STATE_MACHINE_SEED", "0"))

STEPS = {True: 42, False: 125}
"""Operations on one directory, in the short form or not; each example begins with an empty one. Hypothesis leaves some kinds
of operations out of each: a few short examples have all of them sooner than one that is long.
"""


@contextmanager
def counted_splits(seen: Counter[str]) -> Iterator[None]:
    """How often a run was cut in two."""
    split = PrefixTree._split

    def counted(self: PrefixTree, *where: Any) -> Any:
        seen["split"] += 1
        return split(self, *where)

    PrefixTree._split = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        PrefixTree._split = split  # type: ignore[method-assign]


FLOORS = Counter(
    {
        "none": 50,
        "memory": 50,
        "disk": 30,
        "evicted": 50,
        "files evicted": 10,
        "split": 100,
        "failed": 20,
        "cancelled": 30,
        "compared": 30,
        "restarted": 20,
        "taken over": 20,
        "pinned": 3,
    }
)
"""How often each of these must happen at least among a case's share of ten thousand operations."""

DRAFTS = Counter({"accepted": 200, "refused drafts": 40})
"""The same of drafted tokens that were right, and that were not."""

HEADS = Counter({"heads restored": 20})
"""The same of replies whose heads went on from what was stored."""


@pytest.mark.parametrize("operations", OPERATIONS)
@pytest.mark.parametrize("name", cases.CASES)
def test_thousands_of_operations_in_any_order(name: str, operations: int) -> None:
    """As `operate`. The whole form has a process of its own.

    MLX leaves a thread behind with each that used it and has ended, and wakes them all with each
    evaluation: behind some hundred caches of other tests that takes four times as long.
    """
    if operations <= SHORT:
        operate(name, operations)
        return
    ended = subprocess.run(
        [sys.executable, __file__, name, str(operations)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-20_000:]


def operate(name: str, operations: int) -> None:
    """Prompts of three families under two salts, replies, pins, cancelled streams, full budgets, failing
    disks, damaged files, restarts: nothing is ever out of its bounds, and no reply differs from cold.

    Which operations follow each other depends on the numbers in the collected tests, so what has not
    happened often enough in a case's share may still do so in five times as many operations again.
    """
    seen: Counter[str] = Counter()
    floors = FLOORS + DRAFTS if cases.CASES[name].drafts else Counter(FLOORS)
    if cases.CASES[name].head is not None:
        floors += HEADS
    is_short = operations <= SHORT
    if operations < 10_000:
        floors = Counter({what: least // 20 for what, least in floors.items()})
    if cases.CASES[name].quantized or cases.CASES[name].grow:
        del floors["taken over"]
    body = {"case": cases.CASES[name], "operations": 0, "seen": seen}
    machine = type(f"{name.title()}Machine", (CacheMachine,), body)
    share = operations // len(cases.CASES)
    how = settings(
        max_examples=max(4, share // STEPS[is_short]),  # the first is always the simplest one
        stateful_step_count=STEPS[is_short],
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    gc.collect()
    gc.freeze()  # what other tests have left would be looked through at every restart
    with counted_splits(seen):
        for again in itertools.count():  # hypothesis gives up on some examples on the way
            run_state_machine_as_test(seed(1000 * SEED + again)(machine), settings=how)
            rare = floors - seen
            if machine.operations >= (6 * share if rare else share):
                break
            if machine.operations >= share:
                how = settings(how, max_examples=4)
    assert not rare, f"{dict(rare)} too few in {machine.operations} operations"


if __name__ == "__main__":
    operate(sys.argv[1], int(sys.argv[2]))
