"""Rows of whole groups of tokens (DeepSeek V4.1): cut at any position, in memory, on disk and in small budgets."""

import mlx.core as mx
import numpy as np
import oracle
import pytest
import tiny
from hostile.families import deepseek_v41_ratios

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.caches import checkpoint as checkpoints
from mlx_hybridcache.caches.kinds.compressed import CompressedKind
from mlx_hybridcache.caches.layout import LEARNT_FROM, Layout, fresh_caches
from mlx_hybridcache.store.budget import Budget
from mlx_hybridcache.store.store import Store

RATIOS = (0, 4, 3, 16, 1)
"""A window alone; groups that end where a step does, that do not, that are longer than what a layout is
learnt from, and of single tokens."""

LENGTH, STEP = 150, 32
TEXT = oracle.prompt(LENGTH, seed=3, openers=[40])
OTHER = oracle.prompt(25, seed=6)
SETTINGS = {
    "memory_budget": "200MB",
    "memory_reserve": 0,
    "prefill_step_size": STEP,
    "checkpoint_every": STEP,
    "checkpoint_min_step": 16,
}


@pytest.fixture(scope="module")
def model():
    return tiny.made(lambda: deepseek_v41_ratios(*RATIOS))


@pytest.fixture(scope="module")
def layout(model):
    made = Layout.of(model, STEP)
    yield made
    made.release()


PROMPTS = [
    *(TEXT, TEXT, [*TEXT[:110], *OTHER]),
    *([*TEXT, *OTHER], [*TEXT[:110], *OTHER[9:]], [*TEXT[:110], *OTHER[17:]]),
]
"""A repeat, another ending, an extension, a second branch and a third."""


@pytest.fixture(scope="module")
def cold(model):
    """What plain caches say behind each prompt."""
    return [
        logits_behind(model, tiny.cold_caches(model, each[:-1], STEP), each) for each in PROMPTS
    ]


def opened(model, **settings):
    return HybridPromptCache(model, oracle.word_tokenizer(), **{**SETTINGS, **settings})


def logits_behind(model, caches, prompt):
    """Of the last token of a prompt and of some that follow, each read by itself: groups close on the way."""
    read_on = [prompt[-1], *TEXT[:20]]
    return np.array([tiny.next_logits(model, caches, token) for token in read_on])


def read(model, tokens):
    """Plain caches that have read `tokens` in slices of the step."""
    caches = fresh_caches(model)
    for at in range(0, len(tokens), STEP):
        model(mx.array([tokens[at : at + STEP]]), cache=caches)
        mx.eval([cache.state for cache in caches])
    return caches


def held(caches):
    """Every array of caches, and where they stand."""
    return [
        (cache.offset, *(None if x is None else np.array(x) for x in cache.state[:-1]))
        for cache in caches
    ]


def assert_same(found, expected):
    """An open group without tokens is as good as none."""
    for one, other in zip(held(found), held(expected), strict=True):
        for a, b in zip(one, other, strict=True):
            if b is None or np.size(b) == 0:
                assert a is None or np.size(a) == 0
            else:
                assert np.array_equal(a, b)


def test_each_layers_group_is_learnt(layout):
    """Also of 16 tokens, of which the layout's first forward reads half."""
    assert max(RATIOS) > LEARNT_FROM
    assert all(isinstance(kind, CompressedKind) for kind in layout.kinds)
    assert [kind.every for kind in layout.kinds] == [1, 4, 3, 16, 1]
    assert [len(kind.shapes) for kind in layout.kinds] == [0, 2, 2, 2, 2]
    assert not layout.unsupported


def test_the_layout_is_learnt_without_computing(model, layout):
    """As `plan` does, of models whose weights are not there."""
    assert Layout.traced(model, STEP).kinds == layout.kinds


