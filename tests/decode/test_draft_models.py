"""Draft models: the reply is the one without them, and both models' prompts are cached."""

import mlx.core as mx
import oracle
import pytest
import tiny
from long import in_turns, mostly_long
from mlx_lm.models import llama
from mlx_lm.sample_utils import make_sampler
from odd_models.drafters import model_of, new_cache
from odd_models.slipping import Slipping, forwards_of
from test_speculation import (
    COUNT,
    GREEDY,
    PROMPT,
    SAME_BITS,
    never_resting,
    next_turn,
    off,
    plain,
    stopping,
)

from mlx_hybridcache import SettingError
from mlx_hybridcache.caches.rollback.trail import Trail, trail_bytes
from mlx_hybridcache.drafting.draft_model import DraftModel, ModelDrafter

FAMILIES = (
    *("qwen3_next", "qwen3_5", "qwen3_5_moe", "jamba", "recurrent_gemma", "lfm2", "mamba2"),
    *("gemma3_text", "llama", "llama4", "gpt_oss", "falcon_h1"),
)
SOME = ("qwen3_next", "jamba", "mamba2", "gemma3_text", "llama")
each_family = pytest.mark.parametrize("name", mostly_long(FAMILIES, SOME))


def each_family_with(what, values):
    """Always each family with one of them, and each of them with some."""
    return pytest.mark.parametrize(("name", what), in_turns(FAMILIES, values, (SOME, values)))


EVERYWHERE = range(tiny.VOCAB)

NEAR_TIES = 3
"""Of a reply's 40 tokens, where the bits of a block are others than those of single tokens."""


def now_and_then(reply):
    """Some tokens of a reply, so that what is drafted is wrong in its middle."""
    return {*reply[4::7]}


def drafted(cache, draft, prompt=PROMPT, count=COUNT, most=3, **options):
    """A reply that a model drafts, and its report."""
    options = GREEDY | {"draft_model": draft, "num_draft_tokens": most} | options
    reply = cache.stream_generate(prompt, count, **options)
    return list(reply), reply.report


def next_turn_off(name, cache, draft, tokens, prompt=PROMPT, **settings):
    """Whether the next turn, which both models resume behind the reply, differs from one that was never drafted."""
    history = [*prompt, *tokens, 1, 2, 3]
    found, report = drafted(cache, draft, history, 8)
    there = len(prompt) + len(tokens)
    assert (report.restored_tokens, report.draft_restored_tokens) == (there, there)
    return off(name, found, next_turn(name, *map(tuple, (prompt, history, settings.items()))))


@each_family_with("wrong", ["now and then", "never", "always"])
def test_a_reply_is_the_same_whatever_a_model_drafts(name, wrong, monkeypatch):
    """Right, wrong, right up to a token: as many forwards as that comes to, and the next turn goes on behind both ends."""
    never_resting(monkeypatch)
    with new_cache(name) as cache:
        expected = plain(cache)
        tokens = [each.token for each in expected]
        behind = {"never": (), "always": EVERYWHERE, "now and then": now_and_then(tokens)}[wrong]
        draft = Slipping(model_of(name), behind)
        found, report = drafted(cache, draft)
        assert not off(name, found, expected)
        forwards, asked, right = forwards_of(tokens, 3, behind)
        if name in SAME_BITS:
            assert (report.drafted_tokens, report.accepted_tokens) == (asked, right)
            assert report.reply_forwards >= forwards
            if not cache.engine.layout.must_replay:
                assert report.reply_forwards == forwards
        else:  # token by token the same model may find another one likeliest than in a block, where two are near
            assert abs(report.accepted_tokens - right) <= NEAR_TIES
        assert not next_turn_off(name, cache, draft, tokens)
        assert cache.stats().running_bytes == 0


@pytest.mark.parametrize(("name", "most"), in_turns(["qwen3_next", "jamba"], range(1, 9)))
def test_any_number_of_tokens_is_drafted_at_once(name, most, monkeypatch):
    """One to eight; the draft model is called once for each of them, and never for what it has read."""
    never_resting(monkeypatch)
    with new_cache(name) as cache:
        expected = plain(cache)
        tokens = [each.token for each in expected]
        behind = now_and_then(tokens)
        draft = Slipping(model_of(name), behind)
        found, report = drafted(cache, draft, most=most)
        assert not off(name, found, expected)
        assert (report.drafted_tokens, report.accepted_tokens) == forwards_of(tokens, most, behind)[
            1:
        ]
        slices = report.forwards - 1  # both read the prompt alike
        assert report.draft_forwards - slices <= report.drafted_tokens + 1
        assert not next_turn_off(name, cache, draft, tokens)


