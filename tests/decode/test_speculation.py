"""Speculation: whatever is drafted, a reply and what is stored of it are what they are without drafts."""

import functools

import mlx.core as mx
import oracle
import pytest
import tiny
from long import in_turns, mostly_long
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from odd_models import families
from odd_models.drafters import Knowing, new_cache, with_drafter

from mlx_hybridcache import SettingError
from mlx_hybridcache.caches.kinds.quantized import QuantizedRowsKind
from mlx_hybridcache.caches.kinds.recurrent import RecurrentKind
from mlx_hybridcache.caches.kinds.rows import RowsKind
from mlx_hybridcache.caches.kinds.window import WindowKind
from mlx_hybridcache.caches.rollback.block import Block
from mlx_hybridcache.decode.speculate.pace import Pace
from mlx_hybridcache.worker.turns import PAUSE

FAMILIES = (
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_moe",
    "jamba",
    "recurrent_gemma",
    "lfm2",
    "mamba2",
    "gemma3_text",
    "llama",
    "llama4",
    "gpt_oss",
    "falcon_h1",
)
SAME_BITS = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "jamba", "lfm2", "llama", "llama4")
"""Whose layers read several tokens together as they read them one by one; the others round otherwise."""

ROUNDING = 5e-5
GREEDY = {"sampler": oracle.never_ending, "seed": 0}
COUNT = 40
PROMPT = oracle.prompt(60, seed=3)

SOME = ("qwen3_next", "recurrent_gemma", "gemma3_text", "llama")
each_family = pytest.mark.parametrize("name", mostly_long(FAMILIES, SOME))


DRAFTS = [(8, 0), (0, 8), (1, 2), (2, 1), (7, 1)]
"""How many tokens in a row are right, and how many after them wrong."""


def plain(cache, prompt=PROMPT, count=COUNT, **options):
    """The reply without drafts, of which nothing is shared with the others."""
    return list(cache.stream_generate(prompt, count, cache_salt="plain", **GREEDY | options))


def drafted(cache, drafter, prompt=PROMPT, count=COUNT, most=8, **options):
    """The same with them, and its report."""
    with_drafter(cache, drafter)
    options = GREEDY | {"draft_from_cache": True, "num_draft_tokens": most} | options
    reply = cache.stream_generate(prompt, count, **options)
    return list(reply), reply.report


def off(name, one, other):
    """Whether replies differ: in a token, or in a log-probability by more than the family's rounding."""
    allowed = 0.0 if name.removeprefix("wide ") in SAME_BITS else ROUNDING
    if not tiny.device_is_split_invariant():
        allowed = oracle.OTHER_DEVICES
    return [a.token for a in one] != [b.token for b in other] or any(
        not mx.allclose(a.logprobs, b.logprobs, rtol=0, atol=allowed).item()
        for a, b in zip(one, other, strict=True)
    )


def never_resting(monkeypatch):
    monkeypatch.setattr(Pace, "width", lambda pace: pace.most)


def next_turn_off(name, cache, prompt, tokens, **settings):
    """Whether the next turn, resumed behind the reply, differs from the one that read all of it."""
    history = [*prompt, *tokens, 1, 2, 3]
    found = cache.lookup(history)
    assert found.restored_tokens == len(history) - 3, "prompt and reply, to the last token taken"
    hot = list(cache.stream_generate(history, 8, **GREEDY))
    return off(name, hot, next_turn(name, *map(tuple, (prompt, history, settings.items()))))


@functools.cache
def next_turn(name, prompt, history, settings):
    """The reply to a history, of which all behind the prompt was decoded one by one, never drafted."""
    with new_cache(name, **dict(settings)) as other:
        list(other.stream_generate(prompt, len(history) - 3 - len(prompt), **GREEDY))
        return list(other.stream_generate(history, 8, **GREEDY))


