"""The plan, beside bytes that are really allocated, and the server's flags for it."""

import gc
import json
import random
from dataclasses import asdict

import bundled
import mlx.core as mx
import mlx_lm
import pytest
import tiny
from large_models import known_models
from large_models.plans import AMPLE, EIGHT_BITS, MIB, mac_plan, near, plan_of
from mlx_hybridcache_bench.kit.standin import VOCABULARY, StandIn
from mlx_hybridcache_bench.policies.simulate import SPACE, Simulation
from mlx_hybridcache_bench.policies.sized import SHAPES
from mlx_hybridcache_bench.policies.workloads import Chance, Talk
from mlx_hybridcache_server.settings import build_parser, read_settings
from mlx_lm.utils import quantize_model, save_config, save_model

from mlx_hybridcache import HybridPromptCache, models
from mlx_hybridcache.caches.kinds.smaller import smaller
from mlx_hybridcache.caches.layout import Layout
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.errors import ModelError
from mlx_hybridcache.planning.advice import advice, server_flags
from mlx_hybridcache.planning.plan import Room, make
from mlx_hybridcache.planning.unloaded_model import INDEX, describe
from mlx_hybridcache.store.store import Store


def active():
    """Bytes that MLX holds, garbage collected."""
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


def measured(model, prompt, max_tokens):
    """Bytes that a prefilled request's caches take, and what it left stored; checkpoints stored."""
    before = active()
    with HybridPromptCache(model, memory_budget="1TiB") as cache:
        ready = cache.prefill(prompt, max_tokens=max_tokens)
        running = active()
        ready.release()
        del ready
        stored = active()
        return running - stored, stored - before, cache.stats().checkpoints


@pytest.mark.parametrize("name", list(known_models.CONFIGS))
def test_a_plan_from_the_config_agrees_with_bytes_really_allocated(tmp_path, name):
    """4,096 tokens at the published cache shapes: the caches and what they leave, within 1 %."""
    plan = plan_of(known_models.directory(tmp_path, name), 4096)
    shapes = known_models.SHAPES[name]
    assert plan.layout.row_bytes == near(shapes.row_bytes)
    assert plan.layout.snapshot_bytes == near(shapes.snapshot_bytes)

    generator = random.Random(7)
    prompt = [generator.randrange(VOCABULARY) for _ in range(4096)]
    live, stored, checkpoints = measured(StandIn(shapes), prompt, 256)
    assert plan.running_bytes == near(live)
    assert plan.checkpoints == checkpoints
    assert plan.conversation_bytes == near(stored)
    assert plan.occupancy(1).peak_bytes == near(live + stored)
    assert plan.occupancy(4).live_bytes == near(4 * live)


def test_the_plan_of_the_bundled_model_agrees_with_bytes_really_allocated():
    """Its weights as they are loaded, and four requests of 3,000 tokens at once."""
    plan = plan_of(BUNDLED_MODEL, 3000)
    before = active()
    model, _ = mlx_lm.load(str(BUNDLED_MODEL))[:2]
    models.evaluate(model)
    assert plan.model.weights_bytes == near(active() - before)

    prompt = list(bundled.text_tokens(3000))
    live, stored, checkpoints = measured(model, prompt, 256)
    assert plan.running_bytes == near(live)
    assert plan.checkpoints == checkpoints
    assert plan.conversation_bytes == near(stored)

    with HybridPromptCache(model, memory_budget="1TiB") as cache:
        cache.prefill(prompt, max_tokens=256).release()
        before = active()
        running = [cache.prefill(prompt, max_tokens=256) for _ in range(4)]
        assert plan.occupancy(4).live_bytes == near(active() - before)
        assert cache.stats().running_bytes == plan.occupancy(4).live_bytes
        for each in running:
            each.release()


