"""Replies that decode together: the bits of each are those it has alone, whoever joins and leaves."""

import random
from unittest import mock

import mlx.core as mx
import oracle
import pytest
import tiny
import tiny_models
from long import mostly_long
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.caches.room import REPLY_ROOM, ROW_STEP, request_rows
from mlx_hybridcache.decode.decoder import UNTAKEN
from mlx_hybridcache.decode.reply import Alone, Reply
from mlx_hybridcache.decode.sampling import Guard

BATCHED = (
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3",
    "qwen3_moe",
    "llama",
    "jamba",
    "mamba2",
    "granitemoehybrid",
    "falcon_h1",
    "deepseek_v3",
)
ALONE = ("gemma3_text", "gpt_oss", "llama4", "recurrent_gemma")


def new_cache(name, **settings):
    return HybridPromptCache(
        tiny.build(name),
        oracle.word_tokenizer(),
        memory_budget=settings.pop("memory_budget", "300MB"),
        prefill_step_size=64,
        checkpoint_every=64,
        checkpoint_min_step=16,
        **settings,
    )


def batches(cache):
    """The sizes of the batches that the model decodes meanwhile."""
    return oracle.batch_sizes(cache.engine.model)


def same(replies, expected):
    assert [r.token for r in replies] == [r.token for r in expected]
    for reply, other in zip(replies, expected, strict=True):
        assert oracle.agree(reply.logprobs, other.logprobs)


def together(cache, requests):
    """Start every request, then read them to their ends, in turns of one token."""
    running = [
        cache.stream_generate(prompt, count, **options) for prompt, count, options in requests
    ]
    replies = [[] for _ in running]
    while running_now := [
        (reply, one)
        for reply, one, request in zip(replies, running, requests, strict=True)
        if len(reply) < request[1]
    ]:
        for reply, one in running_now:
            reply.append(next(one))
    assert [next(one, None) for one in running] == [None] * len(running)
    return replies


def requests_of(lengths, counts, **options):
    options = {"sampler": oracle.never_ending, "seed": 0} | options
    return [
        (oracle.prompt(length, seed=length), count, options)
        for length, count in zip(lengths, counts, strict=True)
    ]


@pytest.mark.parametrize(
    "name", mostly_long(BATCHED, ("qwen3_next", "qwen3", "mamba2", "deepseek_v3"))
)
def test_replies_have_the_same_bits_in_a_batch_as_alone(name):
    """Four prompts of 60 to 100 tokens, replies of 5 to 30: they join and leave at their own times."""
    requests = requests_of((60, 75, 90, 100), (30, 5, 12, 20))
    with new_cache(name) as cache, batches(cache) as sizes:
        found = together(cache, requests)
        assert max(sizes) >= 3
        for (prompt, _, _), replies in zip(requests, found, strict=True):
            history = [*prompt, *(reply.token for reply in replies)]
            assert cache.lookup([*history, 1]).restored_tokens == len(history), "its end is kept"
    for (prompt, count, options), replies in zip(requests, found, strict=True):
        with new_cache(name) as cache:
            same(replies, list(cache.stream_generate(prompt, count, **options)))


@pytest.mark.parametrize("name", ALONE)
def test_models_whose_bits_a_batch_would_change_decode_one_by_one(name):
    """Windows: two replies at once, and no forward of two."""
    requests = requests_of((60, 75), (12, 12))
    with new_cache(name) as cache, batches(cache) as sizes:
        found = together(cache, requests)
        assert set(sizes) == {1}
    for (prompt, count, options), replies in zip(requests, found, strict=True):
        with new_cache(name) as cache:
            same(replies, list(cache.stream_generate(prompt, count, **options)))


def test_exact_mode_decodes_one_by_one():
    """No forward of two."""
    with new_cache("qwen3_next", exact=True) as cache, batches(cache) as sizes:
        together(cache, requests_of((60, 75), (12, 12)))
        assert set(sizes) == {1}


def test_a_lone_reply_is_not_batched():
    """One request: every forward is of one."""
    with new_cache("qwen3_next") as cache, batches(cache) as sizes:
        together(cache, requests_of((60,), (12,)))
        assert set(sizes) == {1}


