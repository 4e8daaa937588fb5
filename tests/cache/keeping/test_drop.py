"""One conversation is forgotten: what others share with it stays, in memory and in files."""

import oracle
import pytest
from directories.restarts import (
    assert_as_cold,
    files,
    forget_memory,
    held_up,
    model_of,
    opened,
    until_idle,
    write,
)
from oracle import STEP

from mlx_hybridcache.errors import NotStoredError, PinnedError

BEGINNING = oracle.prompt(130, seed=1)
ONE = [*BEGINNING, *oracle.prompt(120, seed=2)]
OTHER = [*BEGINNING, *oracle.prompt(120, seed=3)]


def read(cache, *prompts, salt=""):
    for tokens in prompts:
        cache.prefill(tokens, cache_salt=salt).release()


@pytest.mark.parametrize("name", ["qwen3_next", "llama", "gemma3_text"])
def test_what_others_share_stays_in_both_tiers(name, tmp_path):
    """Two conversations behind one beginning: the one that is dropped keeps the beginning only, and after
    a restart also the rest of the file that the beginning ends in; the other one, and its bits, are
    what they were.
    """
    with opened(tmp_path, name) as cache:
        read(cache, ONE, OTHER)
        assert cache.flush(30)
        kept, before = cache.lookup(OTHER).restored_tokens, len(files(tmp_path))
        assert cache.drop(ONE) == len(BEGINNING)
        assert cache.summary == cache.stats()
        for _ in range(2):
            assert cache.lookup(ONE).matched_tokens == len(BEGINNING)
            assert cache.lookup(OTHER).restored_tokens == kept
            forget_memory(cache)
        assert cache.flush(30)
        assert len(files(tmp_path)) < before
    with opened(tmp_path, name) as cache:
        assert cache.lookup(ONE).matched_tokens <= 3 * STEP
        if cache.engine.layout.needs_snapshots:
            assert cache.lookup(ONE).restored_tokens <= len(BEGINNING)
        assert cache.lookup(OTHER).restored_tokens == kept
        assert_as_cold(cache, OTHER)
        assert_as_cold(cache, ONE)


def test_a_beginning_goes_with_all_that_follows_it(tmp_path):
    """Dropping what two conversations share forgets both; another one stays; no byte or file is left."""
    apart = oracle.prompt(200, seed=9)
    with opened(tmp_path) as cache:
        empty = cache.stats()
        read(cache, ONE, OTHER, apart)
        assert cache.flush(30)
        assert cache.drop(BEGINNING) == 0
        assert cache.lookup(ONE).matched_tokens == cache.lookup(OTHER).matched_tokens == 0
        assert cache.lookup(apart).restored_tokens == 199
        cache.drop(apart)
        assert (cache.stats().held_bytes, cache.summary.nodes) == (empty.held_bytes, 0)
        assert cache.flush(30)
        assert cache.disk_stats().held_bytes == 0
        assert cache.lookup(ONE).reason.value == "cold"
    assert files(tmp_path) == {}


def test_a_branch_that_only_files_know_is_a_branch(tmp_path):
    """Memory has one conversation, the directory two: their common beginning stays."""
    write(tmp_path, OTHER)
    with opened(tmp_path) as cache:
        read(cache, ONE)
        assert cache.flush(30)
        kept = cache.lookup(OTHER).restored_tokens
        assert cache.drop(ONE) == len(BEGINNING)
        assert cache.lookup(OTHER).restored_tokens == kept
        forget_memory(cache)
        assert cache.lookup(OTHER).restored_tokens == kept
        assert cache.lookup(ONE).matched_tokens == len(BEGINNING)


def test_a_pin_stays_and_says_so(tmp_path):
    """Nothing goes while a checkpoint of it is pinned, in memory or in files alone."""
    with opened(tmp_path) as cache:
        read(cache, ONE, OTHER)
        cache.pin(ONE)
        assert cache.flush(30)
        for _ in range(2):
            before = cache.lookup(ONE).restored_tokens
            for prompt in (ONE, BEGINNING):
                with pytest.raises(PinnedError, match="Unpin it first"):
                    cache.drop(prompt)
            assert cache.lookup(ONE).restored_tokens == before
            forget_memory(cache)
        cache.drop(OTHER)  # the pin is none of its
        read(cache, ONE)
        cache.unpin(ONE)
        cache.drop(ONE)
        assert cache.lookup(ONE).matched_tokens == 0


def test_what_is_not_stored_or_not_whole_is_refused():
    """Nothing, more than is stored, another salt: an error each, and everything stays."""
    with oracle.new_cache(model_of("qwen3_next")) as cache:
        read(cache, ONE, salt="a")
        for tokens, salt in (
            (OTHER, "a"),
            ([*ONE, 1, 2], "a"),
            (ONE, ""),
        ):
            with pytest.raises(NotStoredError, match="of these"):
                cache.drop(tokens, cache_salt=salt)
        assert cache.lookup(ONE, cache_salt="a").restored_tokens == len(ONE) - 1


def test_a_running_request_goes_on_and_stores_what_it_reads():
    """Dropped between two slices: the reply has cold's bits, and what was read is there again."""
    model = model_of("qwen3_next")
    dropped = []
    with oracle.new_cache(model) as cache:

        def drop(position, total):
            if position >= 128 and not dropped:
                dropped.append(cache.drop(ONE[:64]))

        cache.prefill(ONE, prompt_progress_callback=drop).release()
        assert dropped == [0]
        assert cache.lookup(ONE).restored_tokens == len(ONE) - 1
        assert_as_cold(cache, ONE)


def test_what_is_being_written_goes_too(tmp_path):
    """Dropped while the disk thread holds its files: none is left, and the next restart finds none."""
    with opened(tmp_path) as cache:
        with held_up(cache):
            read(cache, ONE)
            assert cache.disk_stats().queued_bytes > 0
            assert cache.drop(ONE) == 0
            assert cache.stats().lingering_bytes > 0  # held by the disk thread for a moment longer
        assert cache.flush(30)
        until_idle(cache)
        assert cache.stats().held_bytes == 0
        assert cache.disk_stats().held_bytes == 0
        assert files(tmp_path) == {}
