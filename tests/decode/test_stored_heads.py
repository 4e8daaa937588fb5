"""What a head has of a prompt is stored and restored: a restored reply's drafts are those of a head that read all of it."""

import shutil

import oracle
import pytest
from long import in_turns
from odd_models.adapters import write_adapter
from odd_models.drafters import new_cache
from odd_models.heads import COUNT, KINDS, PROMPT
from test_heads import are_by_definition, drafted, head_of
from test_speculation import GREEDY, never_resting, off, plain, stopping

from mlx_hybridcache.drafting.at_work import AtWork

each_kind = pytest.mark.parametrize("name", KINDS)

LONG = oracle.prompt(250, seed=4)
"""Four slices."""

NEXT = [1, 2, 3]


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Drafts are asked for behind each token."""
    never_resting(monkeypatch)


def counts(report):
    return (report.drafted_tokens, report.accepted_tokens, report.reply_forwards)


def cold(name, source, prompt, proposals, count=COUNT, **options):
    """What a cache that knows nothing replies, what it counts, and what is drafted for it."""
    with new_cache(name) as cache:
        proposals.clear()
        found, report = drafted(cache, source, prompt, count, **options)
        return found, counts(report), [*proposals]


def spaces(cache):
    return {name.settings for name in cache.outlines.memory}


# A head that was there


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_shortest_prompts_are_drafted_too(length, directory, proposals):
    """No token of the first is in a path of the head's; asked again, and with another turn behind."""
    (name, *_), prompt = KINDS, PROMPT[:length]
    source = directory(name)
    with new_cache(name) as cache:
        found, _ = drafted(cache, source, prompt)
        for asked in (prompt, [*prompt, *[each.token for each in found], *NEXT]):
            expected, told, _ = cold(name, source, asked, proposals)
            again, report = drafted(cache, source, asked)
            assert not off(name, again, expected)
            assert counts(report) == told


@each_kind
def test_a_prompt_again_is_drafted_as_the_first_time(name, directory, proposals):
    """The same tokens drafted, and the same right, with rows for all of it but its last token."""
    source = directory(name)
    found, told, expected = cold(name, source, PROMPT, proposals)
    with new_cache(name) as cache:
        drafted(cache, source)
        for _ in range(2):
            proposals.clear()
            again, report = drafted(cache, source)
            assert not off(name, again, found)
            assert counts(report) == told
            assert proposals == expected
            assert report.restored_tokens == report.draft_restored_tokens == len(PROMPT) - 1
        assert are_by_definition(name, proposals)
        assert cache.stats().running_bytes == 0


@pytest.mark.parametrize(("name", "taken"), in_turns(KINDS, [2, 7, COUNT]))
def test_the_next_turn_is_drafted_as_if_all_was_read_for_it(name, taken, directory, proposals):
    """Behind the reply's very end, also where a stop text ended it inside a block; and behind that one's."""
    source = directory(name)
    with new_cache(name) as cache:
        found, _ = drafted(cache, source, through=stopping(taken))
        history = [*PROMPT, *[each.token for each in found], *NEXT]
        for _ in range(2):
            expected, told, drafts = cold(name, source, history, proposals, 12)
            proposals.clear()
            found, report = drafted(cache, source, history, 12)
            assert not off(name, found, expected)
            assert counts(report) == told
            assert proposals == drafts
            there = len(history) - len(NEXT)
            assert (report.restored_tokens, report.draft_restored_tokens) == (there, there)
            history += [*[each.token for each in found], *NEXT]
        assert are_by_definition(name, proposals)


@pytest.mark.parametrize(("name", "kept"), in_turns(KINDS, [64, 100, 130, 192, 249]))
def test_a_branch_is_drafted_as_if_all_was_read_for_it(name, kept, directory, proposals):
    """Another ending behind a place in any slice: rows know nothing of the token behind the last that they are of."""
    source = directory(name)
    other = [*LONG[:kept], *oracle.prompt(300 - kept, seed=kept)]
    expected, told, drafts = cold(name, source, other, proposals, 9)
    with new_cache(name) as cache:
        drafted(cache, source, LONG, 9)
        for at in range(2):  # the second time at the branch itself
            proposals.clear()
            found, report = drafted(cache, source, [*other[: 290 + 10 * at]], 9)
            assert report.restored_tokens == report.draft_restored_tokens
            assert are_by_definition(name, proposals)
        assert report.restored_tokens >= min(kept, 288)
        assert not off(name, found, expected)
        assert counts(report) == told
        assert proposals == drafts