def test_many_experts_in_a_large_batch_have_the_same_bits(monkeypatch):
    """Eight replies, ten experts for each token: mlx-lm sorts them by expert from 64 on."""
    monkeypatch.setitem(tiny_models.EXPERTS, "num_experts", 16)
    monkeypatch.setitem(tiny_models.EXPERTS, "num_experts_per_tok", 10)
    model = tiny.fresh("qwen3_next")
    requests = requests_of(range(60, 100, 5), [12] * 8)
    found = []
    for chosen in (requests, *([request] for request in requests)):
        with HybridPromptCache(
            model, oracle.word_tokenizer(), memory_budget="300MB", prefill_step_size=64
        ) as cache:
            found.append(together(cache, chosen))
    for replies, (lone,) in zip(found[0], found[1:], strict=True):
        same(replies, lone)


def test_samplers_and_processors_stay_each_replys_own():
    """Seeds, temperatures and penalties in one batch: what each would draw alone."""
    requests = [
        (
            oracle.prompt(60 + seed, seed=seed),
            15,
            {
                "sampler": make_sampler(1.0, top_p=0.9) if seed % 2 else None,
                "seed": seed,
                "logits_processors": make_logits_processors({5: 2.0}, 1.2) if seed > 1 else None,
            },
        )
        for seed in range(4)
    ]
    with new_cache("qwen3_next") as cache:
        found = [list(replies) for replies in together(cache, [(p, 6, o) for p, _, o in requests])]
    for (prompt, _, options), replies in zip(requests, found, strict=True):
        with new_cache("qwen3_next") as cache:
            expected = [
                next(g) for g in [cache.stream_generate(prompt, 6, **options)] for _ in "x" * 6
            ]
        same(replies, expected)


def test_a_sampled_reply_is_the_one_that_mlx_lm_draws_with_its_seed():
    """Each token with the next random numbers of the stream that the seed begins."""
    options = {"sampler": make_sampler(1.0), "seed": 7}
    with new_cache("qwen3_next") as cache:
        plain, found = (
            [each.token for each in cache.stream_generate([1, 2, 3], 12, use_cache=how, **options)]
            for how in (False, True)
        )
    assert found == plain


def test_an_error_in_one_reply_ends_that_reply_only():
    """A sampler that raises at its fourth token; its neighbour's bits do not change."""
    calls = []

    def fails(logprobs):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("broken sampler")
        return oracle.never_ending(logprobs)

    prompt, other = oracle.prompt(60, seed=1), oracle.prompt(70, seed=2)
    options = {"sampler": oracle.never_ending, "seed": 0}
    with new_cache("qwen3_next") as cache:
        broken = cache.stream_generate(other, 10, sampler=fails, seed=0)
        fine = cache.stream_generate(prompt, 10, **options)
        replies = [next(fine)]
        heard = [next(broken), next(broken), next(broken)]
        with pytest.raises(RuntimeError, match="broken sampler"):
            next(broken)
        replies += list(fine)
        assert cache.stats().running_bytes == 0
    with new_cache("qwen3_next") as cache:
        same(replies, list(cache.stream_generate(prompt, 10, **options)))
        same(heard, list(cache.stream_generate(other, 3, **options)))


def test_a_client_that_takes_nothing_leaves_the_batch_and_comes_back():
    """Its reply waits on caches of its own, at most so many tokens ahead; then it goes on."""
    requests = requests_of((60, 70), (60, 60))
    with new_cache("qwen3_next") as cache, batches(cache) as sizes:
        (slow_prompt, count, options), (prompt, _, _) = requests
        slow = cache.stream_generate(slow_prompt, count, **options)
        first = next(slow)
        replies = list(cache.stream_generate(prompt, count, **options))
        assert max(sizes) == 2
        assert sum(sizes) < 60 + 16 + 2 * UNTAKEN + 10, "nobody decodes far ahead for it"
        rest = [first, *slow]
        assert cache.stats().running_bytes == 0
    for (prompt, count, options), found in zip(requests, (rest, replies), strict=True):
        with new_cache("qwen3_next") as cache:
            same(found, list(cache.stream_generate(prompt, count, **options)))


def test_a_batch_is_not_padded_beyond_what_it_holds():
    """900 tokens and 20: padding would cost more than both; they decode side by side."""
    requests = requests_of((900, 20, 25), (10, 10, 10))
    with new_cache("qwen3_next") as cache, batches(cache) as sizes:
        together(cache, requests)
        assert max(sizes) < 3


