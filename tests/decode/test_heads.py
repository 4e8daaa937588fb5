"""Multi-token-prediction heads: the reply is the one without them, and they draft what their definition says."""

import mlx.core as mx
import oracle
import pytest
import tiny
from long import in_turns, mostly_long
from mlx_lm.sample_utils import make_sampler
from odd_models import heads
from odd_models.drafters import Knowing, model_of, new_cache, with_drafter
from odd_models.head_reference import Reference
from odd_models.heads import COUNT, KINDS, PROMPT
from test_speculation import GREEDY, never_resting, next_turn_off, off, plain, stopping

from mlx_hybridcache.caches import room
from mlx_hybridcache.decode.speculate.pace import Pace
from mlx_hybridcache.drafting.head import Head, HeadLayers
from mlx_hybridcache.drafting.head_drafter import MOST_WAITING, HeadDrafter

NUMBERS = [(name, most) for name in KINDS for most in range(1, 9)]
SHORT = [("qwen3_5", 1), ("qwen3_5", 8), ("qwen3_next", 3), ("qwen3_5_moe", 2)]

each_kind = pytest.mark.parametrize("name", KINDS)


def drafted(cache, source, prompt=PROMPT, count=COUNT, most=3, **options):
    """A reply that a head drafts, and its report."""
    options = GREEDY | {"draft_mtp": source, "num_draft_tokens": most} | options
    reply = cache.stream_generate(prompt, count, **options)
    return list(reply), reply.report


def are_by_definition(name, proposals, seen_from=0, seen_to=0, *, right=True):
    """Whether each of the drafts is what the reference drafts, of all that was asked for."""
    model = tiny.build(name)
    layers = heads.fitted(name) if right else heads.fresh_layers(model)
    reference = Reference(model, layers)
    return all(
        tokens == reference.drafts(history, most, seen_from, seen_to)
        for history, most, tokens in reversed(proposals)  # the longest first, which has the others
    )


@pytest.mark.parametrize(("name", "right"), in_turns(KINDS, [True, False]))
def test_a_reply_is_the_same_whatever_a_head_drafts(name, right, directory, monkeypatch):
    """Right for one token ahead, or of random weights; and the next turn goes on behind the reply's very end."""
    never_resting(monkeypatch)
    with new_cache(name) as cache:
        expected = plain(cache)
        found, report = drafted(cache, directory(name, right=right), most=1)
        assert not off(name, found, expected)
        assert not next_turn_off(name, cache, PROMPT, [each.token for each in expected])
        assert cache.stats().running_bytes == 0
        if right:
            assert report.accepted_tokens == report.drafted_tokens == COUNT // 2
            assert report.reply_forwards == 1 + COUNT // 2
        else:
            assert report.accepted_tokens < report.drafted_tokens / 4
        # One more for the prompt's rows, and one for those that are stored at the reply's end.
        assert report.draft_forwards == 2 + report.drafted_tokens
        assert [each.from_draft for each in found].count(True) == report.accepted_tokens


@pytest.mark.parametrize(("name", "most"), mostly_long(NUMBERS, SHORT))
def test_a_head_drafts_what_its_definition_says(name, most, directory, proposals, monkeypatch):
    """One to eight tokens: what it makes of its own output, whatever was refused of the draft before."""
    never_resting(monkeypatch)
    with new_cache(name) as cache:
        expected = plain(cache)
        found, report = drafted(cache, directory(name), most=most)
        assert not off(name, found, expected)
        assert are_by_definition(name, proposals)
        assert len(proposals) > 4
        assert report.accepted_tokens > COUNT / 3
        if most > 2:
            assert report.accepted_tokens < report.drafted_tokens


def test_a_head_reads_a_prompt_in_slices(directory, proposals):
    """Of 64 tokens, four of them: each draft is as if it was read at once."""
    prompt = oracle.prompt(250, seed=4)
    with new_cache("qwen3_next") as cache:
        expected = plain(cache, prompt, 12)
        found, report = drafted(cache, directory("qwen3_next"), prompt, 12)
        assert not off("qwen3_next", found, expected)
        assert proposals
        assert are_by_definition("qwen3_next", proposals)
        assert report.forwards == 5