def leaving(slices):
    """What a client that goes away does on the worker's thread: it ends the request behind so many of its slices."""

    def through(steps):
        for _ in range(1 + slices):  # its first turn is over before the first of them
            yield next(steps)

    return through


@pytest.mark.parametrize("every", [64, 256])
@pytest.mark.parametrize("slices", [1, 3])
def test_what_a_request_heard_that_was_given_up_is_there_for_the_next(
    slices, every, directory, proposals
):
    """As far as its prompt was read, whether a checkpoint was due there or not."""
    prompt, source = oracle.prompt(600, seed=5), directory("qwen3_next")
    _, told, drafts = cold("qwen3_next", source, prompt, proposals, 9)
    with new_cache("qwen3_next", checkpoint_every=every) as cache:
        assert not drafted(cache, source, prompt, through=leaving(slices))[0]
        assert cache.stats().running_bytes == 0
        proposals.clear()
        _, report = drafted(cache, source, prompt, 9)
        assert report.restored_tokens == report.draft_restored_tokens == 64 * slices
        assert counts(report) == told
        assert proposals == drafts


def test_a_reply_that_ends_early_leaves_what_its_head_heard(directory, proposals):
    """The client goes away between two of its tokens."""
    source = directory("qwen3_next")
    with new_cache("qwen3_next") as cache:
        reply = cache.stream_generate(PROMPT, COUNT, draft_mtp=source, num_draft_tokens=3, **GREEDY)
        tokens = [next(reply).token for _ in range(9)]
        reply.close()
        history = [*PROMPT, *tokens, *NEXT]
        proposals.clear()
        _, report = drafted(cache, source, history, 9)
        assert report.restored_tokens == report.draft_restored_tokens >= len(PROMPT) - 1
        assert are_by_definition("qwen3_next", proposals)


@each_kind
def test_a_head_is_restored_after_a_restart(name, directory, proposals, tmp_path):
    """From the cache directory, by another cache; the next turn's goes on in the same files."""
    source, settings = directory(name), {"cache_dir": tmp_path, "disk_budget": "64MB"}
    expected, told, drafts = cold(name, source, LONG, proposals)
    with new_cache(name, **settings) as cache:
        drafted(cache, source, LONG)
    with new_cache(name, **settings) as cache:
        proposals.clear()
        found, report = drafted(cache, source, LONG)
        assert not off(name, found, expected)
        assert report.tier == "disk"
        assert report.restored_tokens == report.draft_restored_tokens == len(LONG) - 1
        assert counts(report) == told
        assert proposals == drafts
    history = [*LONG, *[each.token for each in found], *NEXT]
    expected, told, drafts = cold(name, source, history, proposals, 12)
    with new_cache(name, **settings) as cache:
        proposals.clear()
        found, report = drafted(cache, source, history, 12)
        assert report.restored_tokens == report.draft_restored_tokens == len(history) - len(NEXT)
        assert counts(report) == told
        assert proposals == drafts


# A head that was not


def test_behind_what_a_head_never_heard_it_goes_on_alone(directory, proposals):
    """A prompt that was read without one: its drafts are those of a head that begins there, and none is stored."""
    source = directory("qwen3_next")
    with new_cache("qwen3_next") as cache:
        expected = plain(cache)
        own = spaces(cache)
        for _ in range(2):
            proposals.clear()
            found, report = drafted(cache, source, cache_salt="plain")
            assert not off("qwen3_next", found, expected)
            assert (report.restored_tokens, report.draft_restored_tokens) == (len(PROMPT) - 1, 0)
            assert proposals
            assert are_by_definition("qwen3_next", proposals, len(PROMPT) - 1)
            cache.stats()
            assert spaces(cache) == own
        assert cache.stats().running_bytes == 0