@pytest.mark.parametrize(("name", "drafts"), in_turns(FAMILIES, DRAFTS, (SOME, DRAFTS)))
def test_a_reply_is_the_same_whatever_is_drafted(name, drafts, monkeypatch):
    """Right, wrong, right until the last token; and the next turn goes on behind its very end."""
    right, wrong = drafts
    never_resting(monkeypatch)
    with new_cache(name) as cache:
        expected = plain(cache)
        tokens = [each.token for each in expected]
        found, report = drafted(cache, Knowing(len(PROMPT), tokens, right, wrong))
        assert not off(name, found, expected)
        assert not next_turn_off(name, cache, PROMPT, tokens)
        assert report.drafted_tokens > 0
        if not wrong:
            assert report.accepted_tokens == report.drafted_tokens
            assert report.reply_forwards == 1 + -(-COUNT // 9)
        if not right:
            assert report.accepted_tokens == 0


def test_rows_without_room_behind_them_go_back_too(monkeypatch):
    """Caches that append to all that they have, whatever their offset: what was refused is cut off."""
    never_resting(monkeypatch)
    with new_cache("concatenating llama") as cache:
        assert not any(kind.headroom for kind in cache.engine.layout.kinds)
        expected = plain(cache)
        tokens = [each.token for each in expected]
        found, report = drafted(cache, Knowing(len(PROMPT), tokens, 2, 2))
        assert not off("llama", found, expected)
        assert 0 < report.accepted_tokens < report.drafted_tokens


@pytest.mark.parametrize(("name", "most"), in_turns(["qwen3_next", "jamba"], range(1, 9)))
def test_any_number_of_tokens_is_drafted_at_once(name, most, monkeypatch):
    """One to eight, the last of which is wrong; no key in the store is longer than what was read."""
    never_resting(monkeypatch)
    with new_cache(name) as cache:
        expected = plain(cache)
        tokens = [each.token for each in expected]
        found, _ = drafted(cache, Knowing(len(PROMPT), tokens, most - 1, 1), most=most)
        assert not off(name, found, expected)
        keys = cache.checkpoints()
        assert max(map(len, keys)) == len(PROMPT) + COUNT
        assert all([*PROMPT, *tokens][: len(key)] == key for key in keys)
        assert not next_turn_off(name, cache, PROMPT, tokens)


def stopping(taken):
    """What a stop text does on the worker's thread: it takes so many tokens and ends the reply."""

    def through(steps):
        left = taken
        for step in steps:
            yield step
            left -= step is not PAUSE
            if not left:
                return

    return through


@pytest.mark.parametrize(
    ("name", "taken"), in_turns(FAMILIES, [4, 1, 14, 17], (SOME, [4, 1, 14, 17]))
)
def test_who_stops_in_a_block_is_stored_to_the_token_that_was_taken(name, taken):
    """What was verified ahead of a stop text goes back."""
    with new_cache(name) as cache:
        tokens = [each.token for each in plain(cache)]
        found, _ = drafted(cache, Knowing(len(PROMPT), tokens, 8), through=stopping(taken))
        assert [each.token for each in found] == tokens[:taken]
        assert cache.lookup([*PROMPT, *tokens, 1]).matched_tokens == len(PROMPT) + taken
        assert not next_turn_off(name, cache, PROMPT, tokens[:taken])


def test_a_reply_ends_with_its_first_end_token_among_drafted_ones():
    """Drafts go on behind it."""
    prompt, end = oracle.prompt(60, seed=3), tiny.VOCAB - 1

    def ending(tokens, logits):  # the 12th token is the end
        return (
            logits
            if tokens.size < len(prompt) + 11
            else mx.where(mx.arange(tiny.VOCAB) == end, 99.0, logits)
        )

    with new_cache("qwen3_next") as cache:
        expected = plain(cache, prompt, logits_processors=[ending], sampler=None)
        tokens = [each.token for each in expected]
        assert tokens[-1] == end
        assert len(tokens) == 12
        found, report = drafted(
            cache,
            Knowing(60, [*tokens, *range(30)], 8),
            prompt,
            logits_processors=[ending],
            sampler=None,
        )
        assert not off("qwen3_next", found, expected)
        assert found[-1].finish_reason == "stop"
        assert report.reply_forwards < 12
        assert not next_turn_off("qwen3_next", cache, prompt, tokens)


@pytest.mark.parametrize("name", ["qwen3_next", "llama"])
def test_a_sampled_reply_is_the_one_its_seed_gives(name, monkeypatch):
    """Drafts decide nothing: the same random numbers choose from the same distributions."""
    never_resting(monkeypatch)
    options = {
        "sampler": make_sampler(temp=1.0, top_p=0.95),
        "logits_processors": make_logits_processors(repetition_penalty=1.2),
        "seed": 7,
    }
    with new_cache(name) as cache:
        expected = plain(cache, **options)
        for wrong in (0, 1):
            knowing = Knowing(len(PROMPT), [each.token for each in expected], 3, wrong)
            found, report = drafted(cache, knowing, cache_salt=str(wrong), **options)
            assert not off(name, found, expected)
            assert report.reply_forwards < COUNT / 2


class OnlyKnown:
    """A grammar under which one text alone may be written, and that says so of drafts."""

    def __init__(self, start, tokens):
        self.start, self.tokens, self.at = start, tokens, 0

    def __call__(self, tokens, logits):
        self.at = tokens.size - self.start
        return mx.where(mx.arange(tiny.VOCAB) == self.tokens[self.at], 99.0, logits)

    def may_follow(self, tokens):
        there = self.tokens[self.at : self.at + len(tokens)]
        pairs = enumerate(zip(there, tokens, strict=False))
        return next((at for at, (a, b) in pairs if a != b), len(there))


def test_what_a_processor_will_refuse_is_not_read():
    """Of two right tokens and two wrong ones in each draft the right ones are read."""
    with new_cache("qwen3_next") as cache:
        text = [*oracle.prompt(COUNT + 1, seed=8)]
        expected = plain(cache, logits_processors=[OnlyKnown(len(PROMPT), text)])
        found, report = drafted(
            cache,
            Knowing(len(PROMPT), text, 2, 2),
            logits_processors=[OnlyKnown(len(PROMPT), text)],
        )
        assert not off("qwen3_next", found, expected)
        assert [each.token for each in found] == text[:COUNT]
        assert report.drafted_tokens == report.accepted_tokens > COUNT / 2


def append_all(tokens, reply):
    for each in reply:
        tokens.append(each.token)  # one by one: an error leaves what came before it


def test_a_failing_processor_ends_a_drafted_reply_where_it_ends_a_plain_one():
    """At the sixth token, with its own error; the next request is served."""

    def failing(tokens, logits):
        if tokens.size > len(PROMPT) + 5:
            raise ZeroDivisionError
        return logits

    with new_cache("qwen3_next") as cache:
        tokens = [each.token for each in plain(cache)]
        counts = []
        for options in ({}, {"draft_from_cache": True}):
            with_drafter(cache, Knowing(len(PROMPT), tokens, 8))
            counts.append([])
            reply = cache.stream_generate(
                PROMPT, COUNT, logits_processors=[failing], **options, **GREEDY
            )
            with pytest.raises(ZeroDivisionError):
                append_all(counts[-1], reply)
        assert counts[0] == counts[1]
        assert [each.token for each in plain(cache)] == tokens


def test_a_second_reply_ends_the_drafting_and_both_decode_in_a_batch():
    """Also when the first has tokens that nobody took yet, which cannot join before."""
    with new_cache("qwen3_next") as cache:
        expected = plain(cache)
        other = plain(cache, oracle.prompt(50, seed=9))
        tokens = [each.token for each in expected]
        with_drafter(cache, Knowing(len(PROMPT), tokens, 8))
        first = cache.stream_generate(PROMPT, COUNT, draft_from_cache=True, **GREEDY)
        found = [next(first) for _ in range(3)]
        with oracle.batch_sizes(cache.engine.model) as sizes:
            second = cache.stream_generate(oracle.prompt(50, seed=9), COUNT, **GREEDY)
            beside = []
            for _ in range(COUNT - 3):
                found.append(next(first))
                beside.append(next(second))
            beside += list(second)
        assert max(sizes) == 2
        assert not off("qwen3_next", found, expected)
        assert not off("qwen3_next", beside, other)


@pytest.mark.parametrize("name", ["qwen3_next", "jamba", "gemma3_text", "llama"])
def test_a_drafted_end_is_restored_after_a_restart(name, tmp_path, monkeypatch):
    """From the cache directory, by another cache: the last block was right but for its last token."""
    never_resting(monkeypatch)
    with new_cache(name, cache_dir=tmp_path, disk_budget="64MB") as cache:
        tokens = [each.token for each in plain(cache)]
        drafted(cache, Knowing(len(PROMPT), tokens, 6, 1))
    with new_cache(name, cache_dir=tmp_path, disk_budget="64MB") as cache:
        assert cache.lookup([*PROMPT, *tokens, 1, 2]).tier == "disk"
        assert not next_turn_off(name, cache, PROMPT, tokens)


def test_who_is_always_wrong_is_asked_seldom():
    """Of 40 tokens at most ten have drafts behind them."""
    with new_cache("qwen3_next") as cache:
        expected = plain(cache)
        knowing = Knowing(len(PROMPT), [each.token for each in expected], 0, 8)
        found, _ = drafted(cache, knowing)
        assert not off("qwen3_next", found, expected)
        assert 0 < len(knowing.told) <= 10


def test_drafts_take_only_what_is_free(monkeypatch):
    """In a budget that one request fills there is nothing to draft with, and the reply is the same."""
    never_resting(monkeypatch)
    with new_cache("qwen3_next") as cache:
        expected = plain(cache)
        knowing = Knowing(len(PROMPT), [each.token for each in expected], 8)
        monkeypatch.setattr(cache.engine.tiers.memory, "claim_free", lambda nbytes: None)
        found, report = drafted(cache, knowing)
        assert not off("qwen3_next", found, expected)
        assert (report.drafted_tokens, report.reply_forwards) == (0, 1 + COUNT)


@pytest.mark.parametrize("name", ["qwen3_next", "gemma3_text"])
def test_what_a_block_holds_is_claimed_and_given_back(name):
    """While it runs a reply claims the states and windows it may go back to; nothing is left of them."""
    with new_cache(name) as cache:
        tokens = [each.token for each in plain(cache)]
        with_drafter(cache, Knowing(len(PROMPT), tokens, 8))
        reply = cache.stream_generate(PROMPT, COUNT, draft_from_cache=True, **GREEDY)
        next(reply)
        running = cache.stats().running_bytes
        layout = cache.engine.layout
        assert running >= layout.running_bytes(256) + layout.snapshot_bytes
        list(reply)
        assert cache.stats().running_bytes == 0


def test_nobody_drafts_beyond_what_a_model_computes_alike_in_any_slices(monkeypatch):
    """InternLM 2 trained on 128 tokens: of a reply behind 110 the beginning is drafted."""
    never_resting(monkeypatch)
    model, prompt = families.build("internlm2"), oracle.prompt(110, seed=3)
    with oracle.new_cache(model, tokenizer=oracle.word_tokenizer()) as cache:
        expected = plain(cache, prompt)
        knowing = Knowing(len(prompt), [each.token for each in expected], 8)
        found, report = drafted(cache, knowing, prompt)
        assert not off("llama", found, expected)
        assert 0 < report.drafted_tokens <= families.LIMITS["internlm2"] - len(prompt)


@pytest.mark.parametrize(
    ("name", "start"),
    mostly_long(
        [
            *(("wide qwen3_next", start) for start in (0, 60, 70)),
            ("wide jamba", 70),
            ("wide llama", 0),
        ],
        [("wide qwen3_next", 60), ("wide jamba", 70), ("wide llama", 0)],
    ),
)
def test_quantized_rows_go_back_bit_for_bit(name, start, monkeypatch):
    """From token 70 on, the 10th of the reply: no block reaches across, and what is wrong leaves no row."""
    never_resting(monkeypatch)
    settings = {"kv_bits": 8, "quantized_kv_start": start}
    with new_cache(name, **settings) as cache:
        assert cache.engine.layout.quantized
        expected = plain(cache)
        tokens = [each.token for each in expected]
        for right, wrong in ((8, 0), (2, 1)):
            knowing = Knowing(len(PROMPT), tokens, right, wrong)
            found, report = drafted(cache, knowing, cache_salt=f"{right}")
            assert not off(name, found, expected)
            assert report.accepted_tokens > COUNT / 2
        drafted(cache, Knowing(len(PROMPT), tokens, 2, 1))
        assert not next_turn_off(name, cache, PROMPT, tokens, **settings)


def test_exact_mode_refuses_drafts():
    """With a sentence, before any work."""
    with new_cache("qwen3_next", exact=True) as cache, pytest.raises(SettingError, match="exact"):
        cache.stream_generate(PROMPT, 9, draft_from_cache=True)


# Tests of the test: what may go wrong in going back is seen


def late(kind, change):
    """Go back to another place of the block than was asked for."""
    original = kind.go_back

    def go_back(self, cache, mark, stands, count, snapshot=None):
        original(self, cache, mark, stands, change(stands, count), snapshot)

    return go_back


def shifted(by):
    """Of the states inside a block each is taken for its neighbour's."""
    original = Block._read

    def read(self):
        logits = original(self)
        for leaf, states in self._captured.items():
            last = len(states) - 1
            self._captured[leaf] = [states[min(max(0, at + by), last)] for at in range(len(states))]
        return logits

    return read


MUTATIONS = {
    "state one too late": ("qwen3_next", lambda p: p.setattr(Block, "_read", shifted(1))),
    "state one too early": ("qwen3_next", lambda p: p.setattr(Block, "_read", shifted(-1))),
    "state not put back": (
        "jamba",
        lambda p: p.setattr(RecurrentKind, "go_back", lambda *args: None),
    ),
    "one row too many": (
        "llama",
        lambda p: p.setattr(
            RowsKind, "go_back", late(RowsKind, lambda stands, count: min(count + 1, stands))
        ),
    ),
    "one quantized row too many": (
        "wide llama",
        lambda p: p.setattr(
            QuantizedRowsKind,
            "go_back",
            late(QuantizedRowsKind, lambda stands, count: min(count + 1, stands)),
        ),
    ),
    "window one row short": (
        "gemma3_text",
        lambda p: p.setattr(
            WindowKind, "go_back", late(WindowKind, lambda stands, count: count - 1)
        ),
    ),
}


@pytest.mark.parametrize("which", MUTATIONS)
def test_each_way_to_go_back_wrongly_is_seen(which, monkeypatch):
    """One of three drafted tokens is right, so that each block is left in its middle: the reply is another."""
    never_resting(monkeypatch)
    name, mutate = MUTATIONS[which]
    settings = {"kv_bits": 8} if name.startswith("wide") else {}
    with new_cache(name, **settings) as cache:
        expected = plain(cache)
        knowing = Knowing(len(PROMPT), [each.token for each in expected], 1, 2, trusts=True)
        mutate(monkeypatch)
        found, _ = drafted(cache, knowing)
        assert off(name, found, expected)


def test_a_stale_drafter_costs_forwards_and_changes_nothing(monkeypatch):
    """A token that was written is missing from what it is shown: all that it drafts is wrong."""
    never_resting(monkeypatch)
    with new_cache("qwen3_next") as cache:
        expected = plain(cache)
        knowing = Knowing(len(PROMPT), [each.token for each in expected], 2, trusts=True)
        propose = knowing.propose
        knowing.propose = lambda history, most: propose(history[:-1], most)
        found, report = drafted(cache, knowing)
        assert not off("qwen3_next", found, expected)
        assert report.drafted_tokens > COUNT
        assert (report.accepted_tokens, report.reply_forwards) == (0, 1 + COUNT)