@pytest.mark.parametrize("seed", mostly_long(range(4), [0]))
def test_budget_and_claims_hold_whoever_comes_and_goes(seed):
    """Ten replies start, end early, are cancelled, under a small budget: never above it, all freed."""
    chance = random.Random(seed)
    with new_cache("qwen3_next", memory_budget="6MB") as cache:
        running, used = [], []
        for step in range(10):
            prompt = oracle.prompt(chance.randint(30, 120), seed=step % 5)
            options = {"sampler": oracle.never_ending, "seed": 0}
            running.append(cache.stream_generate(prompt, chance.randint(2, 40), **options))
            for one in list(running):
                for _ in range(chance.randint(1, 6)):
                    if next(one, None) is None:
                        running.remove(one)
                        break
            used.append(cache.stats())
            if len(running) > 3:
                running.pop(chance.randrange(len(running))).close()
        for one in running:
            one.close()
        assert all(stats.held_bytes <= stats.budget_bytes for stats in used)
        assert max(stats.running_bytes for stats in used) > 0
        assert cache.stats().running_bytes == 0
        mx.synchronize()


def test_a_batch_claims_what_it_holds_when_its_longest_reply_has_left():
    """Of 100 tokens and 60: padding that only the first needed goes from the buffers and from the claim."""
    first, second = requests_of((100, 60), (4, 30))
    with new_cache("qwen3_next") as cache:
        running = [
            cache.stream_generate(p, count, **options) for p, count, options in (first, second)
        ]
        list(running[0])
        assert len(cache.engine.decoder._merged.replies) == 1

        def held_and_claimed():
            caches = cache.engine.decoder._merged.batch.caches
            return sum(each.nbytes for each in caches), cache.stats().running_bytes

        held, claimed = cache.worker.call(held_and_claimed)
        assert held == claimed
        list(running[1])


def test_a_batch_keeps_what_its_replies_were_granted():
    """Others take whatever is free, now and when one of three has ended: the two that are left grow to their ends."""
    counts = 400, 600, 600
    requests = requests_of((300, 301, 302), counts)
    with new_cache("qwen3", memory_budget="8MB") as cache, batches(cache) as sizes:
        layout, store = cache.engine.layout, cache.engine.tiers.memory
        passing = 3 * layout.largest_buffer_bytes(1024)  # old buffers, while new ones are made
        granted = [layout.running_bytes(request_rows(300, count)) for count in counts]

        def take_what_is_free():
            free = store.budget.limit_bytes - store.budget.used_bytes
            return store.claim(free - passing)

        def left_to(count):
            """What the last `count` hold: what they were granted, or what their caches weigh if it is more."""
            holds = cache.stats().running_bytes - sum(claim.nbytes for claim in claims)
            weighs = count * layout.running_bytes(cache.engine.decoder._merged.capacity)
            return holds == max(sum(granted[-count:]), weighs)

        running = [cache.stream_generate(p, count, **options) for p, count, options in requests]
        replies = [[next(one), next(one)] for one in running]
        assert max(sizes) == 3
        claims = [cache.worker.call(take_what_is_free)]
        while len(replies[0]) < counts[0]:
            assert len(replies[0]) > counts[0] - UNTAKEN - 2 or left_to(
                3
            )  # its last ones are made ahead
            for reply, one in zip(replies, running, strict=True):
                reply.append(next(one))
        assert next(running[0], None) is None
        claims.append(cache.worker.call(take_what_is_free))
        assert left_to(2)
        for one, count in zip(running[1:], counts[1:], strict=True):
            assert len(list(one)) == count - counts[0]
        for claim in claims:
            cache.worker.call(claim.release)
        assert cache.stats().running_bytes == 0


@pytest.mark.parametrize(
    ("written", "left", "more"),
    [(0, -1, ROW_STEP), (1000, -1, 1024), (20_000, -1, REPLY_ROOM), (1000, 300, 512)],
)
def test_a_lone_reply_grows_by_as_much_as_it_has_written(written, left, more):
    """Rounded to 256 rows, no more than 8,192 at once, and no more than it may still write."""
    reply = Reply(60, (), left, mock.Mock(), Guard(), None, read=[5] * written)
    assert Alone(mock.Mock(), reply).more_rows == more
