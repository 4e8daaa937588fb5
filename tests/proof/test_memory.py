"""Memory: the budget holds at every sampled moment, and what is reported is what is held."""

import gc
import random
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import oracle
import pytest
import tiny
from long import forms
from odd_models.wide import wide_model
from state_machine import bounds

from mlx_hybridcache import BudgetError, HybridPromptCache
from mlx_hybridcache.caches import room
from mlx_hybridcache.decode import reply

CONVERSATIONS = forms(25, 50)
BUDGET = 12_000_000
UNREPORTED = BUDGET // 100
"""Bytes that MLX may hold beyond or short of what is reported: 1 % of the budget."""


def new_cache(budget: int, model: nn.Module | None = None) -> HybridPromptCache:
    return oracle.new_cache(
        wide_model() if model is None else model,
        tokenizer=oracle.word_tokenizer(),
        memory_budget=budget,
    )


class Samples:
    """Reported and active bytes, read together on the thread that allocates, between its steps."""

    def __init__(self, cache: HybridPromptCache):
        self.cache = cache
        self.claimed_ahead = cache.engine.layout.snapshot_bytes
        gc.collect()
        mx.clear_cache()
        self.baseline = mx.get_active_memory() - cache.stats().held_bytes
        self.count = 0
        self.most_off = 0
        self.most_held = 0

    def take(self, read: int = 1, total: int = 0) -> None:
        """One sample. With nothing read yet the running states are claimed, but not made."""
        held = self.cache.stats().held_bytes
        active = mx.get_active_memory() - self.baseline
        assert held <= BUDGET
        assert active - held <= UNREPORTED, f"{active - held:,} bytes are held unreported"
        ahead = self.claimed_ahead if read == 0 else 0
        assert held - active <= UNREPORTED + ahead, f"{held - active:,} bytes are not there"
        self.count += 1
        self.most_off = max(self.most_off, abs(active - held) - ahead)
        self.most_held = max(self.most_held, held)

    def between_steps(self) -> None:
        """The same from the reader's thread."""
        self.cache.worker.call(self.take)  # two public calls would not see one moment


def conversations(count: int) -> Iterator[list[int]]:
    """Prompts: new ones, next turns and changed endings of the last few."""
    chance = random.Random(2)
    recent: list[list[int]] = []
    for seed in range(count):
        kind = chance.choice(["new", "next turn", "changed ending"]) if recent else "new"
        tokens = oracle.prompt(chance.randint(40, 130), seed=seed, openers=[3, 30])
        if kind == "next turn":
            tokens = [*chance.choice(recent), *tokens[:50]]
        elif kind == "changed ending":
            earlier = chance.choice(recent)
            tokens = [*earlier[: chance.randint(1, len(earlier))], *tokens[:30]]
        recent = [*recent[-3:], tokens]
        yield tokens


@pytest.mark.parametrize("count", CONVERSATIONS)
def test_conversations_stay_inside_a_small_budget_and_answer_as_cold(count: int) -> None:
    """12 MB, 25 or 50 prompts of 40 to 280 tokens: at each sampled moment the reported bytes are at most
    the budget and within 1 % of it of what MLX holds beside the model; every reply equals cold.
    """
    with new_cache(BUDGET) as cache:
        samples = Samples(cache)
        restored = 0
        for tokens in conversations(count):
            hot = cache.stream_generate(tokens, 6, prompt_progress_callback=samples.take)
            reply, logprobs = [], []
            for piece in hot:
                reply.append(piece.token)
                logprobs.append(piece.logprobs)
                samples.between_steps()
            restored += hot.report.restored_tokens > 0
            assert_cold_reply(tokens, reply, logprobs)
            del logprobs, piece
        assert cache.stats().evictions > (count - 25) * 4 // 5
        assert restored > count * 2 // 5
        assert samples.count > 6 * count
        assert samples.most_held > 0.9 * BUDGET


