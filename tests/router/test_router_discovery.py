"""Discovery finds the copies that were planted, and nothing where nothing was."""

from __future__ import annotations

from functools import cache
from typing import Any

import bundled
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx_lm.models.switch_layers import SwitchGLU
from odd_models import moe_blocks, planted

from mlx_hybridcache.errors import RouterError, SettingError
from mlx_hybridcache.router import (
    Discovery,
    Patch,
    apply,
    calibration_tokens,
    discover,
    moe_layers,
    random_groups,
)
from mlx_hybridcache.router.discovery.experts import LayerBank, NullBank

PLANTED = {
    0: {2: (0, planted.exact), 5: (3, planted.noise(1e-4))},
    1: {7: (1, planted.noise(1e-3)), 6: (2, planted.noise(1e-2))},
    2: {1: (0, planted.flipped_signs), 2: (0, planted.scaled), 7: (4, planted.shuffled)},
    3: {5: (1, planted.negated), 6: (2, planted.doubled)},
}
"""Layer -> copies. The last layer's are other functions, which are not to be found."""

TRUTH = [[(0, 2), (3, 5)], [(1, 7), (2, 6)], [(0, 1, 2), (4, 7)], []]


def members(patch: Patch) -> list[list[tuple[int, ...]]]:
    """The groups of each layer, members only."""
    return [[group.members for group in layer.groups] for layer in patch.layers]


@cache
def bundled_rows() -> list[list[int]]:
    return calibration_tokens(bundled.load()[1], rows=8, row_tokens=128)


@cache
def bundled_copies() -> Any:
    return planted.bundled(PLANTED)


def found(**options: Any) -> Discovery:
    return discover(bundled_copies(), bundled_rows(), **options)


def test_outputs_finds_exactly_what_was_planted() -> None:
    """Exact, noisy, sign-flipped, scaled and shuffled copies; not negated nor doubled ones."""
    assert members(found().patch) == TRUTH


def test_a_threshold_finds_the_copies_within_it() -> None:
    """At 1 % the copies with noise of 1e-2 are no copies, at 0.1 % those with 1e-3 are none either."""
    at_one_percent = [TRUTH[0], [(1, 7)], TRUTH[2], []]
    assert members(found(threshold=0.01).patch) == at_one_percent
    assert members(found(threshold=0.001).patch) == [TRUTH[0], [], TRUTH[2], []]


def test_copies_among_64_random_experts_are_found_and_nothing_else() -> None:
    """Three copies of one expert, one of another, in each layer."""
    model = planted.random_model(64)
    copies = {9: (4, planted.exact), 30: (4, planted.noise(1e-3)), 63: (4, planted.shuffled)}
    copies |= {22: (50, planted.noise(1e-2))}
    for layer in planted.moe_layers(model):
        planted.plant(layer, copies)
    seen = discover(model, planted.random_rows(16, 128))
    assert members(seen.patch) == [[(4, 9, 30, 63), (22, 50)]] * 2
    assert seen.null_coverage == 0


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_next",
        "qwen3_5_moe",
        "qwen3_moe",
        "jamba",
        "granitemoehybrid",
        "gpt_oss",
        "deepseek_v3",
    ],
)
def test_copies_are_found_in_every_family(name: str) -> None:
    """Shared experts, biases, correction biases, hybrid layers: expert 3 is 1, in each MoE layer."""
    model = tiny.fresh(name)
    for layer in moe_layers(model):
        planted.clone(layer, {3: 1})
    seen = discover(model, planted.random_rows(8, 64), min_tokens=1)
    assert members(seen.patch) == [[(1, 3)]] * len(seen.layers)
    assert seen.null_coverage == 0


