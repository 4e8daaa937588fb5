"""The first call, as people get it wrong, and the model when the last cache is done with it."""

import asyncio
import copy
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import tiny
from bundled import load, text_tokens
from mlx_lm import stream_generate
from transformers import BatchEncoding

import mlx_hybridcache
from mlx_hybridcache import ArgumentError, BudgetError, HybridPromptCache, PromptError, SettingError
from mlx_hybridcache.cli.main import main
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.server import main as serve

SMALL = {"prefill_step_size": 64, "checkpoint_every": 64, "checkpoint_min_step": 16}


@pytest.fixture(scope="module")
def cache():
    model, tokenizer = load()
    with HybridPromptCache(model, tokenizer, memory_budget="200MB", **SMALL) as cache:
        yield cache


# What is said of a wrong argument


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"memory_buget": "1GB"}, "'memory_buget'. Did you mean memory_budget?"),
        ({"tokeniser": None}, "Did you mean tokenizer?"),
        ({"cache_salt": 5}, "cache_salt is an int; text is needed"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_meant(given, said):
    """One letter too few, the other spelling, a number for text; before anything is computed."""
    with pytest.raises(ArgumentError) as told:
        HybridPromptCache(load()[0], **given)
    assert said in str(told.value)


@pytest.mark.parametrize("count", [0, -1, 2.5, "2048", True, None])
def test_a_count_is_a_whole_number_of_at_least_one(count):
    """By its name."""
    with pytest.raises(SettingError, match=r"prefill_step_size is .* whole number"):
        HybridPromptCache(load()[0], prefill_step_size=count)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seed": "7"}, "seed is a str; a whole number"),
        ({"seed": -1}, "seed is -1; a whole number from 0"),
        ({"seed": 2**64}, "a whole number from 0 to"),
        ({"sampler": 0.7}, "sampler is a float; a function"),
        ({"logits_processors": len}, "a list of functions"),
        ({"logits_processors": [len, len, 5]}, "logits_processors[2] is an int"),
        ({"prompt_progress_callback": "print"}, "prompt_progress_callback is a str; a function"),
        ({"through": 5}, "through is an int; a function"),
        ({"draft_model": "owner/name"}, "draft_model is 'owner/name', a name. Load it first"),
        ({"draft_model": ("model", "tokenizer")}, "draft_model is a tuple. Take what is in it"),
    ],
)
def test_an_argument_of_another_kind_is_named_before_any_work(given, said):
    """A sampler's temperature for the sampler, one processor for a list of them, a name for a draft model."""
    model, tokenizer = load()
    with HybridPromptCache(model, tokenizer) as cache:
        with pytest.raises(ArgumentError) as told:
            cache.stream_generate("Where is Omar?", max_tokens=1, **given)
        assert said in str(told.value)
        assert cache.stats().nodes == 0


def test_an_empty_directory_is_not_the_current_one():
    """`cache_dir=""`, as of a variable that is not set, would write where the process happens to stand."""
    with pytest.raises(SettingError, match="cache_dir is empty"):
        HybridPromptCache(load()[0], cache_dir="")


@pytest.mark.parametrize(
    ("model", "tokenizer", "said"),
    [
        ("owner/name", None, "model is 'owner/name', a name. Load it first"),
        (Path("/models/x"), None, "Load it first: model, tokenizer = mlx_lm.load"),
        (("model", "tokenizer"), None, "model is a tuple. Take what is in it"),
        (None, None, "model is None"),
        (nn.Linear(2, 2), None, "a Linear, which is no model of mlx-lm"),
        (..., "owner/name", "tokenizer is 'owner/name', a name"),
    ],
)
def test_what_is_no_model_is_refused_with_how_to_get_one(model, tokenizer, said):
    """A name, a path, the pair that `mlx_lm.load` returns, a layer, and a name for the tokenizer."""
    with pytest.raises(ArgumentError) as told:
        HybridPromptCache(load()[0] if model is ... else model, tokenizer)
    assert said in str(told.value)


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("stream_generate", {"max_token": 3}, "Did you mean max_tokens?"),
        ("stream_generate", {"temp": 0.5}, "sampler=mlx_lm.sample_utils.make_sampler"),
        ("stream_generate", {"xyz": 1}, "It knows best_effort, boundaries, cache_salt"),
        ("stream_generate", {"max_tokens": "5"}, "max_tokens is '5'"),
        (
            "prefill",
            {"boundary": [1]},
            "prefill has no keyword 'boundary'. Did you mean boundaries?",
        ),
        ("prefill", {"boundaries": 3}, "boundaries is 3; a list of positions"),
        ("lookup", {"cache_sault": "a"}, "Did you mean cache_salt?"),
        ("lookup", {"cache_salt": b"a"}, "cache_salt is a bytes; text is needed"),
    ],
)
def test_a_wrong_keyword_of_a_call_is_named_with_what_was_meant(cache, method, given, said):
    """Also where mlx-lm's own keywords are taken, and at the call, not in the first `next`."""
    with pytest.raises(ArgumentError) as told:
        getattr(cache, method)([1, 2, 3], **given)
    assert said in str(told.value)
    assert isinstance(told.value, TypeError)