def assert_cold_reply(tokens: list[int], reply: list[int], logprobs: list[mx.array]) -> None:
    """The reply's own tokens, read cold, give the log-probabilities that the reply came with."""
    cold = mx.array(oracle.cold_logits(wide_model(), [*tokens, *reply])[len(tokens) - 1 : -1])
    cold = cold - mx.logsumexp(cold, axis=-1, keepdims=True)
    assert cold.argmax(axis=-1).tolist() == reply
    for one, other in zip(cold, logprobs, strict=True):
        assert oracle.agree(one, other)


def test_requests_under_way_together_stay_inside_the_budget() -> None:
    """Three replies of 12 tokens advanced in turns: their caches count beside the store."""
    with new_cache(BUDGET) as cache:
        samples = Samples(cache)
        replies = [
            cache.stream_generate(
                oracle.prompt(90, seed=seed), 12, prompt_progress_callback=samples.take
            )
            for seed in range(60, 63)
        ]
        for pieces in zip(*replies, strict=False):
            assert len(pieces) == 3
            held = cache.stats()
            assert held.running_bytes > 0
            assert held.held_bytes <= BUDGET
        for reply in replies:
            reply.close()
        assert cache.stats().running_bytes == 0
        assert samples.count >= 9


def test_caches_handed_out_count_until_they_are_released() -> None:
    """Two `Ready`s of 100 tokens: their bytes are claimed, and given back by `release` or `del`."""
    with new_cache(BUDGET) as cache:
        first = cache.prefill(oracle.prompt(100, seed=1), max_tokens=100)
        one = cache.stats().running_bytes
        second = cache.prefill(oracle.prompt(100, seed=2), max_tokens=100)
        assert cache.stats().running_bytes == 2 * one > 0
        first.release()
        assert cache.stats().running_bytes == one
        del second
        gc.collect()
        assert cache.stats().running_bytes == 0


def test_a_budget_smaller_than_one_checkpoint_is_refused() -> None:
    """One checkpoint of 265 KiB in a budget of 200 KB: refused at once, with both sizes."""
    with pytest.raises(BudgetError, match=r"195\.3 KiB.*need"):
        new_cache(200_000)


def smallest_budget() -> int:
    """One running request of 256 tokens, one checkpoint and 256 tokens' rows."""
    with new_cache(BUDGET) as cache:
        layout = cache.engine.layout
    return layout.running_bytes(256) + layout.snapshot_bytes + 256 * layout.row_bytes


def test_the_smallest_accepted_budget_serves_and_stores() -> None:
    """One running request of 256 tokens and one checkpoint: a repeat of 100 tokens is restored."""
    smallest = smallest_budget()
    with pytest.raises(BudgetError):
        new_cache(smallest - 1)
    tokens = oracle.prompt(100, seed=3)
    with new_cache(smallest) as cache:
        for _ in range(2):
            oracle.read(cache, tokens)
            assert cache.stats().held_bytes <= smallest
            assert cache.lookup(tokens).restored_tokens == 99


@pytest.mark.parametrize("length", [192, 193, 200])
def test_a_reply_never_needs_more_than_was_claimed_for_it(length: int) -> None:
    """A prompt and a reply that fill 256 rows to the last get by with the claim for 256 rows."""
    with new_cache(smallest_budget()) as cache:
        tokens = oracle.prompt(length, seed=4)
        *_, last = cache.stream_generate(tokens, 256 - length, sampler=oracle.never_ending)
        assert (last.finish_reason, last.generation_tokens) == ("length", 256 - length)


def test_a_request_larger_than_the_budget_is_refused_and_loses_nothing() -> None:
    """12,000 tokens ask for 12 MB of rows: `BudgetError`, and all that was stored is still there."""
    tokens = oracle.prompt(100, seed=5)
    with new_cache(BUDGET) as cache:
        oracle.read(cache, tokens)
        before = cache.stats(), cache.checkpoints()
        with pytest.raises(BudgetError, match="12,000,000"):
            next(cache.stream_generate(oracle.prompt(12_000, seed=6), 4))
        with pytest.raises(BudgetError, match="memory budget"):
            cache.prefill(oracle.prompt(12_000, seed=6))
        assert (cache.stats(), cache.checkpoints()) == before
        assert cache.lookup(tokens).restored_tokens == 99