@pytest.mark.parametrize(
    ("group_size", "bits", "mode"),
    [(64, 4, "affine"), (64, 8, "affine"), (32, 4, "mxfp4"), (32, 8, "mxfp8"), (16, 4, "nvfp4")],
)
def test_copies_are_found_among_quantized_experts(group_size: int, bits: int, mode: str) -> None:
    """The bundled model with copies, routers quantized too; the null model's experts are as well."""
    model = planted.bundled()
    for layer in moe_layers(model):
        planted.clone(layer, {2: 0, 5: 3})
    nn.quantize(
        model, group_size, bits, mode=mode, class_predicate=lambda _, m: hasattr(m, "to_quantized")
    )
    seen = discover(model, bundled_rows(), min_tokens=1)
    assert members(seen.patch) == [[(0, 2), (3, 5)]] * 4
    assert seen.null_coverage == 0
    assert apply(model, seen.patch) == 0


def test_a_null_model_knows_weights_with_a_scale_of_their_own() -> None:
    """nvfp4 with a scale for each expert, which only a GPU runs; its null experts run anywhere."""
    layer = moe_blocks.build("mixtral.MixtralSparseMoeBlock")
    experts = SwitchGLU(32, 64, 16)
    for name in ("gate_proj", "up_proj", "down_proj"):
        experts[name] = experts[name].to_quantized(16, 4, mode="nvfp4", global_scale=True)
    layer.block.switch_mlp = experts
    outputs = NullBank(layer, 0).outputs(mx.random.normal((8, 32)), range(16))
    assert outputs.shape == (8, 16, 32)
    assert 0 < mx.abs(outputs).max().item() < 100
    assert experts.up_proj.global_scale is not None


@pytest.mark.parametrize("name", moe_blocks.NAMES)
def test_a_null_model_s_experts_are_of_the_layer_s_own_size_and_alike_in_nothing(name: str) -> None:
    """16 random experts of every family: outputs of the same shape and size, no two near each other."""
    layer = moe_blocks.build(name)
    x = mx.random.normal((40, moe_blocks.HIDDEN), key=mx.random.key(2))
    own = np.array(LayerBank(layer).outputs(x, range(16)))
    null = np.array(NullBank(layer, 0).outputs(x, range(16)))
    assert null.shape == own.shape
    assert 0.3 < null.std() / own.std() < 3
    assert (NullBank(layer, 0).outputs(x, [11, 2]) == mx.array(null[:, [11, 2]])).all().item()
    flat = null.swapaxes(0, 1).reshape(16, -1)
    flat = flat - flat.mean(axis=0)
    near = np.corrcoef(flat) - np.eye(16)
    assert np.abs(near).max() < 0.5


def test_nothing_is_found_in_an_untouched_random_model() -> None:
    """64 experts, 2 layers: coverage 0, and 0 on its null model."""
    seen = discover(planted.random_model(64), planted.random_rows(8, 128))
    assert (seen.coverage, seen.null_coverage, seen.patch.groups) == (0, 0, 0)


def test_scores_group_random_experts_too_and_say_so() -> None:
    """On this model's inputs the published calibration covers a good part of its null model."""
    seen = found(method="scores")
    assert seen.null_coverage > 0.25
    assert found().null_coverage == 0


def test_scores_take_other_functions_for_copies() -> None:
    """A negated expert with a copied row has its source's scores, so it counts as equal."""
    assert members(found(method="scores").patch)[3] == [(1, 5), (2, 6)]


def test_experts_with_too_few_tokens_are_left_alone_and_counted() -> None:
    """No expert is chosen by 5,000 of 512 held-out tokens."""
    seen = found(min_tokens=5000)
    assert (seen.unseen, seen.patch.groups) == (32, 0)


def test_discovery_repeats_itself() -> None:
    """The same model and tokens give the same patch, down to its digest."""
    assert found().patch.digest == found().patch.digest


@pytest.mark.parametrize("rows", [[], [[1, 2, 3]], [[1, 2, 3], [1, 2]], [[], []]])
def test_rows_must_be_two_or_more_of_one_length(rows: list[list[int]]) -> None:
    """The odd ones are held out, so one row cannot do."""
    with pytest.raises(SettingError, match="two or more rows"):
        discover(bundled_copies(), rows)