def test_behind_a_turn_that_a_head_did_not_hear_nothing_is_stored(directory, proposals):
    """The second of three turns is written without it: it has rows of the first, none of the second, and its own."""
    source = directory("qwen3_next")
    with new_cache("qwen3_next") as cache:
        history, ends = [*PROMPT], []
        for options in ({"draft_mtp": source}, {}):
            reply = cache.stream_generate(history, 30, **GREEDY, **options)
            history += [*[each.token for each in reply], *NEXT]
            ends.append(len(history) - len(NEXT))
        for _ in range(2):
            proposals.clear()
            reply = cache.stream_generate(history, 30, **GREEDY, draft_mtp=source)
            written = [each.token for each in reply]
            found = reply.report.draft_restored_tokens
            assert (reply.report.restored_tokens, found) == (ends[-1], ends[0] - 1)
            assert are_by_definition("qwen3_next", proposals, ends[-1], found)
            history += [*written, *NEXT]
            ends.append(len(history) - len(NEXT))


def test_salts_share_no_rows_and_what_is_dropped_or_cleared_is_gone(directory):
    """A head finds nothing of another salt's prompt, nor of one that was forgotten."""
    source = directory("qwen3_next")
    with new_cache("qwen3_next") as cache:

        def restored(salt):
            report = drafted(cache, source, cache_salt=salt)[1]
            assert report.draft_restored_tokens in (0, report.restored_tokens)
            return report.draft_restored_tokens

        def forgotten(salt):
            """Also where the model itself still has it."""
            list(cache.stream_generate(PROMPT, COUNT, cache_salt=salt, **GREEDY))
            return restored(salt) == 0

        tokens = [each.token for each in drafted(cache, source, cache_salt="a")[0]]
        assert forgotten("b")
        assert restored("a") == len(PROMPT) - 1
        cache.drop([*PROMPT, *tokens], cache_salt="a")
        assert forgotten("a")
        drafted(cache, source, [*PROMPT, 5, 6], cache_salt="c")
        cache.drop([*PROMPT, 5, 6], cache_salt="c")
        assert forgotten("c")
        drafted(cache, source, cache_salt="d")
        cache.clear()
        cache.stats()
        assert not spaces(cache)
        assert forgotten("d")


def test_what_is_dropped_is_gone_from_the_directory(directory, tmp_path):
    """No file of it is left, of the model's or of its head's."""
    source = directory("qwen3_next")
    with new_cache("qwen3_next", cache_dir=tmp_path, disk_budget="64MB") as cache:
        tokens = [each.token for each in drafted(cache, source, LONG)[0]]
        assert cache.flush(20)
        assert len(cache.outlines.disk) == 2
        cache.drop([*LONG, *tokens])
        cache.stats()
        assert not cache.outlines.disk


def test_an_adapters_hidden_states_are_its_own(directory, tmp_path, proposals):
    """The model as it came, an adapter, and both again: each is drafted as when it was read with it."""
    source, adapter = directory("qwen3_next"), write_adapter(tmp_path, 1)
    with new_cache("qwen3_next", cache_dir=tmp_path / "cache", disk_budget="64MB") as cache:
        drafts = {}
        for path, expected in ((None, 0), (adapter, 0), (None, 249), (adapter, 249)):
            cache.use_adapter(path)
            proposals.clear()
            _, report = drafted(cache, source, LONG, 20)
            assert report.restored_tokens == report.draft_restored_tokens == expected
            assert drafts.setdefault(path, [*proposals]) == proposals
        assert drafts[None] != drafts[adapter]
        cache.use_adapter(None)


