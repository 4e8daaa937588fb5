"""What a request with a long history does for what it shares with others: counted, not timed."""

import pytest
from bundled import load, text_tokens
from plain_replies import SMALL, plain, same

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.store.outline import Outline
from mlx_hybridcache.store.tree import PrefixTree

PROMPT = [*text_tokens(700)]


class Looks:
    """Looks at prefix trees, with the tokens that each compared, and the outlines that were made."""

    def __init__(self, monkeypatch):
        self.compared: list[int] = []
        self.outlines = 0
        match, outline = PrefixTree.match, Outline.__init__

        def looked(tree, tokens, *known):
            found = match(tree, tokens, *known)
            at = [node.end for node in known if node is not None and node.parent is not None]
            self.compared.append(found.matched - sum(end for end in at if end <= len(tokens)))
            return found

        def made(*args):
            self.outlines += 1
            outline(*args)

        monkeypatch.setattr(PrefixTree, "match", looked)
        monkeypatch.setattr(Outline, "__init__", made)

    def clear(self):
        self.compared.clear()
        self.outlines = 0


@pytest.fixture
def looks(monkeypatch):
    return Looks(monkeypatch)


def reply(cache, prompt):
    return list(cache.stream_generate(prompt, 2))


def test_an_exact_repeat_is_compared_once_and_outlined_once(cache, looks):
    """700 tokens in ten runs and more: three looks, and one when its buffers are retained; the later ones compare
    nothing but the reply.
    """
    expected = plain(PROMPT, 2)
    for _ in range(2):
        reply(cache, PROMPT)
    looks.clear()
    same(reply(cache, PROMPT), expected)
    assert looks.compared[0] >= len(PROMPT) - 1
    assert len(looks.compared) <= 4
    assert sum(looks.compared[1:]) <= 4
    assert cache.stats().nodes > 10
    assert looks.outlines <= cache.stats().nodes + 1  # the root


def test_a_next_turn_compares_what_is_new_and_the_rest_once(cache, looks):
    """40 tokens more than were stored: all is compared once, and what is new by each look that stores it."""
    told = [*PROMPT, *(response.token for response in reply(cache, PROMPT)), *text_tokens(40, 3000)]
    expected = plain(told, 2)
    looks.clear()
    same(reply(cache, told), expected)
    assert looks.compared[0] >= len(PROMPT)
    assert len(looks.compared) <= 16
    assert sum(looks.compared[1:]) <= 200
    assert looks.outlines <= cache.stats().nodes + 1


@pytest.mark.parametrize("new", [30, 3])
def test_files_are_asked_only_where_they_could_reach_farther(tmp_path, looks, new):
    """Memory reaches to 3 or 30 tokens before the end; files are worth a look from 64 on."""
    model, tokenizer = load()
    with HybridPromptCache(model, tokenizer, cache_dir=tmp_path, **SMALL) as cache:
        reply(cache, PROMPT)
        assert cache.flush(60)
        asked = [*PROMPT, *text_tokens(new, 3000)]
        looks.clear()
        cache.restore(asked).release()
        assert len(looks.compared) == 1


def test_outlines_show_what_a_request_used_when_it_ends(cache):
    """What a repeat holds is in the figures from its first token on; no outline changes before its end."""
    reply(cache, PROMPT)
    before = [*cache.outlines.memory.values()]
    hot = cache.stream_generate(PROMPT, 20)
    next(hot)
    assert cache.summary.running_bytes > 0
    assert [*cache.outlines.memory.values()] == before
    list(hot)
    assert [*cache.outlines.memory.values()] != before


def test_outlines_show_what_a_request_pushes_out_when_it_begins():
    """A store of 4 MB is full; a request with room for 3,000 tokens more lets some of it go."""
    model, tokenizer = load()
    with HybridPromptCache(model, tokenizer, memory_budget="4MB", **SMALL) as cache:
        while not cache.summary.evictions:
            cache.prefill([*text_tokens(300, 400 * cache.summary.nodes)], max_tokens=16).release()
        evictions, nodes = cache.summary.evictions, cache.summary.nodes
        large = cache.stream_generate([*text_tokens(5, 20_000)], 3000)
        next(large)
        assert cache.summary.evictions > evictions
        assert nodes > cache.summary.nodes == _runs(cache)
        large.close()


def _runs(cache):
    """How many all outlines show, the roots left out."""
    waiting = [*cache.outlines.memory.values()]
    shown = -len(waiting)
    while waiting:
        shown += 1
        waiting += waiting.pop().children.values()
    return shown