def test_four_replies_in_one_batch_claim_what_the_plan_says(monkeypatch):
    """992 tokens and replies of 32: the most that is claimed at once is the plan's, less the padding."""
    plan = plan_of(BUNDLED_MODEL, 992, max_tokens=32)
    model, tokenizer = bundled.load()
    most = []

    def noting(claim):
        def noted(store, *arguments):
            held = claim(store, *arguments)
            most.append(store.budget.running_bytes)
            return held

        return noted

    for name in ("claim", "claim_free"):
        monkeypatch.setattr(Store, name, noting(getattr(Store, name)))
    prompts = [list(bundled.text_tokens(992, start)) for start in (0, 1000, 2000, 3000)]
    with HybridPromptCache(model, tokenizer, memory_budget="1TiB") as cache:
        for prompt in prompts:
            cache.prefill(prompt).release()
        most.clear()
        replies = [
            cache.stream_generate(prompt, 32, sampler=lambda x: mx.full(x.shape[:-1], 7))
            for prompt in prompts
        ]
        assert len(list(zip(*replies, strict=True))) == 32  # taken in turns, so none is set apart
    bound = plan.occupancy(4).joined_bytes
    assert 0.95 * bound < max(most) <= bound
    assert max(most) > plan.occupancy(4).live_bytes


@pytest.mark.parametrize("requests", [1, 3])
def test_what_is_needed_is_enough_to_be_served(requests):
    """So many prompts of 1,500 tokens at once in that budget: none is refused, and the last resumes near its end."""
    plan = plan_of(BUNDLED_MODEL, 1500, max_tokens=8)
    model, tokenizer = bundled.load()
    prompts = [list(bundled.text_tokens(1500, 1600 * index)) for index in range(requests)]
    needed = plan.occupancy(requests).needed_bytes
    with HybridPromptCache(model, tokenizer, memory_budget=needed, memory_reserve=0) as cache:
        replies = [
            cache.stream_generate(prompt, 8, sampler=lambda x: mx.full(x.shape[:-1], 7))
            for prompt in prompts
        ]
        assert len(list(zip(*replies, strict=True))) == 8
        next_turns = [[*prompt, *[7] * 8, 9] for prompt in prompts]
        assert max(cache.lookup(turn).restored_tokens for turn in next_turns) >= 1436
        assert cache.stats().held_bytes <= needed


def test_a_large_model_is_planned_without_its_memory(tmp_path):
    """Qwen3-Next-80B in 8 bits, 85 GB: MLX allocates less than a megabyte for it."""
    path = known_models.directory(tmp_path, "qwen3-next-80b", **EIGHT_BITS)
    before = active()
    mx.reset_peak_memory()
    plan = plan_of(path, 120_000)
    assert mx.get_peak_memory() - before < MIB
    assert 84e9 < plan.model.weights_bytes < 86e9
    assert (plan.layout.row_bytes, round(plan.layout.snapshot_bytes / MIB)) == (24 * 1024, 74)


def test_a_smaller_store_is_planned_in_its_bytes(tmp_path):
    """Qwen3-Next-80B: a stored token of 12.4 KiB instead of 24, a checkpoint of 20 MiB instead of 74."""
    model = describe(known_models.directory(tmp_path, "qwen3-next-80b", **EIGHT_BITS))
    sizes = {"context": 120_000, "max_tokens": 0, "step": 2048, "every": 2048}
    room = Room(2**36, None, "as given")
    full = make(model, room, **sizes)
    small = make(model, room, **sizes, storing=smaller(8, "int8"))
    assert small.layout.stored_row_bytes == 24 * 1024 * 132 // 256
    assert round(small.layout.stored_snapshot_bytes / MIB) == 20
    assert small.running_bytes == full.running_bytes
    assert small.conversation_bytes < 0.4 * full.conversation_bytes
    assert server_flags(small)[-6:-2] == ["--store-kv", "8", "--store-state", "int8"]
    assert "--store-kv" not in server_flags(full)


