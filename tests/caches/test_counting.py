"""Where caches stand is known, whatever layers they are of: no state is stored under other tokens."""

import copy
from types import SimpleNamespace

import mlx.core as mx
import oracle
import pytest
import tiny
from mlx_lm.models.cache import make_prompt_cache

from mlx_hybridcache import CacheMismatchError, HybridPromptCache
from mlx_hybridcache.caches import counting
from mlx_hybridcache.caches.subclassed import Subclassed

GREEDY = {"sampler": oracle.never_ending, "seed": 0}


def new_cache(name, **settings):
    return HybridPromptCache(
        tiny.build(name),
        oracle.word_tokenizer(),
        memory_budget="300MB",
        prefill_step_size=64,
        checkpoint_every=64,
        checkpoint_min_step=16,
        **settings,
    )


def stored(cache, salt=None):
    """The token lists of all checkpoints."""
    namespace = cache.engine.sharing.namespaces(cache._prompts.salt_of(salt))[0]
    return cache.worker.call(
        lambda: [tokens.tolist() for tokens, _ in cache.engine.tiers.memory.checkpoints(namespace)]
    )


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "llama", "jamba"])
def test_a_reply_that_was_made_ahead_is_stored_where_its_caches_stand(name):
    """17 tokens taken of a reply beside a faster one, then closed: what is stored continues the cold reply."""
    slow_prompt, fast_prompt = oracle.prompt(60, seed=1), oracle.prompt(40, seed=2)
    with new_cache(name) as cache:
        slow = cache.stream_generate(slow_prompt, 200, **GREEDY)
        fast = cache.stream_generate(fast_prompt, 80, **GREEDY)
        for _ in range(17):
            next(slow)
        for _ in range(60):
            next(fast)
        slow.close()
        fast.close()
        model, bound = (
            cache.engine.model,
            1e-4 if name == "mamba2" else 0.0,
        )  # what its blocks promise
        whole = [r.token for r in cache.stream_generate(slow_prompt, 60, cache_salt="s", **GREEDY)]
        history = [*slow_prompt, *whole]
        end = cache.lookup([*history, 1]).restored_tokens
        assert end >= 60 + 17, "what was made stays"
        checked = [*stored(cache), history[:end]]
        for tokens in checked:
            ready = cache.restore([*tokens, 1])
            assert ready.position == len(tokens)
            hot = tiny.next_logits(model, ready.prompt_cache, 1)
            apart = mx.abs(hot - tiny.cold_logits(model, [*tokens, 1])).max().item()
            assert apart <= bound, f"{len(tokens)} tokens"
            ready.release()


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "llama", "gemma3_text"])
def test_a_reply_whose_caches_read_more_than_was_seen_leaves_none_of_it(name, monkeypatch):
    """At the third of twelve tokens the model reads its token twice, as a speculating one may: what is
    stored ends where the prompt does.
    """
    prompt, singles = oracle.prompt(60, seed=1), []
    with new_cache(name) as cache:
        kind = type(cache.engine.model)
        original = kind.__call__

        def twice(self, inputs, *args, **options):
            if inputs.shape[1] == 1:
                singles.append(inputs)
            if inputs.shape[1] == 1 and len(singles) == 3:
                original(self, inputs, *args, **options)
            return original(self, inputs, *args, **options)

        monkeypatch.setattr(kind, "__call__", twice)
        reply = [r.token for r in cache.stream_generate(prompt, 12, **GREEDY)]
        monkeypatch.undo()
        assert len(singles) >= len(reply) == 12
        assert cache.lookup([*prompt, *reply, 1]).restored_tokens <= 60
        oracle.assert_same_reading(oracle.check(cache, [prompt]))


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "llama", "gemma3_text", "deepseek_v3"])
def test_caches_of_other_tokens_are_refused(name):
    """Sixty tokens' state under 40 or 61 of them; under the 60 it is taken."""
    prompt = oracle.prompt(61, seed=1)
    with new_cache(name) as cache:
        caches = tiny.cold_caches(cache.engine.model, prompt[:60])
        for length in (40, 59, 61):
            with pytest.raises(CacheMismatchError, match="stands at 60 tokens, not at"):
                cache.save(prompt[:length], caches)
        assert cache.stats().nodes == 0
        cache.save(prompt[:60], caches)
        assert cache.lookup(prompt).restored_tokens == 60