def test_a_head_that_rests_keeps_up(directory, proposals, monkeypatch):
    """Nothing is drafted for 100 tokens: few hidden states wait meanwhile, and the next draft misses none of them."""
    held, heard = [], HeadDrafter.heard

    def hearing(self, tokens, hidden):
        heard(self, tokens, hidden)
        held.append(sum(each.end - each.start for each in self._waiting))

    written = iter(range(500))
    monkeypatch.setattr(HeadDrafter, "heard", hearing)
    monkeypatch.setattr(Pace, "width", lambda pace: 2 * (next(written) > 100))
    with new_cache("qwen3_next") as cache:
        expected = plain(cache, count=115)
        written = iter(range(500))
        found, _ = drafted(cache, directory("qwen3_next"), count=115, most=2)
        assert not off("qwen3_next", found, expected)
        assert proposals
        assert are_by_definition("qwen3_next", proposals)
        assert max(held[1:]) == MOST_WAITING + 1


@each_kind
@pytest.mark.parametrize("taken", [1, 4, 14])
def test_who_stops_in_a_block_is_stored_to_the_token_that_was_taken(name, taken, directory):
    """What was verified ahead of a stop text goes back."""
    with new_cache(name) as cache:
        tokens = [each.token for each in plain(cache)]
        found, _ = drafted(cache, directory(name), through=stopping(taken))
        assert [each.token for each in found] == tokens[:taken]
        assert not next_turn_off(name, cache, PROMPT, tokens[:taken])


def test_a_sampled_reply_is_the_one_its_seed_gives(directory):
    """Drafts decide nothing."""
    options = {"sampler": make_sampler(temp=0.3), "seed": 7}
    with new_cache("qwen3_5") as cache:
        expected = plain(cache, **options)
        found, report = drafted(cache, directory("qwen3_5"), **options)
        assert not off("qwen3_5", found, expected)
        assert report.drafted_tokens > 0