def test_every_keyword_of_mlx_lms_generation_is_known(cache):
    """Those that its two ways of generating have in mlx-lm 0.32, but for what this library decides."""
    import inspect

    from mlx_lm.generate import generate_step, speculative_generate_step

    from mlx_hybridcache.request.options import KEYWORDS

    theirs = {
        name
        for step in (generate_step, speculative_generate_step)
        for name, one in inspect.signature(step).parameters.items()
    }
    ours = {*inspect.signature(cache.stream_generate).parameters, *KEYWORDS}
    assert theirs - ours == {"model", "stream"}
    assert {*inspect.signature(cache.stream_generate).parameters} - {*KEYWORDS} == {
        "prompt",
        "options",
    }


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (b"Say hello.", "bytes. Decode it"),
        (bytearray(b"x"), "bytes. Decode it"),
        ("a\ud800b", "half a surrogate pair at position 1"),
        (None, "The prompt is None. Text or a list of token ids is needed."),
        (5, "The prompt is an int"),
        (Path("prompt.txt"), "The prompt is a PosixPath"),
        ([{"role": "user", "content": "x"}], "apply_chat_template"),
        ([[1, 2], [3]], "has 2 sequences"),
        (np.ones((2, 3), dtype=int), "has 2 sequences"),
        ({"text": [1]}, "without input_ids"),
        (BatchEncoding({"input_ids": [[1, 2], [3, 4]]}), "has 2 sequences"),
        (BatchEncoding({"input_ids": [0, 1], "attention_mask": [0, 1]}), "padding=False"),
        (BatchEncoding({"input_ids": [[0, 1]], "attention_mask": np.array([[0, 1]])}), "padded"),
        ([[[1, 2], [3]]], "has 2 sequences"),
        ([1.5, 2], "token ids"),
    ],
)
def test_a_prompt_of_another_kind_is_refused_by_what_it_is(cache, prompt, said):
    """Bytes were read as ids, one for each; a batch, padding and messages were "neither"."""
    with pytest.raises(PromptError) as told:
        cache.lookup(prompt)
    assert said in str(told.value)