@pytest.mark.parametrize("name", list(known_models.CONFIGS))
def test_weights_are_counted_from_the_config(tmp_path, name):
    """Two bytes a parameter in bfloat16, as many parameters as the name says."""
    model = describe(known_models.directory(tmp_path, name))
    assert model.weights_bytes / 2 == pytest.approx(known_models.PARAMETERS[name], rel=0.02)
    assert model.longest_context == 262_144


@pytest.mark.parametrize("name", list(tiny.FAMILIES))
def test_a_traced_layout_is_the_one_that_the_engine_learns(name):
    """Every family: kinds, classes, hook and vocabulary, with and without full windows."""
    model = tiny.build(name)
    for swa_full in (False, True):
        traced, real = (of(model, 64, swa_full=swa_full) for of in (Layout.traced, Layout.of))
        for field in ("kinds", "classes", "unsupported", "alignment", "vocabulary", "must_pause"):
            assert getattr(traced, field) == getattr(real, field)


def test_a_forward_that_asks_for_numbers_is_refused_not_computed(tmp_path):
    """`.item()` in a forward would read 160 GB: inside the trace MLX raises."""
    model = describe(known_models.directory(tmp_path, "qwen3-next-80b"))
    call = type(model.model).__call__

    class Asks(type(model.model)):
        def __call__(self, *arguments, **options):
            call(self, *arguments, **options).sum().item()

    object.__setattr__(model.model, "__class__", Asks)
    with pytest.raises(ModelError, match=r"cannot be told .* eval an array during function"):
        make(model, AMPLE, context=1000, max_tokens=0, step=2048, every=2048)