def test_an_unknown_method_and_no_evidence_are_refused() -> None:
    """There are outputs and scores, and each needs tokens."""
    with pytest.raises(SettingError, match="at least 1"):
        found(min_tokens=0)
    with pytest.raises(SettingError, match="outputs and scores"):
        found(method="hopes")


def test_a_model_that_the_device_cannot_run_is_said() -> None:
    """bfloat16 experts on MLX's CPU backend."""
    if mx.default_device() != mx.cpu:
        pytest.skip("a GPU runs them")
    model = planted.random_model(8, layers=1)
    model.set_dtype(mx.bfloat16)
    with pytest.raises(RouterError, match="cannot be run on this device"):
        discover(model, planted.random_rows(2, 16))
    plain = {type(layer.block).__mro__[0].__name__ for layer in moe_layers(model)}
    assert plain == {"Qwen3MoeSparseMoeBlock"}


def test_cost_is_linear_in_layers_and_in_experts_and_pairs_are_quadratic() -> None:
    """Counted, not timed: runs of one expert on one token, and pairs of fingerprints."""
    rows = planted.random_rows(8, 128)

    def work(experts: int, layers: int) -> tuple[int, int]:
        seen = discover(planted.random_model(experts, layers=layers), rows, min_tokens=1)
        return (
            sum(layer.expert_tokens for layer in seen.layers),
            sum(layer.pairs for layer in seen.layers),
        )

    runs, pairs = work(8, 2)
    assert work(8, 6) == (3 * runs, 3 * pairs)
    assert work(32, 2) == (4 * runs, 2 * 32 * 31 // 2)


def test_the_worst_case_is_quadratic_in_experts() -> None:
    """All experts copies of one: four times as many experts, at most 16 times the runs."""
    rows = planted.random_rows(8, 128)

    def runs(experts: int) -> int:
        model = planted.random_model(experts, layers=1)
        (layer,) = moe_layers(model)
        copies = dict.fromkeys(range(1, experts), (0, planted.exact))
        planted.plant(layer, copies, row_noise=1.0)
        seen = discover(model, rows, min_tokens=1)
        (found,) = seen.layers
        assert (found.groups, found.members) == (1, experts - found.unseen)
        assert found.unseen <= 1  # the source itself, whose row is the smallest
        return found.expert_tokens

    few = runs(8)
    assert 4 * few < runs(32) <= 16 * few


def test_memory_does_not_grow_with_layers() -> None:
    """Six layers take what two take, within a tenth: nothing of a layer outlives it."""
    rows = planted.random_rows(8, 128)

    def peak(layers: int) -> int:
        seen = discover(planted.random_model(16, layers=layers), rows)
        return max(layer.peak_bytes for layer in seen.layers)

    assert peak(6) < 1.1 * peak(2)


def test_no_group_reaches_from_one_routing_group_into_another() -> None:
    """DeepSeek V3 with experts 0 to 3 in two routing groups: 1 is found to be 0, 2 is not though it is."""
    model = tiny.fresh("deepseek_v3")
    (layer,) = moe_layers(model)
    layer.selector.n_group = 2
    planted.plant(layer, {1: (0, planted.exact), 2: (0, planted.exact)})
    assert members(discover(model, planted.random_rows(8, 64)).patch) == [[(0, 1)]]


def test_random_groups_have_the_same_sizes_and_caps() -> None:
    """The control of the same shape: as many, as large, of other experts."""
    patch = found().patch
    drawn = random_groups(bundled_copies(), patch, seed=1)
    for one, other in zip(patch.layers, drawn.layers, strict=True):
        assert [(len(g.members), g.cap) for g in one.groups] == [
            (len(g.members), g.cap) for g in other.groups
        ]
    assert members(drawn) != members(patch)
    assert drawn.model == patch.model