def test_a_request_that_pins_leave_no_room_for_is_refused_and_loses_nothing() -> None:
    """4 MB pinned of 12, 7 MB more stored: a request for 9 MB is refused before anything goes."""
    with new_cache(BUDGET) as cache:
        for seed in range(9):
            oracle.read(cache, oracle.prompt(100, seed=seed))
        for seed in range(6):
            cache.pin(oracle.prompt(100, seed=seed))
        before = cache.checkpoints()
        with pytest.raises(BudgetError, match="pins"):
            cache.restore(oracle.prompt(8192, seed=10), max_tokens=2100)
        assert cache.checkpoints() == before


def test_pins_beyond_half_the_budget_are_refused() -> None:
    """Prompts of 100 tokens pin 372 KB each: sixteen fit into half of 12 MB, a seventeenth does not."""
    layout = new_cache(BUDGET).engine.layout
    each = layout.snapshot_bytes + 99 * layout.row_bytes
    fit = BUDGET // 2 // each
    with new_cache(BUDGET) as cache:
        for seed in range(fit + 1):
            oracle.read(cache, oracle.prompt(100, seed=seed))
            if seed < fit:
                assert cache.pin(oracle.prompt(100, seed=seed)) == 99
        with pytest.raises(BudgetError, match="half"):
            cache.pin(oracle.prompt(100, seed=fit))
        cache.unpin(oracle.prompt(100, seed=0))
        assert cache.pin(oracle.prompt(100, seed=fit)) == 99