@pytest.mark.parametrize(
    ("name", "other"),
    mostly_long(
        [
            *(("qwen3_next", "llama"), ("llama", "qwen3_next"), ("gemma3_text", "mamba2")),
            *(("jamba", "gemma3_text"), ("mamba2", "qwen3_moe"), ("recurrent_gemma", "lfm2")),
        ],
        [("qwen3_next", "llama"), ("llama", "qwen3_next"), ("recurrent_gemma", "lfm2")],
    ),
)
def test_a_draft_model_may_be_of_another_family(name, other):
    """What restores at any position beside what does at checkpoints only, either way round."""
    with new_cache(name) as cache:
        draft = model_of(other)
        expected = plain(cache)
        found, report = drafted(cache, draft)
        assert not off(name, found, expected)
        assert report.drafted_tokens > 0
        assert not next_turn_off(name, cache, draft, [each.token for each in expected])
        layout = cache.engine.drafting._known[0].layout
        changed = [*PROMPT[:50], 5, *PROMPT[51:]]
        _, report = drafted(cache, draft, changed)
        assert (report.draft_restored_tokens == 50) == (not layout.needs_snapshots)


@each_family_with("taken", [4, 14, 1])
def test_who_stops_in_a_block_is_stored_to_the_token_that_was_taken_by_both(name, taken):
    """What was drafted and verified ahead of a stop text goes back. Of one token nothing was drafted."""
    with new_cache(name) as cache:
        draft = model_of(name)
        tokens = [each.token for each in plain(cache)]
        found, _ = drafted(cache, draft, through=stopping(taken))
        assert [each.token for each in found] == tokens[:taken]
        if taken > 1:
            assert not next_turn_off(name, cache, draft, tokens[:taken])


@pytest.mark.parametrize("name", ["qwen3_next", "llama"])
def test_a_sampled_reply_is_the_one_its_seed_gives(name):
    """Drafts decide nothing."""
    options = {"sampler": make_sampler(temp=0.3), "seed": 7}
    with new_cache(name) as cache:
        expected = plain(cache, **options)
        found, report = drafted(cache, model_of(name), **options)
        assert not off(name, found, expected)
        assert report.accepted_tokens > 0


class LettingOne:
    """A processor that lets one drafted token through at a time."""

    def __call__(self, tokens, logits):
        return logits

    def may_follow(self, tokens):
        return min(2, len(tokens))


@pytest.mark.parametrize("name", ["qwen3_next", "llama"])
def test_drafts_that_nobody_verified_may_be_right_all_the_same(name, monkeypatch):
    """Of eight drafted tokens one is read, and so it is with the next: the draft model stands before the coming token."""
    never_resting(monkeypatch)
    options = {"logits_processors": [LettingOne()]}
    with new_cache(name) as cache:
        expected = plain(cache, **options)
        found, report = drafted(cache, model_of(name), most=8, **options)
        assert not off(name, found, expected)
        assert report.accepted_tokens == report.drafted_tokens == COUNT // 2 - 1
        assert not next_turn_off(name, cache, model_of(name), [each.token for each in expected])


