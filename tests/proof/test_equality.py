"""Hot equals cold: every point that a cache can restore, for every layer kind, against the oracle."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx_lm
import oracle
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from long import forms, mostly_long
from oracle import OPENER, STEP

from mlx_hybridcache import HybridPromptCache

BLOCKED = ("falcon_h1", "mamba2", "granitemoehybrid")
BLOCK = 256

# A single token is read by another path than a slice: past a window the ring is summed out of
# temporal order, and multi-head latent attention folds a projection into the query.
SINGLE_TOKENS_ROUND = ("gemma3_text", "recurrent_gemma", "gpt_oss", "deepseek_v3")

ONE_PER_KIND = (
    "qwen3_next",
    "jamba",
    "recurrent_gemma",
    "gemma3_text",
    "gpt_oss",
    "llama4",
    "qwen3",
    "deepseek_v3",
)
"""Captured, paused, recurrent beside a window, windows without and with sinks, chunked, rows, MLA."""

PLAIN = [name for name in tiny.FAMILIES if name not in BLOCKED]
WAYS = [(name, False) for name in PLAIN] + [("qwen3_next", True)]


def each_way(always: Iterable[str]) -> pytest.MarkDecorator:
    """Every family, and one that is paused; `always` are those that the short form has beside that one."""
    return pytest.mark.parametrize(
        ("name", "paused"),
        mostly_long(WAYS, [*((name, False) for name in always), ("qwen3_next", True)]),
        ids=[name + "-paused" * paused for name, paused in WAYS],
    )


SOME_KINDS = ("qwen3_next", "gemma3_text", "qwen3", "deepseek_v3")
each_kind = pytest.mark.parametrize("name", mostly_long(ONE_PER_KIND, SOME_KINDS))

LENGTHS = (1, 63, 64, 65, 2 * STEP - 1, 2 * STEP, 2 * STEP + 1, 4 * STEP + 9)
LENGTHS_WITH_A_SINGLE_TOKEN = (2, STEP + 2, 2 * STEP + 2)
"""Prompts whose last slice, the prompt's end less one, is a single token."""

# Positions of the base prompt's checkpoints are 16, 32, 64, 128, 192 and 199.
BRANCHES = (1, 15, 16, 17, 33, 63, 64, 65, 101, 127, 128, 129, 198, 199)
TURNS = (1, 15, 16, 17, 33, 47, 63, 64, 65, 78, 79, 80)


@contextlib.contextmanager
def new_cache(name: str, *, paused: bool = False, **how: object) -> Iterator[HybridPromptCache]:
    with oracle.new_cache(tiny.build(name), paused=paused, **how) as cache:
        yield cache


def small_budget(name: str) -> int:
    """Room for one running request of 256 tokens, its rows and a handful of checkpoints."""
    with new_cache(name) as cache:
        layout = cache.engine.layout
    return layout.running_bytes(256) + 7 * layout.snapshot_bytes + 300 * layout.row_bytes


@each_way(ONE_PER_KIND)
def test_every_point_of_a_prompt_of_any_length_equals_cold(name: str, paused: bool) -> None:
    """Prompts of 1 and of 63 to 265 tokens, steps of 64: all their points have cold's bits."""
    single = () if name in SINGLE_TOKENS_ROUND else LENGTHS_WITH_A_SINGLE_TOKEN
    with new_cache(name, paused=paused) as cache:
        lengths = (*LENGTHS, *single)
        prompts = [oracle.prompt(n, seed=n) for n in lengths]
        oracle.assert_equal_bits(
            oracle.check(cache, [oracle.read(cache, each) for each in prompts])
        )


@pytest.mark.parametrize("name", SINGLE_TOKENS_ROUND)
def test_prompts_that_end_one_token_into_a_slice_read_the_same(name: str) -> None:
    """2, 66 and 130 tokens: a slice of one token may round otherwise, by less than 1e-4."""
    with new_cache(name) as cache:
        prompts = [oracle.prompt(n, seed=n) for n in LENGTHS_WITH_A_SINGLE_TOKEN]
        read = [oracle.read(cache, each) for each in prompts]
        oracle.assert_same_reading(oracle.check(cache, read))


@each_way(SOME_KINDS)
def test_branches_at_every_offset_equal_cold(name: str, paused: bool) -> None:
    """A 200-token prompt left at 1, at checkpoints, at slice ends, one beside them, and in runs."""
    with new_cache(name, paused=paused) as cache:
        base = oracle.prompt(200, seed=1)
        read = [oracle.read(cache, base)]
        read += [
            oracle.read(cache, [*base[:at], *oracle.prompt(30, seed=100 + at)]) for at in BRANCHES
        ]
        # Latent attention reads the one token from 127 to the end of the slice otherwise.
        _assert_equal(name, oracle.check(cache, read), rounds=name == "deepseek_v3")


