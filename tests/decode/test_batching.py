"""Which models decode in batches: those in which that was shown, with nobody the worse for it."""

import gc
import logging

import mlx.core as mx
import oracle
import pytest
import tiny
from long import mostly_long
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from odd_models import odd_batches

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.caches.layout import Layout
from mlx_hybridcache.decode import batch
from mlx_hybridcache.decode import batch_check as batching

GREEDY = {"sampler": oracle.never_ending, "seed": 0}


def new_cache(model, **settings):
    settings = {"memory_budget": "300MB", "checkpoint_min_step": 16} | settings
    return HybridPromptCache(
        model, oracle.word_tokenizer(), prefill_step_size=64, checkpoint_every=64, **settings
    )


def together(cache, requests):
    """Start every request, then take a token of each in turn until all have ended."""
    running = [
        cache.stream_generate(prompt, count, **options) for prompt, count, options in requests
    ]
    replies = [[] for _ in running]
    take_in_turn(running, replies)
    return replies, [one.report for one in running]


def take_in_turn(running, replies):
    """To the end of each, a token of each in turn."""
    waiting = list(zip(replies, running, strict=True))
    while waiting:
        for pair in list(waiting):
            response = next(pair[1], None)
            if response is None:
                waiting.remove(pair)
            else:
                pair[0].append(response)


def requests_of(lengths, count, options=GREEDY):
    return [(oracle.prompt(length, seed=length), count, options) for length in lengths]


def same(replies, expected):
    assert [r.token for r in replies] == [r.token for r in expected]
    for reply, other in zip(replies, expected, strict=True):
        assert oracle.agree(reply.logprobs, other.logprobs)


@pytest.mark.parametrize(
    "name",
    mostly_long(odd_batches.ODD, ["gpt_bigcode", "deepseek_v32", "gemma2, other head counts"]),
)
def test_models_that_compute_something_else_in_batches_decode_one_by_one(name, caplog):
    """Three prompts of unequal lengths at once, and a turn behind each: as one after another; said once."""
    model = odd_batches.build(name)
    requests = requests_of((40, 61, 75), 12)
    with caplog.at_level(logging.WARNING), new_cache(model) as cache:
        assert caplog.text.count("decoded one by one") == 1
        with oracle.batch_sizes(model) as sizes:
            found, _ = together(cache, requests)
            assert set(sizes) == {1}
        turns = [
            ([*prompt, *(reply.token for reply in replies), 5, 6, 7], 4, options)
            for (prompt, _, options), replies in zip(requests, found, strict=True)
        ]
        found += together(cache, turns)[0]
        assert caplog.text.count("decoded one by one") == 1
    with new_cache(model) as cache:
        for (prompt, count, options), replies in zip([*requests, *turns], found, strict=True):
            same(replies, list(cache.stream_generate(prompt, count, **options)))


class Mixing:
    """A real model in whose batches a little of every reply gets into the others."""

    def __init__(self, model):
        self.__dict__["model"] = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, inputs, cache=None):
        logits = self.model(inputs, cache=cache)
        return logits + 1e-6 * (logits.sum(axis=0, keepdims=True) - logits)


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "llama"])
def test_what_a_batch_changes_is_seen_however_little_it_is(name):
    """A millionth of its neighbours in each logit; the model itself may decode in batches."""
    model = tiny.build(name)
    layout = Layout.of(model)
    assert batching.shown(model, layout)
    assert not batching.shown(Mixing(model), layout)


def test_the_probe_is_cheap():
    """Two key-value heads: six tokens one by one, and six forwards more."""
    model = tiny.build("qwen3_next")
    layout = Layout.of(model)
    with oracle.batch_sizes(model) as sizes:
        assert batching.shown(model, layout)
    assert sorted(set(sizes)) == [1, 2, 3]
    assert len(sizes) == 12


def test_the_probe_leaves_the_random_stream_and_the_memory_alone():
    """What the caller draws next is what it would have drawn; nothing stays allocated."""
    model = tiny.build("qwen3_next")
    layout = Layout.of(model)
    mx.random.seed(5)
    expected = mx.random.uniform().item()
    mx.random.seed(5)
    gc.collect()  # what earlier tests left
    before = mx.get_active_memory()
    batching.shown(model, layout)
    assert mx.get_active_memory() == before
    assert mx.random.uniform().item() == expected