def test_pinned_prompts_outlive_all_others() -> None:
    """One prompt pinned, then 40 others through a budget for eight: it is restored in full."""
    tokens = oracle.prompt(100, seed=0)
    with new_cache(BUDGET // 2) as cache:
        oracle.read(cache, tokens)
        cache.pin(tokens)
        for seed in range(1, 41):
            oracle.read(cache, oracle.prompt(70, seed=seed))
        assert cache.stats().evictions > 20
        assert cache.lookup(tokens).restored_tokens == 99
        assert cache.lookup(oracle.prompt(70, seed=1)).restored_tokens == 0
        oracle.assert_equal_bits(
            oracle.check(cache, [tokens, *(oracle.prompt(70, seed=seed) for seed in range(1, 41))])
        )


def test_rows_that_no_checkpoint_needs_do_not_pile_up() -> None:
    """Room for two checkpoints beside a request, 40 prompts that each leave the last one inside its
    run: the rows held are those of restorable prefixes and of at most 50 tokens more. Each prompt
    is restored at its end or where it parted from the last one.
    """
    with new_cache(smallest_budget() + 270_000) as cache:
        tokens = oracle.prompt(120, seed=0)
        for seed in range(1, 41):
            at = 70 + seed % 20
            tokens = [*tokens[:at], *oracle.prompt(120 - at, seed=seed)]
            oracle.read(cache, tokens)
            assert cache.lookup(tokens).restored_tokens in {at, 119}
            prefixes = {
                tuple(stored[:end])
                for stored in cache.checkpoints()
                for end in range(1, len(stored) + 1)
            }
            rows = cache.stats().rows_bytes // cache.engine.layout.row_bytes
            assert len(prefixes) <= rows <= len(prefixes) + 50


def test_a_reply_that_outgrows_the_budget_ends_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two requests' 256 rows and none to grow: a prompt of 200 gets 56 tokens, then `BudgetError`.

    The reader's thread, which gets the error with its traceback, can go on using MLX.
    """
    for module in (room, reply):
        monkeypatch.setattr(module, "REPLY_ROOM", 16)
    read: list[int] = []
    with new_cache(smallest_budget()) as cache:
        held = cache.prefill(oracle.prompt(100, seed=5), max_tokens=16)
        beside = cache.stats().running_bytes
        pieces = cache.stream_generate(oracle.prompt(200, seed=4), 100, sampler=oracle.never_ending)
        with pytest.raises(BudgetError):
            read.extend(piece.token for piece in pieces)
        assert len(read) == 56
        assert cache.stats().running_bytes == beside
        held.release()
    gc.collect()
    assert mx.ones(3).sum().item() == 3


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_reply_that_gets_what_fits_ends_with_length(
    monkeypatch: pytest.MonkeyPatch, *, use_cache: bool
) -> None:
    """The same with `best_effort`: 56 tokens, the last of which says `length`, and the next request is
    served.
    """
    for name in ("REPLY_ROOM", "FIRST_ROOM"):
        monkeypatch.setattr(room, name, 16)
    with new_cache(smallest_budget()) as cache:
        held = cache.prefill(oracle.prompt(100, seed=5), max_tokens=16)
        beside = cache.stats().running_bytes
        options: Any = {"sampler": oracle.never_ending, "use_cache": use_cache}
        prompt = oracle.prompt(200, seed=4)
        pieces = list(cache.stream_generate(prompt, -1, best_effort=True, **options))
        assert [piece.finish_reason for piece in pieces] == [None] * 55 + ["length"]
        assert cache.stats().running_bytes == beside
        held.release()
        assert len(list(cache.stream_generate(prompt, 20, **options))) == 20


@pytest.mark.parametrize("rows", forms((64, 350), (room.FIRST_ROOM, 1_500)))
def test_a_reply_of_unknown_length_claims_its_beginning_and_grows(
    rows: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 rows beside the prompt's 200, in the short form 64, then as many again as it has written; the tokens are
    those of a reply whose length was named.
    """
    first, length = rows
    monkeypatch.setattr(room, "FIRST_ROOM", first)
    with new_cache(BUDGET) as cache:
        prompt, options = oracle.prompt(200, seed=6), {"sampler": oracle.never_ending}
        named = [piece.token for piece in cache.stream_generate(prompt, length, **options)]
        claimed, tokens = [], []
        for piece in cache.stream_generate(prompt, length, best_effort=True, **options):
            tokens.append(piece.token)
            claimed.append(cache.engine.tiers.memory.budget.running_bytes)
        assert tokens == named
        assert claimed[0] == cache.engine.layout.running_bytes(room.rounded(200 + first))
        assert claimed[-2] >= cache.engine.layout.running_bytes(length + 200)
        assert len(set(claimed)) < 6


@pytest.mark.parametrize("name", ["wide", "llama", "gemma3_text"])
def test_a_restore_holds_no_more_for_a_moment_than_there_was_room_for(name: str) -> None:
    """A cold one, one at the end of 400 tokens, and ones in the middle of a run, each with room for 1,000
    more: MLX's peak stays within what the store had made room for.
    """
    model = wide_model() if name == "wide" else tiny.build(name)
    with new_cache(BUDGET, model) as cache:
        budget = bounds.WatchedBudget.of(cache.engine.tiers.memory.budget)
        tokens = oracle.prompt(400, seed=31)
        oracle.read(cache, tokens)
        for asked in (oracle.prompt(400, seed=32), tokens, tokens[:150], tokens[:50]):
            gc.collect()
            cache.worker.call(
                mx.synchronize
            )  # what was released is posted, and MLX lets go of it behind its work
            mx.clear_cache()
            before = budget.highest = budget.used_bytes
            with bounds.peak_of_mlx() as peak:
                ready = cache.restore(asked, max_tokens=1000)
            assert peak[0] <= budget.highest - before + 20_000
            ready.release()


def test_what_a_slice_has_taken_is_held_by_the_store_alone() -> None:
    """Three checkpoints of 265 KiB were just taken when the system lacks memory: they are gone at once."""
    off: list[int] = []

    def lack(read: int, total: int) -> None:
        if read == oracle.STEP:
            assert cache.engine.tiers.memory.stats().checkpoints == 3
            cache.engine.tiers.memory.shrink(BUDGET)
            mx.clear_cache()
            off.append(
                mx.get_active_memory() - baseline - cache.engine.tiers.memory.budget.used_bytes
            )

    with new_cache(BUDGET) as cache:
        gc.collect()
        mx.clear_cache()
        baseline = mx.get_active_memory()
        tokens = oracle.prompt(400, seed=33)
        cache.prefill(tokens, max_tokens=8, prompt_progress_callback=lack).release()
    assert off[0] < cache.engine.layout.snapshot_bytes // 2