def test_an_unknown_cache_class_is_said(tmp_path):
    """A model that no request can be stored of has no plan."""
    model = describe(str(BUNDLED_MODEL))
    model.model.make_cache = lambda: [type("OddCache", (), {"state": ()})()] * 4

    class Odd(type(model.model)):
        def __call__(self, inputs, cache):
            return mx.zeros((1, 1, 8))

    object.__setattr__(model.model, "__class__", Odd)
    with pytest.raises(ModelError, match="OddCache, which this version cannot store"):
        make(model, AMPLE, context=1000, max_tokens=0, step=2048, every=2048)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A quantized Qwen3-Next as mlx-lm saves it, in shards, with the bytes that it takes in memory."""
    path = tmp_path_factory.mktemp("saved")
    model = tiny.fresh("qwen3_next")
    model, config = quantize_model(model, asdict(model.args), 32, 4)
    save_model(path, model)
    save_config(config, path / "config.json")
    mx.eval(model.parameters())
    return path, models.parameter_bytes(model)


def test_weights_are_read_from_the_files_headers(saved):
    """Mixed 4 and 8 bits: exact."""
    path, nbytes = saved
    found = describe(str(path))
    assert (found.weights_bytes, found.weights_from) == (
        nbytes,
        "the headers of its safetensors files",
    )


def test_without_the_files_weights_are_those_of_the_index_or_the_config(saved, tmp_path):
    """The same number thrice; a download that is not complete counts as none."""
    path, nbytes = saved
    for name in ("config.json", INDEX):
        (tmp_path / name).write_bytes((path / name).read_bytes())
    from_index = describe(str(tmp_path))
    assert (from_index.weights_bytes, from_index.weights_from) == (nbytes, f"its {INDEX}")
    (tmp_path / INDEX).unlink()
    from_config = describe(str(tmp_path))
    source = "the shapes that its configuration gives"
    # The tiny model computes in float32, which its configuration does not say.
    config = json.loads((tmp_path / "config.json").read_text())
    assert from_config.notes == ("Its configuration names no dtype: bfloat16 is assumed.",)
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    from_config = describe(str(tmp_path))
    assert (from_config.weights_bytes, from_config.weights_from) == (nbytes, source)
    assert from_config.notes == ()
    # Without a word of each layer, those that mlx-lm keeps at 8 bits are known by their family.
    short = {key: config["quantization"][key] for key in ("group_size", "bits")}
    config |= {"dtype": "float32", "quantization": short}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe(str(tmp_path)).weights_bytes == nbytes


def test_as_many_conversations_fit_as_the_real_store_keeps(tmp_path):
    """Six of 120,000 tokens read in turn on a Mac with 128 GB: the last four resume near their ends."""
    plan = mac_plan(known_models.directory(tmp_path, "qwen3-next-80b", **EIGHT_BITS), 128, 120_000)
    chance = Chance(1)
    trace = []
    for index in range(6):
        talk = Talk(str(index), chance)
        talk.say("user", chance.text(119_992))
        trace.append(talk.ask(8192))
    simulation = Simulation(trace, SHAPES["qwen3-next-80b"], plan.room.budget_bytes)
    for index in range(6):
        simulation.serve(index)
    kept = [simulation.store.find(SPACE, asked.tokens).position > 114_000 for asked in trace]
    assert kept.count(True) == plan.conversations(plan.least_conversation_bytes) == 4


# What is said


def test_the_flags_are_the_servers_own_and_mean_the_plan(tmp_path):
    """A Mac with 128 GB, 120,000 tokens: four at once, nearly all of the budget."""
    path = known_models.directory(tmp_path, "qwen3-next-80b", **EIGHT_BITS)
    plan = mac_plan(path, 128, 120_000)
    settings = read_settings(build_parser("serve"), server_flags(plan))
    assert settings.model == path
    assert 0.98 * plan.room.budget_bytes < settings.memory_budget <= plan.room.budget_bytes
    assert (settings.decode_concurrency, settings.prompt_concurrency) == (4, 4)
    assert settings.max_prompt_tokens is None
    assert settings.cache_dir is not None


@pytest.mark.parametrize("memory", [90, 110, 112, 118, 128, 192, 512])
def test_what_the_flags_allow_fits_into_the_budget(tmp_path, memory):
    """So many requests of the planned length, and one of the longest that is let in."""
    path = known_models.directory(tmp_path, "qwen3-next-80b", **EIGHT_BITS)
    plan = mac_plan(path, memory, 30_000)
    if not plan.fits:
        assert server_flags(plan) == []
        return
    settings = read_settings(build_parser("serve"), server_flags(plan))
    assert plan.occupancy(settings.decode_concurrency).needed_bytes <= plan.room.budget_bytes
    longest = mac_plan(path, memory, settings.max_prompt_tokens or 262_144)
    assert longest.occupancy(1).needed_bytes <= plan.room.budget_bytes
    if settings.max_prompt_tokens is not None:
        beyond = mac_plan(path, memory, settings.max_prompt_tokens + 256)
        assert beyond.occupancy(1).needed_bytes > plan.room.budget_bytes


def test_what_does_not_fit_is_said_with_what_to_do(tmp_path):
    """Weights beyond the machine; a prompt too long; three at most; a batch too many."""
    path = known_models.directory(tmp_path, "qwen3-next-80b", **EIGHT_BITS)
    (said,) = advice(mac_plan(path, 64, 120_000))
    assert "weights alone (78.8 GiB) do not fit into the 48.0 GiB" in said
    too_long, more = advice(mac_plan(path, 110, 200_000))
    assert "One request of 200,000 tokens needs 5.3 GiB" in too_long
    assert "Up to 119,296 tokens fit" in too_long
    assert "iogpu.wired_limit_mb" in more
    assert "3 do: the flags let the others wait" in advice(mac_plan(path, 120, 120_000))[0]
    assert "replies are written in turns" in advice(mac_plan(path, 128, 120_000))[0]
    assert advice(mac_plan(path, 512, 120_000)) == []
    assert "longest context of 262,144" in advice(mac_plan(path, 512, 300_000))[0]