@pytest.mark.parametrize("position", [1, 2, 3, 15, 16, 17, 47, 48, 64, 149])
def test_caches_stand_again_where_they_were_taken(model, layout, position):
    """Every array as it was, with rows in blocks that were cut anywhere."""
    caches = read(model, TEXT[:position])
    state = checkpoints.take(layout, caches, position)
    whole = checkpoints.take_rows(layout, caches, 0, position)
    for cut in {1, position // 3, position - 1} - {0, position}:
        blocks = [*whole.split(cut)]
        assert sum(block.nbytes for block in blocks) == whole.nbytes
        assert [block.nbytes for block in blocks] == [
            layout.rows_nbytes(0, cut),
            layout.rows_nbytes(cut, position),
        ]
        found = checkpoints.restore(
            layout, model, blocks, [*state.snapshots], position, 256, is_spent=False
        )
        assert_same(found, caches)


def test_a_snapshot_weighs_what_was_said_of_it(model, layout):
    """Once the window is full, whatever is open of a group; before that, less."""
    for position in (16, 17, 30, 31, 100):
        state = checkpoints.take(layout, read(model, TEXT[:position]), position)
        assert state.nbytes == layout.snapshot_bytes
    assert checkpoints.take(layout, read(model, TEXT[:5]), 5).nbytes < layout.snapshot_bytes


def test_what_is_read_on_has_the_bits_of_what_was_never_stored(model, layout):
    """Caches taken apart at 97 read the rest as those that were left alone do, a token at a time at the end."""
    alone = read(model, TEXT[:97])
    state, rows = (
        checkpoints.take(layout, alone, 97),
        checkpoints.take_rows(layout, alone, 0, 97),
    )
    again = checkpoints.restore(layout, model, [rows], [*state.snapshots], 97, 256, is_spent=False)
    for caches in (alone, again):
        model(mx.array([TEXT[97:140]]), cache=caches)
    for token in TEXT[140:]:
        logits = [tiny.next_logits(model, caches, token) for caches in (alone, again)]
        assert mx.array_equal(*logits).item()
    assert_same(again, alone)


@pytest.mark.parametrize(
    ("exact", "settings"),
    [(True, {}), (False, {}), (False, {"store_kv": 8, "store_state": "int8"})],
)
def test_prompts_that_come_back_are_read_from_where_they_part(
    model, cold, tmp_path, exact, settings
):
    """All but the third branch, from memory; and that one and two others from disk."""
    restored = []
    for order in (range(5), (5, 2, 3)):  # the second one begins inside what one file holds
        with opened(model, exact=exact, cache_dir=tmp_path, **settings) as cache:
            for prompt, expected in ((PROMPTS[at], cold[at]) for at in order):
                ready = cache.prefill(prompt)
                found = logits_behind(model, list(ready.prompt_cache), prompt)
                restored.append((ready.report.restored_tokens, ready.report.tier))
                ready.release()
                assert np.abs(found - expected).max() <= (0.0 if exact else 1e-5)
            assert cache.disk_stats().rejected == 0
    expected = [0, 128, 96, 128, 96] if exact else [0, 149, 96, 149, 110]
    assert [tokens for tokens, _ in restored[:5]] == expected
    assert restored[5] == (96 if exact else 110, "disk")


def test_room_is_made_for_all_that_is_stored(model, monkeypatch):
    """Also where a stretch closes more groups than its length says, as `[32, 64)` does of three tokens each."""
    made, stored = [], []
    has_room, keep = Store._has_room_for, Budget.keep

    def noted(store, nbytes, *more):
        made.append(nbytes)
        stored.append(0)
        return has_room(store, nbytes, *more)

    def added(budget, *, rows=0, snapshots=0):
        stored[-1] += rows + snapshots
        keep(budget, rows=rows, snapshots=snapshots)

    monkeypatch.setattr(Store, "_has_room_for", noted)
    monkeypatch.setattr(Budget, "keep", added)
    with opened(model) as cache:
        for prompt in PROMPTS:
            oracle.read(cache, prompt)
        assert cache.stats().rows_bytes + cache.stats().snapshot_bytes == sum(stored)
    assert len(made) > 10
    assert all(kept <= room for kept, room in zip(stored, made, strict=True))
    assert sum(kept == room for kept, room in zip(stored, made, strict=True)) > len(made) // 2


def test_nothing_is_drafted(model):
    """Going back inside a block would hold the rows before it and behind it, whose bytes nobody has claimed."""
    with opened(model) as cache:
        replies = [
            [each.token for each in cache.stream_generate(TEXT, 20, **options)]
            for options in ({}, {"draft_from_cache": True}, {"draft_from_cache": True})
        ]
        assert cache.last_report.drafted_tokens == 0
    assert replies[0] == replies[1] == replies[2]