@each_way(SOME_KINDS)
def test_turn_cuts_at_every_offset_equal_cold(name: str, paused: bool) -> None:
    """80-token prompts with one turn, opening anywhere from the first token to the last."""
    with new_cache(name, paused=paused) as cache:
        prompts = [oracle.prompt(80, seed=at, openers=[at - 1]) for at in TURNS]
        read = [oracle.read(cache, each) for each in prompts]
        if cache.engine.layout.needs_snapshots:
            cuts = {tuple(tokens) for tokens in cache.checkpoints()}
            worth = range(cache.engine.prefill.grid.first_worth, 80)
            assert all(
                tuple(p[:at]) in cuts for p, at in zip(prompts, TURNS, strict=True) if at in worth
            )
        # A pause one token beside another cut leaves a single token to read.
        _assert_equal(name, oracle.check(cache, read), rounds=cache.engine.layout.must_pause)


@each_kind
def test_turns_on_every_token_equal_cold(name: str) -> None:
    """150 tokens of which every third opens a turn: the gap bounds the cuts, all have cold's bits."""
    with new_cache(name) as cache:
        tokens = oracle.prompt(150, seed=3, openers=range(0, 150, 3))
        oracle.assert_equal_bits(oracle.check(cache, [oracle.read(cache, tokens)]))


@each_kind
def test_declared_boundaries_equal_cold(name: str) -> None:
    """Boundaries at 5, 70 and 71 of 120 tokens are restored with cold's bits."""
    with new_cache(name) as cache:
        tokens = oracle.prompt(120, seed=4)
        cache.prefill(tokens, max_tokens=1, boundaries=[5, 70, 73]).release()
        points = oracle.check(cache, [tokens[:-1]], positions=[5, 70, 73])
        assert {5, 70, 73} <= {point.position for point in points}
        oracle.assert_equal_bits(points)


@each_way(SOME_KINDS)
def test_states_made_by_decoding_equal_cold(name: str, paused: bool) -> None:
    """After 70 tokens 20 are decoded and the end is saved: all points have cold's bits.

    Where single tokens round otherwise, a point whose state was decoded is within 1e-4.
    """
    with new_cache(name, paused=paused) as cache:
        history = oracle.decode(cache, oracle.prompt(70, seed=5), count=20)
        longer = oracle.decode(cache, [*history, *oracle.prompt(15, seed=6)], count=3)
        points = oracle.check(cache, [history, longer])
        assert len(history) in {point.position for point in points}
        _assert_equal(name, points, rounds=True)


@each_kind
def test_going_on_by_single_tokens_equals_cold(name: str) -> None:
    """Behind every point of a 140-token prompt the next tokens are read one by one."""
    with new_cache(name) as cache:
        read = [oracle.read(cache, oracle.prompt(140, seed=7, openers=[50, 90]))]
        _assert_equal(name, oracle.check(cache, read, singly=True), rounds=True)


@each_kind
def test_what_outlives_evictions_equals_cold(name: str) -> None:
    """Nine prompts and branches in a budget for about two: whatever is left has cold's bits."""
    with new_cache(name, memory_budget=small_budget(name)) as cache:
        read = []
        for seed in (1, 2, 3):
            base = oracle.prompt(150, seed=seed, openers=[40, 100])
            read.append(oracle.read(cache, base))
            read += [
                oracle.read(cache, [*base[:at], *oracle.prompt(40, seed=50 * seed + at)])
                for at in (64, 110)
            ]
            oracle.assert_equal_bits(oracle.check(cache, read))
        assert cache.stats().evictions > 0


@each_kind
def test_splits_leave_both_halves_equal_to_cold(name: str) -> None:
    """One run of 120 tokens split at 40, then at 20 and 60; restored twice, since nothing is used up."""
    with new_cache(name, checkpoint_every=4 * STEP, checkpoint_min_step=4 * STEP) as cache:
        base = oracle.prompt(120, seed=8)
        read = [oracle.read(cache, base)]
        for at in (40, 20, 60):
            before = cache.stats().nodes
            read.append(oracle.read(cache, [*base[:at], *oracle.prompt(20, seed=at)]))
            assert cache.stats().nodes > before
        for _ in range(2):
            oracle.assert_equal_bits(oracle.check(cache, read))