def test_what_is_stored_is_drafted_first(directory, monkeypatch):
    """A reply that is written again needs no head, which hears it all the same."""
    never_resting(monkeypatch)
    with new_cache("qwen3_next") as cache:
        expected = plain(cache)
        options = {"draft_from_cache": True, "most": 3}
        found, first = drafted(cache, directory("qwen3_next"), **options)
        assert not off("qwen3_next", found, expected)
        assert first.accepted_tokens > COUNT / 3
        found, again = drafted(cache, directory("qwen3_next"), **options)
        assert not off("qwen3_next", found, expected)
        assert again.reply_forwards <= 1 + -(-COUNT // 9) + 1
        assert again.draft_forwards <= 3


def test_a_second_reply_ends_the_drafting_and_both_decode_in_a_batch(directory):
    """The head's rows go then."""
    with new_cache("qwen3_next") as cache:
        expected, other = plain(cache), plain(cache, oracle.prompt(50, seed=9))
        source = directory("qwen3_next")
        first = cache.stream_generate(PROMPT, COUNT, draft_mtp=source, **GREEDY)
        found = [next(first) for _ in range(9)]
        with oracle.batch_sizes(cache.engine.model) as sizes:
            second = cache.stream_generate(
                oracle.prompt(50, seed=9), COUNT, draft_mtp=source, **GREEDY
            )
            beside = []
            for _ in range(COUNT - 9):
                found.append(next(first))
                beside.append(next(second))
            assert not head_of(cache).running
            beside += list(second)
        assert max(sizes) == 2
        assert not off("qwen3_next", found, expected)
        assert not off("qwen3_next", beside, other)


def test_rows_may_be_quantized(tmp_path):
    """From position 20 on: the head's own stay in full precision, and the reply is the one of such rows."""
    name, settings = "wide qwen3_next", {"kv_bits": 8, "quantized_kv_start": 20}
    model = model_of(name)
    source = heads.write(tmp_path, model, heads.fresh_layers(model))
    with new_cache(name, **settings) as cache:
        expected = plain(cache)
        found, report = drafted(cache, source)
        assert not off(name, found, expected)
        assert report.drafted_tokens > 0


def test_tied_embeddings_give_the_heads_logits(tmp_path, proposals):
    """Where a model has no `lm_head` of its own."""
    model = tiny.fresh("qwen3_5")
    text = model.language_model
    text.args.tie_word_embeddings = True
    del text["lm_head"]
    source = heads.write(tmp_path, model, heads.fresh_layers(model))
    with oracle.new_cache(model, tokenizer=oracle.word_tokenizer()) as cache:
        expected = plain(cache)
        found, report = drafted(cache, source)
        assert not off("qwen3_5", found, expected)
        assert report.drafted_tokens > 0


def test_without_the_cache_nothing_is_drafted(directory):
    """By mlx-lm alone, which knows no heads."""
    with new_cache("qwen3_next") as cache:
        found, report = drafted(cache, directory("qwen3_next"), use_cache=False)
        assert not off("qwen3_next", found, plain(cache))
        assert report.drafted_tokens == 0


def test_a_closed_caches_model_is_what_it_was(directory):
    """Nobody listens to it any more."""
    model = tiny.fresh("qwen3_5")
    trunk = type(model.language_model.model)
    with oracle.new_cache(model, tokenizer=oracle.word_tokenizer()) as cache:
        drafted(cache, directory("qwen3_5"), count=3)
        assert type(model.language_model.model) is not trunk
    assert type(model.language_model.model) is trunk


# Memory


def head_of(cache):
    (own,) = cache.engine.drafting._heads.values()
    return own.head


def test_a_heads_rows_are_claimed_while_they_are_there(directory):
    """As many as the reply's own caches have; nothing is left of them."""
    with new_cache("qwen3_next") as cache:
        reply = cache.stream_generate(PROMPT, COUNT, draft_mtp=directory("qwen3_next"), **GREEDY)
        [next(reply) for _ in range(6)]
        layout, own = cache.engine.layout, head_of(cache).layout
        held = layout.running_bytes(256) + own.running_bytes(256)
        assert held <= cache.stats().running_bytes <= held + layout.block_bytes(4)
        reply.close()
        assert cache.stats().running_bytes == 0
        assert not head_of(cache).running


def test_a_longer_reply_has_more_rows(directory, proposals, monkeypatch):
    """One of unknown length: room for 64 tokens, here, is claimed at first, and more when it goes on."""
    never_resting(monkeypatch)
    monkeypatch.setattr(room, "FIRST_ROOM", 64)
    options = {"best_effort": True}
    with new_cache("qwen3_5") as cache:
        expected = plain(cache, count=220, **options)
        found, _ = drafted(cache, directory("qwen3_5"), count=220, **options)
        assert not off("qwen3_5", found, expected)
        assert len(proposals[-1][0]) > room.ROW_STEP
        assert are_by_definition("qwen3_5", proposals[-2:])
        assert cache.stats().running_bytes == 0


def test_without_room_for_a_heads_rows_the_reply_goes_on_without(directory):
    """In a budget that one request with room for a long reply fills."""
    with new_cache("qwen3_next") as cache:
        expected = plain(cache)
        layout = cache.engine.layout
        most = layout.running_bytes(1024) + 4 * layout.snapshot_bytes
    with new_cache("qwen3_next", memory_budget=most) as cache:
        source, through = directory("qwen3_next"), stopping(COUNT)
        found, report = drafted(cache, source, count=900, through=through)
        assert not off("qwen3_next", found, expected)
        assert (report.drafted_tokens, report.reply_forwards) == (0, COUNT + 1)
        assert cache.stats().running_bytes == 0


def test_a_heads_rows_go_for_a_request_that_needs_their_room(directory):
    """Two requests fit, and the head's rows beside one: the second is served, and the first goes on without drafts."""
    other, source = oracle.prompt(200, seed=9), directory("qwen3_next")
    with new_cache("qwen3_next") as cache:
        expected, second = plain(cache), plain(cache, other)
        drafted(cache, source, count=1)
        layout, rows = cache.engine.layout, head_of(cache).layout.running_bytes(256)
        own = layout.running_bytes(256)
        most = 2 * own + rows // 2 + 3 * layout.snapshot_bytes
    with new_cache("qwen3_next", memory_budget=most) as cache:
        cache.engine.decoder.batches = False
        first = cache.stream_generate(PROMPT, COUNT, draft_mtp=source, **GREEDY)
        found = [next(first) for _ in range(5)]
        assert cache.stats().running_bytes >= own + rows
        assert not off("qwen3_next", list(cache.stream_generate(other, COUNT, **GREEDY)), second)
        assert not off("qwen3_next", [*found, *first], expected)
        assert not head_of(cache).running
        assert cache.stats().running_bytes == 0


@pytest.mark.parametrize("slices", [1, 3])
def test_a_prompt_that_is_given_up_leaves_no_rows(slices, directory):
    """While it is read, in slices; what was read of it is restored for the next one."""
    prompt, read = oracle.prompt(1000, seed=5), []
    with new_cache("qwen3_next") as cache:

        def progress(done, total):
            read.append(done)
            if len(read) > slices:
                raise ZeroDivisionError

        options = {"draft_mtp": directory("qwen3_next"), "prompt_progress_callback": progress}
        with pytest.raises(ZeroDivisionError):
            list(cache.stream_generate(prompt, 9, **GREEDY, **options))
        assert cache.stats().running_bytes == 0
        assert not head_of(cache).running
        assert cache.lookup(prompt).restored_tokens == read[-1] > 0


def test_memory_that_the_system_has_not_costs_drafts_and_no_reply(directory, monkeypatch):
    """MLX gets none for the head's rows."""

    def failing(head):
        raise RuntimeError("[malloc] Unable to allocate 1 bytes.")

    with new_cache("qwen3_next") as cache:
        expected = plain(cache)
        cache.learn_mtp(directory("qwen3_next"))
        monkeypatch.setattr(Head, "make_cache", failing)
        found, report = drafted(cache, directory("qwen3_next"))
        assert not off("qwen3_next", found, expected)
        assert (report.drafted_tokens, report.reply_forwards) == (0, COUNT + 1)
        assert cache.stats().running_bytes == 0


def test_memory_that_ends_while_a_prompt_is_read_is_made_for_a_second_try(directory, monkeypatch):
    """The second slice's forward fails once: the head begins anew where the second try does."""
    prompt, failed, heard = oracle.prompt(250, seed=4), [], HeadDrafter.heard

    def failing(self, tokens, hidden):
        if self._next and not failed:
            failed.append(self._next)
            raise RuntimeError("[malloc] Unable to allocate 1 bytes.")
        heard(self, tokens, hidden)

    with new_cache("qwen3_next") as cache:
        expected = plain(cache, prompt)
        monkeypatch.setattr(HeadDrafter, "heard", failing)
        found, report = drafted(cache, directory("qwen3_next"), prompt)
        assert failed
        assert not off("qwen3_next", found, expected)
        assert report.drafted_tokens > 0
        assert cache.stats().running_bytes == 0


# Tests of the test: what may go wrong in a head is seen


def before_the_norm(patch):
    """The hidden states are those before the model's final norm."""
    heard = HeadDrafter.heard
    weight = tiny.build("qwen3_5").language_model.model.norm.weight
    patch.setattr(HeadDrafter, "heard", lambda own, t, hidden: heard(own, t, hidden / weight))


def the_other_way_round(patch):
    """The hidden state first, then the embedding."""

    def call(own, embedded, hidden, cache):
        parts = [own.pre_fc_norm_hidden(hidden), own.pre_fc_norm_embedding(embedded)]
        x = own.fc(mx.concatenate(parts, axis=-1))
        return own.norm(own.layers[0](x, "causal" if x.shape[1] > 1 else None, cache))

    patch.setattr(HeadLayers, "__call__", call)


def rows_of_drafts_stay(patch):
    """What was drafted is not taken back."""
    make_cache = Head.make_cache

    def made(own):
        rows, waiting = make_cache(own)
        rows.trim = lambda count: 0
        return [rows, waiting]

    patch.setattr(Head, "make_cache", made)


def refused_tokens_stay(patch):
    """What was read and refused counts as written."""
    patch.setattr(HeadDrafter, "_cut", lambda own, end: None)


def the_token_itself(patch):
    """Each hidden state with its own token rather than the one behind it."""
    read = Head.read
    patch.setattr(Head, "read", lambda own, t, h, cache: read(own, mx.roll(t, 1, axis=1), h, cache))


MUTATIONS = [
    before_the_norm,
    the_other_way_round,
    rows_of_drafts_stay,
    refused_tokens_stay,
    the_token_itself,
]


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_a_head_that_is_wrong_is_seen_and_changes_no_reply(
    mutate, directory, proposals, monkeypatch
):
    """Its drafts are not those of the definition; every token of the reply is."""
    never_resting(monkeypatch)
    with new_cache("qwen3_5") as cache:
        expected = plain(cache)
        mutate(monkeypatch)
        found, _ = drafted(cache, directory("qwen3_5"))
        assert not off("qwen3_5", found, expected)
        assert not proposals or not are_by_definition("qwen3_5", proposals)


def test_what_is_stored_may_be_wrong_beside_a_head(directory):
    """A drafter that is asked first and always wrong: the head's own drafts go on behind what is true."""
    with new_cache("qwen3_next") as cache:
        expected = plain(cache)
        knowing = Knowing(len(PROMPT), [each.token for each in expected], 0, 2)
        with_drafter(cache, knowing)
        found, report = drafted(cache, directory("qwen3_next"), draft_from_cache=True)
        assert not off("qwen3_next", found, expected)
        assert report.accepted_tokens > 0
