"""Adapters that take turns on one model: replies as in a process of their own, and what is stored stays."""

import gc
import shutil

import mlx.core as mx
import numpy as np
import oracle
import pytest
import tiny
from mlx_lm.tuner.utils import load_adapters
from odd_models.adapters import SETTINGS, write_adapter

from mlx_hybridcache import AdapterError, HybridPromptCache
from mlx_hybridcache.decode import batch_check
from mlx_hybridcache.tokens import prompt_tokens

PROMPT = oracle.prompt(150, seed=3, openers=[40])
REPLY = 8


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        None: None,
        "a": write_adapter(root / "a", 1),
        "b": write_adapter(root / "b", 2),
        "c": write_adapter(
            root / "c", 3, kind="dora", settings={**SETTINGS, "keys": ["self_attn.o_proj"]}
        ),
    }


def opened(model, **settings):
    return HybridPromptCache(
        model,
        oracle.word_tokenizer(),
        memory_budget="200MB",
        memory_reserve=0,
        prefill_step_size=64,
        checkpoint_every=64,
        **settings,
    )


def reply(cache, prompt=PROMPT):
    """Tokens, and log-probabilities as bytes."""
    made = [*cache.stream_generate(prompt, REPLY, sampler=oracle.never_ending, seed=0)]
    return [(each.token, np.array(each.logprobs).tobytes()) for each in made]


@pytest.fixture(scope="module")
def alone(adapters):
    """What a process of its own replies, which has loaded its model with the adapter."""
    found = {}
    for name, path in adapters.items():
        model = tiny.fresh("qwen3_next")
        if path is not None:
            load_adapters(model, str(path))
            model.eval()
        with opened(model) as cache:
            found[name] = reply(cache)
    assert len({str(each) for each in found.values()}) == len(adapters)
    return found


def test_adapters_take_turns_and_all_stay_hot(adapters, alone):
    """Three adapters and none, three times around: each reads its prompt once, and has the bits of a model of its own."""
    with opened(tiny.fresh("qwen3_next")) as cache:
        for turn in range(3):
            for name, path in adapters.items():
                cache.use_adapter(path)
                assert reply(cache) == alone[name], (turn, name)
                restored = cache.last_report.restored_tokens
                assert restored == (0 if turn == 0 else len(PROMPT) - 1), (turn, name)


def test_nothing_of_one_adapter_is_found_by_another(adapters):
    """Nor by the model without one; each finds its own again, in memory and in files."""
    with opened(tiny.fresh("qwen3_next")) as cache:
        cache.use_adapter(adapters["a"])
        own = cache.info.settings
        reply(cache)
        for other in (None, adapters["b"]):
            cache.use_adapter(other)
            assert cache.info.settings != own
            assert cache.lookup(PROMPT).restored_tokens == 0
        cache.use_adapter(str(adapters["a"]))
        assert cache.info.settings == own
        assert cache.lookup(PROMPT).restored_tokens == len(PROMPT) - 1


def test_files_are_found_by_the_adapter_that_wrote_them(adapters, alone, tmp_path):
    """In another process, with other paths to the same numbers."""
    with opened(tiny.fresh("qwen3_next"), cache_dir=tmp_path / "cache") as cache:
        for path in (adapters["a"], None):
            cache.use_adapter(path)
            reply(cache)
        assert cache.flush(60)
    copied = shutil.copytree(adapters["a"], tmp_path / "copied")
    with opened(tiny.fresh("qwen3_next"), cache_dir=tmp_path / "cache") as cache:
        for name, path, restored in (
            ("b", adapters["b"], 0),
            ("a", copied, 149),
            (None, None, 149),
        ):
            cache.use_adapter(path)
            assert reply(cache) == alone[name]
            assert cache.last_report.restored_tokens == restored


def test_an_adapter_that_is_trained_on_is_another_one(adapters, tmp_path):
    """The files change below the same path: nothing of before is found, and the replies are the new one's."""
    folder = shutil.copytree(adapters["a"], tmp_path / "trained")
    with opened(tiny.fresh("qwen3_next")) as cache:
        cache.use_adapter(folder)
        before = reply(cache)
        write_adapter(folder, 9)
        cache.use_adapter(None)
        cache.use_adapter(folder)
        assert cache.lookup(PROMPT).restored_tokens == 0
        assert reply(cache) != before


def test_a_scale_makes_another_adapter(adapters, tmp_path):
    """The same weights, counted twice."""
    folder = write_adapter(tmp_path / "scaled", 1, settings={**SETTINGS, "scale": 8.0})
    with opened(tiny.fresh("qwen3_next")) as cache:
        cache.use_adapter(adapters["a"])
        reply(cache)
        cache.use_adapter(folder)
        assert cache.lookup(PROMPT).restored_tokens == 0


def test_a_model_that_came_with_an_adapter_has_it_back(adapters, alone):
    """Loaded with a; b in its place, and a again, which is None here."""
    model = tiny.fresh("qwen3_next")
    load_adapters(model, str(adapters["a"]))
    model.eval()
    with opened(model) as cache:
        for name, path in (("a", None), ("b", adapters["b"]), ("a", None), ("b", adapters["b"])):
            cache.use_adapter(path)
            assert reply(cache) == alone[name]