def test_the_count_goes_on_in_restored_caches_and_in_copies():
    """Prefilled, read on by the framework, copied with `copy.deepcopy`, and read on once more."""
    prompt, more = oracle.prompt(60, seed=1), oracle.prompt(9, seed=2)
    with new_cache("mamba2") as cache:
        model = cache.engine.model
        cache.prefill(prompt).release()
        ready = cache.prefill(prompt)
        model(mx.array([[*ready.rest, *more[:4]]]), cache=ready.prompt_cache)
        ready.release()
        copied = copy.deepcopy(ready.prompt_cache)
        model(mx.array([more[4:]]), copied)
        for caches, tokens in ((ready.prompt_cache, more[:4]), (copied, more)):
            with pytest.raises(CacheMismatchError, match=f"stands at {60 + len(tokens)} tokens"):
                cache.save([*prompt, *tokens, 1], caches)
            cache.save([*prompt, *tokens], caches)
            assert cache.lookup([*prompt, *tokens, 1]).restored_tokens == 60 + len(tokens)


def test_what_nobody_counted_is_refused_with_the_reason():
    """A state put into the caches by hand, and one read by the model's inner part alone."""
    prompt = oracle.prompt(60, seed=1)
    with new_cache("mamba2") as cache:
        model = cache.engine.model
        replaced = tiny.cold_caches(model, prompt)
        for each, other in zip(replaced, tiny.cold_caches(model, prompt[:40]), strict=True):
            each.state = other.state
        inner = make_prompt_cache(model)
        model.backbone(mx.array([prompt]), inner)
        for caches in (replaced, inner):
            with pytest.raises(CacheMismatchError, match="no layer says how many tokens"):
                cache.save(prompt, caches)
        assert cache.stats().nodes == 0


def test_counting_holds_no_state_that_the_caches_do_not():
    """A forward leaves as much memory in use behind it as before; saved caches can be let go of."""
    prompt = oracle.prompt(40, seed=1)
    with new_cache("mamba2") as cache:
        caches = tiny.cold_caches(cache.engine.model, prompt)
        before = mx.get_active_memory()
        for _ in range(3):
            tiny.next_logits(cache.engine.model, caches, 1)
        assert mx.get_active_memory() <= before


def test_a_counted_model_is_still_itself():
    """Its class has the name and module it had, is a subclass, and is counted once."""
    model = tiny.fresh("mamba2")
    plain = type(model)
    for _ in range(2):
        with HybridPromptCache(model, memory_budget="100MB"):
            kind = type(model)
    assert (kind.__name__, kind.__module__) == (plain.__name__, plain.__module__)
    assert issubclass(kind, plain)
    assert kind.__mro__[1:] == plain.__mro__ or kind is plain
    assert type(tiny.fresh("qwen3_next")).__mro__[1].__name__ == "Module", "no need: rows know"


def test_a_state_is_held_once_while_the_model_runs():
    """Noted before and afterwards, not meanwhile: a state that is held twice is copied to be written."""
    seen = []

    class Plain:
        def __call__(self, inputs, cache):
            seen.append(vars(cache[0]).keys() - {"cache"})
            cache[0].cache = [mx.array(1.0)]

    model, cache = Plain(), SimpleNamespace(cache=[None])
    counted = counting.count(model, list)
    for _ in range(2):
        model(mx.zeros((1, 3)), cache=[cache])
    assert counting.tokens_read(cache) == 6
    assert seen == [set(), set()]
    counted.release()


def test_a_class_that_somebody_else_gave_a_model_stays():
    """Its own is given back only where it has still the one that we gave it."""

    class Plain: ...

    class Ours(Plain): ...

    class Theirs(Plain): ...

    module = Plain()
    given = Subclassed([(module, Ours)])
    module.__class__ = Theirs
    given.release()
    assert type(module) is Theirs