@pytest.mark.parametrize(
    "prompt",
    [
        [3, 4, 5],
        (3, 4, 5),
        range(3, 6),
        iter([3, 4, 5]),
        np.array([3, 4, 5]),
        mx.array([3, 4, 5]),
        [np.int64(3), np.int64(4), np.int64(5)],
        mx.array([[3, 4, 5]]),
        [[3, 4, 5]],
        {"input_ids": [3, 4, 5]},
        BatchEncoding({"input_ids": [3, 4, 5], "attention_mask": [1, 1, 1]}),
        BatchEncoding({"input_ids": np.array([[3, 4, 5]]), "attention_mask": np.ones((1, 3))}),
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_one_sequence_is_read_however_it_is_wrapped(cache, prompt):
    """Three ids as a list, as arrays with and without a batch of one, as transformers returns them."""
    assert cache._prompts.read(prompt, None)[0].tolist() == [3, 4, 5]


def test_what_the_models_own_tokenizer_returns_is_a_prompt(cache):
    """Called, and by its chat template."""
    plain = load()[1]._tokenizer
    messages = [{"role": "user", "content": "Hello."}]
    ids = plain.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    encoded = plain.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert cache._prompts.read(encoded, None)[0].tolist() == ids
    assert (
        cache._prompts.read(plain("Hello."), None)[0].tolist()
        == cache._prompts.read("Hello.", None)[0].tolist()
    )


@pytest.mark.parametrize(("position", "is_inside"), [(0, True), (3, True), (4, False), (-1, False)])
def test_boundaries_lie_inside_the_prompt(cache, position, is_inside):
    """Of three tokens 0 to 3 are positions; what is beyond was passed over in silence."""
    if is_inside:
        cache.prefill([1, 2, 3], boundaries=[position]).release()
    else:
        with pytest.raises(PromptError, match=rf"position {position}; the prompt has 3 tokens"):
            cache.prefill([1, 2, 3], boundaries=[position])


# What is held of a request


def test_caches_are_given_back_at_the_end_of_their_block(cache):
    """Running bytes while it is held, none behind it."""
    with cache.prefill(list(text_tokens(100))) as ready:
        assert cache.stats().running_bytes > 0
        assert repr(ready) == "<Ready at position 99, 0 restored, 1 to read>"
    assert cache.stats().running_bytes == 0


def test_a_reply_ends_with_its_block(cache):
    """Left after two tokens of 500; so it does on an event loop, which goes on meanwhile."""
    prompt = list(text_tokens(100))
    with cache.stream_generate(prompt, 500) as reply:
        assert repr(reply) == "<Generation for 100 tokens, not read yet>" or reply.report
        next(reply), next(reply)
        assert repr(reply) == "<Generation for 100 tokens, 99 restored>"
    assert cache.stats().running_bytes == 0

    async def two():
        async with cache.stream_generate(prompt, 500) as reply:
            return [await anext(aiter(reply)) for _ in range(2)]

    assert len(asyncio.run(two())) == 2
    assert cache.stats().running_bytes == 0


def test_prefilling_on_an_event_loop_gives_the_same_caches(cache):
    """Two at once on one loop; the logits behind them are those of a cold reading."""
    prompts = [list(text_tokens(130)), list(text_tokens(90))]

    async def both():
        return await asyncio.gather(*map(cache.aprefill, prompts))

    for prompt, ready in zip(prompts, asyncio.run(both()), strict=True):
        with ready:
            assert (ready.position, len(ready.rest)) == (len(prompt) - 1, 1)
            hot = tiny.next_logits(load()[0], ready.prompt_cache, ready.rest[0])
            assert mx.array_equal(hot, tiny.cold_logits(load()[0], prompt))


def test_a_prefill_that_is_cancelled_on_a_loop_holds_nothing(cache):
    """At its first slice; what it read stays, its memory does not."""
    prompt = [*text_tokens(700)][::-1]

    async def cancelled():
        began = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_progress(read, total):
            if read:
                loop.call_soon_threadsafe(began.set)

        task = asyncio.create_task(cache.aprefill(prompt, prompt_progress_callback=on_progress))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert cache.lookup(prompt).restored_tokens > 0
    assert cache.stats().running_bytes == 0


# What is left of it


def traces(model):
    """The class of every module, and what it holds that is no weight."""
    return [
        (type(module), sorted(vars(module)), sorted(module.keys())) for module in model.modules()
    ]


def reply(model, tokenizer):
    """Twelve tokens and their log-probabilities by mlx-lm alone."""
    made = list(stream_generate(model, tokenizer, list(text_tokens(90)), 12))
    return [r.token for r in made], mx.stack([r.logprobs for r in made])


def test_a_closed_cache_leaves_the_model_as_it_was():
    """The bundled model's listened-to layers: classes, attributes and replies before and after."""
    model, tokenizer = mlx_lm.load(str(BUNDLED_MODEL))[:2]
    before, said = traces(model), reply(model, tokenizer)
    with HybridPromptCache(model, tokenizer, memory_budget="100MB", **SMALL) as cache:
        assert traces(model) != before, "else this shows nothing"
        list(cache.stream_generate(list(text_tokens(90)), 3))
    assert traces(model) == before
    after = reply(model, tokenizer)
    assert after[0] == said[0]
    assert mx.array_equal(after[1], said[1])


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5", "mamba2", "jamba", "gemma3_text"])
def test_two_caches_on_one_model_leave_it_when_the_last_one_closes(family):
    """The first one's end takes nothing from the second, which still captures or counts."""
    model, prompt = tiny.fresh(family), tiny.random_tokens(200, 1)
    before = traces(model)
    first, second = (HybridPromptCache(model, memory_budget="100MB", **SMALL) for _ in range(2))
    first.close()
    first.close()
    with second:
        with second.prefill(prompt, boundaries=[77]) as ready:
            assert ready.position == 199
        assert second.lookup([*prompt[:77], 1, 2]).restored_tokens == 77
        with second.prefill(prompt) as ready:
            second.save(prompt[:199], ready.prompt_cache)
    assert traces(model) == before
    assert all(type(m).__module__.startswith(("mlx.", "mlx_lm.")) for m in model.modules())


def test_a_copy_of_a_model_in_use_is_a_model_of_its_own():
    """Copied while a cache listens to it, then given one itself: that one's end is enough."""
    model = tiny.fresh("qwen3_next")
    before = traces(model)
    with HybridPromptCache(model, memory_budget="100MB", **SMALL):
        copied = copy.deepcopy(model)
        HybridPromptCache(copied, memory_budget="100MB", **SMALL).close()
        assert traces(copied) == before
        assert traces(model) != before


def test_a_cache_that_was_refused_or_dropped_leaves_the_model_too():
    """A budget below one checkpoint; and one that nobody closed."""
    model = tiny.fresh("qwen3_next")
    before = traces(model)

    def refused():
        with pytest.raises(BudgetError):
            HybridPromptCache(model, memory_budget="1KB")

    refused()
    assert traces(model) == before
    dropped = HybridPromptCache(model, memory_budget="100MB", **SMALL)
    assert traces(model) != before
    del dropped
    assert traces(model) == before


# Which one it is


def test_the_version_is_said_by_the_library_and_every_command(capsys):
    """With mlx and mlx-lm, whose versions matter as much."""
    told = f"mlx-hybridcache {mlx_hybridcache.__version__}, mlx "
    for command, run in (
        (["--version"], main),
        (["serve", "--version"], main),
        (["--version"], lambda argv: serve(argv, "mlx_hybridcache.server")),
    ):
        with pytest.raises(SystemExit) as ended:
            run(command)
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert said.startswith(told)
        assert "mlx-lm " in said
        assert said.count("\n") == 1