def test_windows_of_which_every_row_is_stored_equal_cold_anywhere() -> None:
    """`swa_full`: a 200-token prompt and branches at five offsets, restored at any position."""
    with new_cache("gemma3_text", swa_full=True) as cache:
        base = oracle.prompt(200, seed=1)
        read = [oracle.read(cache, base)]
        read += [
            oracle.read(cache, [*base[:at], *oracle.prompt(30, seed=at)])
            for at in (1, 33, 64, 102, 199)
        ]
        oracle.assert_equal_bits(oracle.check(cache, read))


@each_kind
def test_two_requests_read_in_turns_equal_cold(name: str) -> None:
    """Two 150-token prompts with 70 tokens in common, advanced slice by slice in turns."""
    shared = oracle.prompt(70, seed=9)
    prompts = [[*shared, *oracle.prompt(80, seed=seed)] for seed in (10, 11)]
    with oracle.new_cache(tiny.build(name), tokenizer=oracle.word_tokenizer()) as cache:
        both = [cache.stream_generate(prompt, max_tokens=4) for prompt in prompts]
        replies = [[piece.token for piece in each] for each in both]
        read = [[*p, *reply] for p, reply in zip(prompts, replies, strict=True)]
        _assert_equal(name, oracle.check(cache, read), rounds=True)


@pytest.mark.parametrize(
    "name",
    mostly_long(["qwen3_next", "gemma3_text", "qwen3", "mamba2"], ["qwen3_next", "gemma3_text"]),
)
def test_a_reply_that_fails_midway_leaves_no_wrong_state(name: str) -> None:
    """A logits processor that raises at the fifth token: what is stored still agrees with cold."""
    seen: list[int] = []

    def failing(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.shape[-1])
        if len(seen) == 5:
            raise RuntimeError("the processor's own")
        return logits

    tokens, reply = oracle.prompt(70, seed=12), []
    with oracle.new_cache(tiny.build(name), tokenizer=oracle.word_tokenizer()) as cache:
        pieces = cache.stream_generate(tokens, max_tokens=9, logits_processors=[failing])
        with pytest.raises(RuntimeError, match="own"):
            reply.extend(piece.token for piece in pieces)
        oracle.assert_same_reading(oracle.check(cache, [[*tokens, *reply, 3, 4]]))