def test_what_is_stored_is_drafted_first_and_the_rest_by_the_model(monkeypatch):
    """A reply that is written again takes no forward of the draft model but the one at its end."""
    never_resting(monkeypatch)
    with new_cache("qwen3_next") as cache:
        draft = model_of("qwen3_next")
        expected = plain(cache)
        found, first = drafted(cache, draft, draft_from_cache=True)
        assert not off("qwen3_next", found, expected)
        assert first.reply_forwards <= 1 + -(-COUNT // 4) + 1
        found, again = drafted(cache, draft, draft_from_cache=True)
        assert not off("qwen3_next", found, expected)
        assert again.reply_forwards <= 1 + -(-COUNT // 9) + 1
        assert again.draft_restored_tokens == len(PROMPT) - 1
        assert again.draft_forwards <= 3


def test_a_second_reply_ends_the_drafting_and_both_decode_in_a_batch():
    """The draft model's caches go then, and what they had read is stored."""
    with new_cache("qwen3_next") as cache:
        expected, other = plain(cache), plain(cache, oracle.prompt(50, seed=9))
        draft = model_of("qwen3_next")
        first = cache.stream_generate(PROMPT, COUNT, draft_model=draft, **GREEDY)
        found = [next(first) for _ in range(9)]
        with oracle.batch_sizes(cache.engine.model) as sizes:
            second = cache.stream_generate(oracle.prompt(50, seed=9), COUNT, **GREEDY)
            beside = []
            for _ in range(COUNT - 9):
                found.append(next(first))
                beside.append(next(second))
            beside += list(second)
        assert max(sizes) == 2
        assert not off("qwen3_next", found, expected)
        assert not off("qwen3_next", beside, other)
        assert not cache.engine.drafting._known[0].running
        _, report = drafted(cache, draft, [*PROMPT, *[each.token for each in found], 1])
        assert len(PROMPT) < report.draft_restored_tokens < len(PROMPT) + COUNT


@pytest.mark.parametrize(("name", "other"), [("qwen3_next", "llama"), ("llama", "jamba")])
def test_both_are_restored_after_a_restart(name, other, tmp_path):
    """From the cache directory, by another cache."""
    settings = {"cache_dir": tmp_path, "disk_budget": "64MB"}
    prompt = oracle.prompt(200, seed=3)  # fewer tokens are read as soon as restored
    with new_cache(name, **settings) as cache:
        tokens = [each.token for each in plain(cache, prompt)]
        drafted(cache, model_of(other), prompt)
    with new_cache(name, **settings) as cache:
        assert cache.lookup([*prompt, *tokens, 1, 2]).tier == "disk"
        assert not next_turn_off(
            name, cache, model_of(other), tokens, prompt, memory_budget="300MB"
        )


def test_salts_share_no_drafts_and_what_is_dropped_is_dropped_for_both():
    """The draft model knows nothing of another salt's prompt, nor of one that was dropped."""
    with new_cache("qwen3_next") as cache:
        draft = model_of("llama")
        tokens = [each.token for each in drafted(cache, draft, cache_salt="a")[0]]
        again, report = drafted(cache, draft, cache_salt="b")
        assert report.draft_restored_tokens == 0
        assert [each.token for each in again] == tokens
        cache.drop([*PROMPT, *tokens], cache_salt="a")
        assert drafted(cache, draft, cache_salt="a")[1].draft_restored_tokens == 0
        assert drafted(cache, draft, cache_salt="b")[1].draft_restored_tokens == len(PROMPT) - 1


def test_what_drafts_is_never_a_replys():
    """The same model for both: each reads its own, in a namespace of its own."""
    with new_cache("qwen3_next") as cache:
        model = cache.engine.model
        found, report = drafted(cache, model)
        assert report.draft_restored_tokens == 0
        assert not off("qwen3_next", found, plain(cache))
        spaces = {name.settings for name in cache.outlines.memory}
        assert len(spaces) == 2


# Memory


def rows_of(cache, draft, prompt=PROMPT):
    """Bytes of both models' caches for such a request."""
    cache.learn_draft(draft)
    (known,) = cache.engine.drafting._known
    rows = 256
    return cache.engine.layout.running_bytes(rows), known.layout.running_bytes(rows)


def test_without_room_for_the_draft_models_caches_the_reply_goes_on_without():
    """In a budget that one request and its checkpoints fill: the same reply, and nothing is held beyond it."""
    draft = model_of("llama")
    with new_cache("qwen3_next") as cache:
        expected = plain(cache)
        own, drafts = rows_of(cache, draft)
        most = own + 2 * cache.engine.layout.snapshot_bytes + drafts // 2
    with new_cache("qwen3_next", memory_budget=most) as cache:
        found, report = drafted(cache, draft)
        assert not off("qwen3_next", found, expected)
        assert (report.drafted_tokens, report.reply_forwards) == (0, COUNT + 1)
        assert cache.stats().running_bytes == 0


def test_the_draft_models_caches_go_for_a_request_that_needs_their_room():
    """Two requests fit, and the draft model beside one: the second is served, and the first goes on without drafts."""
    draft = model_of("llama")
    other = oracle.prompt(200, seed=9)
    with new_cache("qwen3_next") as cache:
        expected, second = plain(cache), plain(cache, other)
        own, drafts = rows_of(cache, draft)
        most = 2 * own + drafts // 2 + 3 * cache.engine.layout.snapshot_bytes
    with new_cache("qwen3_next", memory_budget=most) as cache:
        cache.engine.decoder.batches = False
        first = cache.stream_generate(PROMPT, COUNT, draft_model=draft, **GREEDY)
        found = [next(first) for _ in range(5)]
        assert cache.stats().running_bytes >= own + drafts
        assert not off("qwen3_next", list(cache.stream_generate(other, COUNT, **GREEDY)), second)
        assert not off("qwen3_next", [*found, *first], expected)
        assert not cache.engine.drafting._known[0].running
        assert cache.stats().running_bytes == 0


def test_caches_that_drafted_are_claimed_while_they_are_there():
    """Both models', and what they may go back to; nothing is left of them."""
    draft = model_of("qwen3_next")
    with new_cache("qwen3_next") as cache:
        own, drafts = rows_of(cache, draft)
        reply = cache.stream_generate(PROMPT, COUNT, draft_model=draft, **GREEDY)
        [next(reply) for _ in range(6)]
        (known,) = cache.engine.drafting._known
        back = cache.engine.layout.block_bytes(3) + trail_bytes(known.layout, 2)
        assert cache.stats().running_bytes >= own + drafts + back
        reply.close()
        assert cache.stats().running_bytes == 0
        assert not cache.engine.drafting._known[0].running


def test_a_reply_that_is_cancelled_while_its_draft_model_reads_leaves_what_was_read():
    """A long prompt, of which the draft model had read a part when the client went away."""
    prompt = oracle.prompt(2000, seed=5)
    with new_cache("qwen3_next") as cache:
        draft = model_of("llama")
        reply = cache.stream_generate(prompt, COUNT, draft_model=draft, **GREEDY)
        next(reply)
        reply.close()
        assert cache.stats().running_bytes == 0
        assert not cache.engine.drafting._known[0].running
        found, report = drafted(cache, draft, prompt)
        assert report.restored_tokens == len(prompt) - 1
        assert not off("qwen3_next", found, plain(cache, prompt))


def test_memory_that_the_system_has_not_costs_drafts_and_no_reply(monkeypatch):
    """MLX gets none while the draft model reads its second slice."""
    prompt, original = oracle.prompt(200, seed=3), DraftModel.at_work
    draft = model_of("llama")

    def failing(own):
        if own.running and own.running[0]._live.position:
            raise RuntimeError("[malloc] Unable to allocate 1 bytes.")
        return original(own)

    with new_cache("qwen3_next") as cache:
        expected = plain(cache, prompt)
        monkeypatch.setattr(DraftModel, "at_work", failing)
        found, report = drafted(cache, draft, prompt)
        assert not off("qwen3_next", found, expected)
        assert (report.drafted_tokens, report.reply_forwards) == (0, COUNT + 1)
        assert cache.stats().running_bytes == 0


# Refused


def test_a_draft_model_of_another_vocabulary_is_refused():
    """With a sentence, before any work; the next request is served."""
    args = llama.ModelArgs("llama", 64, 1, 128, 2, 1e-5, vocab_size=tiny.VOCAB - 8)
    with new_cache("qwen3_next") as cache:
        with pytest.raises(SettingError, match=r"vocabulary of 152, the model one of 160"):
            drafted(cache, llama.Model(args))
        assert plain(cache)


def test_rows_of_padding_are_no_other_vocabulary():
    """192 rows for 160 tokens: the same tokenizer, padded further."""
    args = llama.ModelArgs("llama", 64, 1, 128, 2, 1e-5, vocab_size=tiny.VOCAB + 32)
    mx.random.seed(0)
    with new_cache("qwen3_next") as cache:
        found, report = drafted(cache, llama.Model(args))
        assert report.drafted_tokens > 0
        assert not off("qwen3_next", found, plain(cache))


def test_exact_mode_refuses_draft_models():
    """As it does drafts from what is stored."""
    with new_cache("qwen3_next", exact=True) as cache, pytest.raises(SettingError, match="exact"):
        drafted(cache, model_of("llama"))


# Tests of the test


def skipping(counted):
    """Go back to another place of what was drafted than was asked for."""
    original = Trail.keep

    def keep(self, count):
        original(self, max(0, min(self.stands, counted(self.stands, count))))

    return keep


MUTATIONS = {
    "drafts stay": lambda stands, count: stands,
    "one too many": lambda stands, count: count + 1 if count < stands else count,
    "one too few": lambda stands, count: count - 1 if count < stands else count,
}


# Of some others of random weights, which write one token over and over, nothing is seen.
@pytest.mark.parametrize(
    ("name", "which"),
    in_turns(["qwen3_5_moe", "gemma3_text", "recurrent_gemma", "qwen3_moe"], MUTATIONS),
)
def test_a_stale_draft_cache_is_seen(name, which, monkeypatch):
    """It changes no reply, as nothing that drafts does; but more of what it drafts is wrong."""
    never_resting(monkeypatch)
    with new_cache(name) as cache:
        expected = plain(cache)
        tokens = [each.token for each in expected]
        behind = now_and_then(tokens)
        draft = Slipping(model_of(name), behind)
        monkeypatch.setattr(Trail, "keep", skipping(MUTATIONS[which]))
        found, report = drafted(cache, draft)
        assert not off(name, found, expected)
        assert report.accepted_tokens != forwards_of(tokens, 3, behind)[2]


def test_a_draft_model_that_is_shown_another_token_is_seen(monkeypatch):
    """The coming token is read as the one before it."""
    never_resting(monkeypatch)
    with new_cache("qwen3_next") as cache:
        expected = plain(cache)
        draft = ModelDrafter._draft
        monkeypatch.setattr(
            ModelDrafter,
            "_draft",
            lambda self, history, most: draft(self, [*history[:-1], history[-2]], most),
        )
        _, report = drafted(cache, model_of("qwen3_next"))
        right = forwards_of([each.token for each in expected], 3, ())[2]
        assert report.accepted_tokens < right / 2