class Fault:
    """Makes forwards of several rows raise, once so many have been run."""

    def __init__(self, model, monkeypatch, after):
        self.left, self.raised = after, 0
        original = type(model).__call__

        def faulty(model, inputs, *args, **options):
            if inputs.shape[0] > 1:
                self.left -= 1
                if self.left < 0:
                    self.raised += 1
                    half = options["cache"][: len(options["cache"]) // 2]
                    for each in half:  # as a layer in the middle would leave them
                        each.state = [x * 0 for x in _arrays(each)], *list(each.state)[1:]
                    raise ValueError("[broadcast_shapes] no")
            return original(model, inputs, *args, **options)

        monkeypatch.setattr(type(model), "__call__", faulty)


def _arrays(cache):
    return [x for x in cache.state[0] if x is not None]


class LateFault:
    """Makes their evaluation raise once: the next token of each is drawn by then."""

    def __init__(self, model, monkeypatch, after):
        self.left, self.raised = after, 0
        original = mx.async_eval

        def faulty(*arrays):
            if isinstance(arrays[0], mx.array) and arrays[0].size > 1:
                self.left -= 1
                if self.left == -1:
                    self.raised += 1
                    raise RuntimeError("[eval] no")
            original(*arrays)

        monkeypatch.setattr(mx, "async_eval", faulty)


@pytest.mark.parametrize("after", mostly_long([0, 1, 5], [1]))
@pytest.mark.parametrize(
    ("name", "kind"),
    mostly_long(
        [(name, kind) for name in ("qwen3_next", "mamba2") for kind in (Fault, LateFault)],
        [("mamba2", Fault), ("qwen3_next", LateFault)],
    ),
)
def test_an_error_inside_a_batch_ends_nobody(name, kind, after, monkeypatch, caplog):
    """Three replies with seeds and penalties of their own: each goes on alone, with the bits it has alone."""
    model = tiny.fresh(name)
    requests = [
        (
            oracle.prompt(50 + 10 * seed, seed=seed),
            14,
            {
                "sampler": make_sampler(1.0, top_p=0.9),
                "seed": seed,
                "logits_processors": make_logits_processors({159: -1e9, 5: 2.0}, 1.2),
            },
        )
        for seed in range(3)
    ]
    alone = []
    for prompt, count, options in requests:
        with new_cache(model) as cache:
            alone.append(list(cache.stream_generate(prompt, count, **options)))
    with new_cache(model) as cache, caplog.at_level(logging.WARNING):
        fault = kind(model, monkeypatch, after)
        found, reports = together(cache, requests)
        again, _ = together(cache, requests)
        assert fault.raised == 1, "nobody is put into a batch again"
        assert caplog.text.count("decoded one by one from now on") == 1
        assert any("went on alone" in report.detail for report in reports)
        for (prompt, _, _), replies in zip(requests, found, strict=True):
            history = [*prompt, *(reply.token for reply in replies)]
            assert cache.lookup([*history, 1]).restored_tokens == len(history), "its end is kept"
        assert cache.stats().running_bytes == 0
    for replies, other, expected in zip(found, again, alone, strict=True):
        if name == "mamba2":  # what is read again is read in blocks
            assert [r.token for r in replies] == [r.token for r in expected]
        else:
            same(replies, expected)
            same(other, expected)


class FaultyJoin:
    """Makes the merging of caches raise once, at the layer after so many were merged."""

    def __init__(self, monkeypatch, after):
        self.left, self.raised = after, 0
        original = batch.merged

        def faulty(every):
            self.left -= 1
            if self.left == -1:
                self.raised += 1
                raise ValueError("[concatenate] no")
            return original(every)

        monkeypatch.setattr(batch, "merged", faulty)


@pytest.mark.parametrize("after", [0, 2])
def test_an_error_while_replies_join_ends_nobody(after, monkeypatch, caplog):
    """Two replies that become a batch, and a third that joins it, fail at any layer: each goes on alone.

    Of the 40 tokens of each at most 27 are made ahead, so that two of them are there when the third one comes.
    """
    model = tiny.fresh("qwen3_next")
    layers = len(Layout.of(model).kinds)
    requests = requests_of((60, 70, 80), 40)
    alone = []
    for prompt, count, options in requests:
        with new_cache(model) as cache:
            alone.append(list(cache.stream_generate(prompt, count, **options)))
    for formed_before in (0, layers):  # the batch's own layers are merged first
        with new_cache(model) as cache, caplog.at_level(logging.WARNING):
            caplog.clear()
            with monkeypatch.context() as patch:
                fault = FaultyJoin(patch, formed_before + after % layers)
                first = [cache.stream_generate(p, n, **o) for p, n, o in requests[:2]]
                found = [[next(one), next(one), next(one)] for one in first]
                third = cache.stream_generate(requests[2][0], requests[2][1], **requests[2][2])
                found.append([next(third)])
                running = [*first, third]
                take_in_turn(running, found)
            assert fault.raised == 1
            assert caplog.text.count("decoded one by one from now on") == 1
            for (prompt, _, _), replies in zip(requests, found, strict=True):
                history = [*prompt, *(reply.token for reply in replies)]
                assert cache.lookup([*history, 1]).restored_tokens == len(history), (
                    "its end is kept"
                )
            with oracle.batch_sizes(model) as sizes:
                together(cache, requests_of((30, 31), 3))
            assert set(sizes) == {1}, "nobody is put into a batch again"
            assert cache.stats().running_bytes == 0
            for replies, expected in zip(found, alone, strict=True):
                same(replies, expected)


@pytest.mark.parametrize("count", range(8, 15))
def test_a_reply_that_has_ended_joins_nobody(count, monkeypatch):
    """Its last token is taken in the very round in which another reply begins, for one of these counts:
    a batch that cannot be formed costs nobody the end of his.
    """
    model = tiny.fresh("qwen3_next")
    (first, _, options), (second, _, others) = requests_of((60, 200), 30)
    with new_cache(model) as cache:
        FaultyJoin(monkeypatch, 0)
        ended = cache.stream_generate(first, count, **options)
        begun = cache.stream_generate(second, 30, **others)
        history = [*first, *(reply.token for reply in ended)]
        assert cache.lookup([*history, 1]).restored_tokens == len(history)
        list(begun)


def test_a_reader_who_leaves_after_its_batch_failed_frees_everything(monkeypatch):
    """Closed before it could go on, and while it reads again: no claim is left."""
    model = tiny.fresh("qwen3_next")
    with new_cache(model) as cache:
        Fault(model, monkeypatch, 2)
        running = [cache.stream_generate(p, n, **o) for p, n, o in requests_of((60, 70, 80), 40)]
        for one in running:
            next(one)
        for one in running:
            one.close()
        assert cache.stats().running_bytes == 0


@pytest.mark.parametrize("budget_bytes", [1_000_000, 1_400_000])
def test_forming_a_batch_lets_nothing_go_that_is_stored(budget_bytes):
    """A store filled up to the room of three running replies: all of it stays."""
    requests = requests_of((200, 210, 220), 30)
    with new_cache(tiny.build("qwen3_next"), memory_budget=budget_bytes) as cache:
        together(cache, requests)
        room = 3 * cache.engine.layout.running_bytes(512) + 200_000
        seed = 1000
        while (before := cache.stats()).held_bytes + room <= budget_bytes:
            oracle.read(cache, oracle.prompt(100, seed=seed))
            seed += 1
        together(cache, requests)
        assert cache.stats().evictions == before.evictions


def test_replies_that_find_no_room_for_a_batch_hold_the_stores_rows_again(monkeypatch):
    """Two that decode side by side: the store may let its own rows go, so that there is room for others."""
    with new_cache(tiny.build("qwen3_next")) as cache:
        memory = cache.engine.tiers.memory
        monkeypatch.setattr(memory, "claim_free", lambda nbytes: None)
        running = [cache.stream_generate(p, n, **o) for p, n, o in requests_of((60, 70), 20)]
        for one in running:
            next(one), next(one)
        assert cache.stats().rows_bytes > 0
        cache.worker.call(cache.engine.tiers._materializer.alias)
        assert cache.stats().rows_bytes == 0
        for one in running:
            list(one)


def test_a_batch_is_formed_where_there_is_room():
    """The same three replies in an empty store: one batch of three."""
    with new_cache(tiny.build("qwen3_next"), memory_budget=4_000_000) as cache:
        with oracle.batch_sizes(cache.engine.model) as sizes:
            together(cache, requests_of((200, 210, 220), 30))
        assert max(sizes) == 3
        assert cache.stats().evictions == 0