def test_a_forward_that_fails_between_two_layers_leaves_no_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the fifth token the attention raises, when the two recurrent layers below have read it already:
    what is stored ends where the prompt does.
    """
    model, tokens, singles = tiny.build("qwen3_next"), oracle.prompt(70, seed=12), [0]
    attention = type(model.layers[-1].self_attn)
    original = attention.__call__

    def failing(self: Any, x: mx.array, *args: Any, **options: Any) -> mx.array:
        singles[0] += x.shape[1] == 1
        if singles[0] == 5:
            raise RuntimeError("the attention's own")
        return original(self, x, *args, **options)

    with oracle.new_cache(model, tokenizer=oracle.word_tokenizer()) as cache:
        monkeypatch.setattr(attention, "__call__", failing)
        with pytest.raises(RuntimeError, match="own"):
            list(cache.stream_generate(tokens, 9, sampler=oracle.never_ending, seed=0))
        monkeypatch.undo()
        oracle.assert_equal_bits(oracle.check(cache, [tokens]))
        assert cache.stats().running_bytes == 0


@pytest.mark.parametrize("name", mostly_long(BLOCKED, ["mamba2"]))
def test_blocked_layers_equal_cold_at_their_blocks_and_read_the_same_elsewhere(name: str) -> None:
    """600 tokens and branches at 100, 256, 300 and 512: bits at multiples of 256, 1e-4 elsewhere."""
    with new_cache(name, prefill_step_size=BLOCK) as cache:
        base = oracle.prompt(600, seed=13)
        read = [oracle.read(cache, base)]
        read += [
            oracle.read(cache, [*base[:at], *oracle.prompt(20, seed=at)])
            for at in (100, 256, 300, 512)
        ]
        points = oracle.check(cache, read)
        on_block = [point for point in points if point.position % BLOCK == 0]
        assert len({point.position for point in on_block}) == 2
        oracle.assert_equal_bits(on_block)
        oracle.assert_same_reading(points)


@pytest.mark.parametrize("name", mostly_long(BLOCKED, ["mamba2"]))
def test_blocked_layers_read_the_same_after_decoding(name: str) -> None:
    """270 tokens and 12 decoded ones: every point within 1e-4."""
    with new_cache(name, prefill_step_size=BLOCK) as cache:
        history = oracle.decode(cache, oracle.prompt(270, seed=14), count=12)
        oracle.assert_same_reading(oracle.check(cache, [history]))


# Generated prompts: each is new, or leaves an earlier one at some offset.

plans = st.lists(
    st.tuples(
        st.integers(0, 3),  # which earlier prompt it leaves
        st.integers(0, 200),  # where
        st.integers(1, 2 * STEP + 2),  # tokens of its own
        st.lists(st.integers(0, 300), max_size=4),  # where turns open
        st.integers(0, 2),  # tokens decoded behind it
    ),
    min_size=1,
    max_size=4,
)


def run_plan(
    cache: HybridPromptCache, plan: Sequence[tuple[int, int, int, list[int], int]]
) -> list:
    read: list[list[int]] = []
    for seed, (which, at, own, turns, decoded) in enumerate(plan):
        left = read[which % len(read)][:at] if read else []
        tokens = [*left, *oracle.prompt(own, seed=seed + 20)]
        for turn in turns:
            if len(left) <= turn < len(tokens):
                tokens[turn] = OPENER
        read.append(
            oracle.decode(cache, tokens, decoded) if decoded else oracle.read(cache, tokens)
        )
    return [history for history in read if history]


def generated(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


EXAMPLES = forms(5, 20)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_generated_prompts_equal_cold_for_recurrent_layers(examples: int) -> None:
    """Qwen3-Next, captured and paused: up to four prompts that branch, take turns and decode."""

    @given(plan=plans, paused=st.booleans(), every=st.sampled_from([STEP, 2 * STEP]))
    @generated(examples)
    def each(plan: list[tuple[int, int, int, list[int], int]], paused: bool, every: int) -> None:
        with new_cache("qwen3_next", paused=paused, checkpoint_every=every) as cache:
            points = oracle.check(cache, run_plan(cache, plan))
            if points:  # a prompt of one token leaves nothing to restore
                oracle.assert_equal_bits(points)

    each()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_generated_prompts_equal_cold_for_windows(examples: int) -> None:
    """Gemma 3: cold's bits where every slice had two tokens or more, else within 1e-4."""
    model = tiny.build("gemma3_text")

    @given(plan=plans)
    @generated(examples)
    def each(plan: list[tuple[int, int, int, list[int], int]]) -> None:
        with oracle.new_cache(model) as cache:
            with oracle.forwards(model) as lengths:
                read = run_plan(cache, plan)
            points = oracle.check(cache, read)
            if points:
                _assert_equal("gemma3_text", points, rounds=1 in lengths)

    each()


# What a user sees


def plain_reply(name: str, tokens: list[int], count: int) -> list[tuple[int, mx.array]]:
    pieces = mlx_lm.stream_generate(
        tiny.build(name),
        oracle.word_tokenizer(),
        tokens,
        max_tokens=count,
        prefill_step_size=STEP,
    )
    return [(piece.token, piece.logprobs) for piece in pieces]


@pytest.mark.parametrize(
    ("name", "paused"),
    mostly_long([("qwen3_next", False), ("qwen3_next", True)], [("qwen3_next", False)]),
)
def test_a_hot_reply_is_mlx_lms_own(name: str, paused: bool) -> None:
    """24 greedy tokens and their log-probabilities: cold, repeated, continued and branched alike."""
    first = oracle.prompt(200, seed=15, openers=[0, 120])
    model, tokenizer = tiny.build(name), oracle.word_tokenizer()
    with oracle.new_cache(model, tokenizer=tokenizer, paused=paused) as cache:
        reply = [token for token, _ in plain_reply(name, first, 24)]
        requests = [
            (first, 0),
            (first, 199),
            ([*first, *reply, *oracle.prompt(20, seed=16)], 200 + len(reply)),
            ([*first[:150], *oracle.prompt(30, seed=17)], 128),
            ([*first[:150], *oracle.prompt(9, seed=18)], 150),
            (first[:121], 64),
        ]
        for tokens, restored in requests:
            hot = cache.stream_generate(tokens, max_tokens=24)
            pieces = [(piece.token, piece.logprobs) for piece in hot]
            assert hot.report.restored_tokens == restored
            cold = plain_reply(name, tokens, 24)
            assert [token for token, _ in pieces] == [token for token, _ in cold]
            for (_, one), (_, other) in zip(pieces, cold, strict=True):
                assert oracle.agree(one, other)


def _assert_equal(name: str, points: Sequence[oracle.Point], *, rounds: bool) -> None:
    """Equal bits, or equal readings where a single token was read by a family that rounds there."""
    if rounds and name in SINGLE_TOKENS_ROUND:
        oracle.assert_same_reading(points)
    else:
        oracle.assert_equal_bits(points)