def spoilt(folder, adapters, what):
    match what:
        case "nothing there":
            return folder / "missing"
        case "of another model":
            return write_adapter(folder, 1, family="qwen3")
        case "a weight is missing":
            shutil.copytree(adapters["a"], folder)
            weights = mx.load(str(folder / "adapters.safetensors"))
            weights.pop(min(weights))
            mx.eval(weights)
            mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
        case "no configuration":
            shutil.copytree(adapters["a"], folder)
            (folder / "adapter_config.json").write_text("{")
        case "no layer":
            shutil.copytree(adapters["a"], folder)
            mx.save_safetensors(str(folder / "adapters.safetensors"), {"a": mx.array(1)})
        case "a full fine-tune":
            shutil.copytree(adapters["a"], folder)
            (folder / "adapter_config.json").write_text('{"fine_tune_type": "full"}')
    return folder


@pytest.mark.parametrize(
    "what",
    [
        "nothing there",
        "of another model",
        "a weight is missing",
        "no configuration",
        "no layer",
        "a full fine-tune",
    ],
)
def test_what_does_not_fit_leaves_the_model_as_it_was(adapters, alone, tmp_path, what):
    """With its adapter and all that is stored."""
    with opened(tiny.fresh("qwen3_next")) as cache:
        cache.use_adapter(adapters["a"])
        reply(cache)
        with pytest.raises(AdapterError):
            cache.use_adapter(spoilt(tmp_path / "spoilt", adapters, what))
        assert reply(cache) == alone["a"]
        assert cache.last_report.restored_tokens == len(PROMPT) - 1


def test_nothing_is_changed_under_a_reply(adapters, alone):
    """While one is under way another adapter is refused."""
    with opened(tiny.fresh("qwen3_next")) as cache:
        running = cache.stream_generate(PROMPT, REPLY, sampler=oracle.never_ending, seed=0)
        first = next(running)
        with pytest.raises(AdapterError, match="under way"):
            cache.use_adapter(adapters["a"])
        made = [first, *running]
        assert [each.token for each in made] == [token for token, _ in alone[None]]


def test_a_request_that_was_made_before_a_change_is_refused(adapters):
    """It would be stored where the model without an adapter finds it."""
    with opened(tiny.fresh("qwen3_next")) as cache:
        engine = cache.engine
        request = engine.sharing.request(prompt_tokens(PROMPT, tiny.VOCAB), "", 1)
        cache.use_adapter(adapters["a"])
        with pytest.raises(AdapterError, match="before this request"):
            cache.worker.call(lambda: [*engine.prepare(request, read=True)])
        cache.use_adapter(None)
        cache.worker.call(lambda: [*engine.prepare(request, read=True)])


def test_batches_are_tried_for_each_adapter(adapters, monkeypatch):
    """Where one fails with an adapter its replies are decoded one by one, and those without it as before."""
    with opened(tiny.fresh("qwen3_next")) as cache:
        assert cache.info.batches
        monkeypatch.setattr(batch_check, "shown", lambda *what: False)
        for path, batches in ((adapters["a"], False), (None, True), (adapters["a"], False)):
            cache.use_adapter(path)
            assert cache.info.batches == cache.engine.decoder.batches == batches


def test_replies_of_an_adapter_share_batches_where_that_is_exact(adapters, alone):
    """Each adapter is tried for itself; together they have the bits of one alone."""
    with opened(tiny.fresh("qwen3_next")) as cache:
        cache.use_adapter(adapters["a"])
        running = [
            cache.stream_generate(PROMPT, REPLY, sampler=oracle.never_ending, seed=0)
            for _ in range(3)
        ]
        replies = [[next(each) for each in running] for _ in range(REPLY)]
        for row in zip(*replies, strict=True):
            assert [(each.token, np.array(each.logprobs).tobytes()) for each in row] == alone["a"]


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_behind_its_cache_a_model_is_as_it_came(adapters, alone, how):
    """The adapter stayed in, also for the next cache, to which it was the model's own."""
    model = tiny.fresh("qwen3_next")
    cache = opened(model)
    cache.use_adapter(adapters["a"])
    running = cache.stream_generate(PROMPT, 10_000, sampler=oracle.never_ending)
    next(running)
    if how == "closed":
        cache.close()
    del cache, running
    gc.collect()
    with opened(model) as later:
        assert reply(later) == alone[None]


def test_no_adapter_comes_under_another_caches_replies(adapters, alone):
    """What the other cache read with it was stored as the model's own, and restored for every later reply."""
    model = tiny.fresh("qwen3_next")
    with opened(model) as one:
        with opened(model) as other:
            for each in (one, other):
                with pytest.raises(AdapterError, match="Another cache serves this model"):
                    each.use_adapter(adapters["a"])
            assert reply(other) == reply(one) == alone[None]
        one.use_adapter(adapters["a"])
        with pytest.raises(AdapterError, match="Another cache has put an adapter into this model"):
            opened(model)
        assert reply(one) == alone["a"]
        one.use_adapter(None)
        with opened(model) as other:
            assert reply(other) == reply(one) == alone[None]