def test_a_head_is_known_by_its_weights(directory, tmp_path):
    """In another directory it is the same one; another one beside it shares nothing with it."""
    source = directory("qwen3_next")
    other = shutil.copytree(source, tmp_path / "copied")
    with new_cache("qwen3_next") as cache:
        assert drafted(cache, source)[1].draft_restored_tokens == 0
        assert drafted(cache, other)[1].draft_restored_tokens == len(PROMPT) - 1
        random = directory("qwen3_next", right=False)
        assert drafted(cache, random)[1].draft_restored_tokens == 0


def test_rows_are_stored_smaller_where_all_are(directory):
    """As integers, from which a head goes on."""
    settings = {"store_kv": 8, "store_state": "int8"}
    with new_cache("qwen3_next", **settings) as cache:
        drafted(cache, directory("qwen3_next"))
        own = head_of(cache).layout
        assert own.stored_row_bytes < own.row_bytes
        _, report = drafted(cache, directory("qwen3_next"))
        assert report.restored_tokens == report.draft_restored_tokens == len(PROMPT) - 1
        assert report.accepted_tokens > COUNT / 3


# Memory


def test_a_budget_holds_and_replies_are_right_while_heads_rows_are_let_go(directory):
    """Twelve conversations where three fit: what is evicted of a head costs drafts, what of the model a reading."""
    source = directory("qwen3_5")
    prompts = [oracle.prompt(150, seed=each) for each in range(12)]
    with new_cache("qwen3_5") as cache:
        expected = [plain(cache, prompt, 9) for prompt in prompts]
        layout = cache.engine.layout
        most = layout.running_bytes(512) + 12 * layout.snapshot_bytes + 600 * layout.row_bytes
    with new_cache("qwen3_5", memory_budget=most) as cache:
        restored = set()
        for turn in (*range(12), *range(11, -1, -1), *range(0, 12, 3)):
            found, report = drafted(cache, source, prompts[turn], 9)
            assert not off("qwen3_5", found, expected[turn])
            stats = cache.stats()
            assert cache.engine.tiers.memory.budget.used_bytes <= most
            assert stats.running_bytes == 0
            restored.add((report.restored_tokens > 0, report.draft_restored_tokens > 0))
        assert stats.evictions
        assert (True, True) in restored


def test_a_heads_caches_go_while_its_rows_are_read_from_files(directory, monkeypatch, tmp_path):
    """A request needs their room in the middle of that: the reply goes on without drafts."""
    source, settings = directory("qwen3_next"), {"cache_dir": tmp_path, "disk_budget": "64MB"}
    with new_cache("qwen3_next", **settings) as cache:
        expected, _ = drafted(cache, source, LONG)
    turns, paused = AtWork.turns, []

    def taking(own, steps, is_over):
        for pause in turns(own, steps, is_over):
            own.let_go()
            paused.append(own.running[0])
            yield pause

    monkeypatch.setattr(AtWork, "turns", taking)
    with new_cache("qwen3_next", **settings) as cache:
        found, report = drafted(cache, source, LONG)
        assert not off("qwen3_next", found, expected)
        assert report.tier == "disk"
        assert paused
        assert (report.drafted_tokens, report.reply_forwards) == (0, COUNT + 1)
        assert not head_of(cache).running
        assert cache.stats().running_bytes == 0


def test_a_request_that_ends_while_its_heads_rows_are_read_leaves_nothing(
    directory, monkeypatch, tmp_path
):
    """The client goes away before its prompt is read."""
    source, settings = directory("qwen3_next"), {"cache_dir": tmp_path, "disk_budget": "64MB"}
    with new_cache("qwen3_next", **settings) as cache:
        drafted(cache, source, LONG)
    turns = AtWork.turns

    def failing(own, steps, is_over):
        for pause in turns(own, steps, is_over):
            yield pause
            raise ZeroDivisionError

    monkeypatch.setattr(AtWork, "turns", failing)
    with new_cache("qwen3_next", **settings) as cache:
        with pytest.raises(ZeroDivisionError):
            drafted(cache, source, LONG)
        assert not head_of(cache).running
        monkeypatch.undo()
        _, report = drafted(cache, source, LONG, 9)
        assert report.draft_restored_tokens == report.restored_tokens == len(LONG) - 1
        assert cache.stats().running_bytes == 0
