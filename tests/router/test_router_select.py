"""Selection by groups: stable inside a group, the same as ever outside, and the block's own bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import bundled
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from odd_models import moe_blocks, planted

from mlx_hybridcache.errors import RouterError
from mlx_hybridcache.router import (
    Group,
    MoeLayer,
    Patch,
    Routing,
    applied,
    apply,
    calibration_tokens,
    discover,
    listen,
    make_patch,
    moe_layers,
)
from mlx_hybridcache.router.select import TieSafe, breaks_ties_by_index, ordered, select_tie_safe

each_block = pytest.mark.parametrize("name", moe_blocks.NAMES)
with_routing_groups = pytest.mark.parametrize(
    ("name", "grouped"),
    [(name, False) for name in moe_blocks.NAMES]
    + [(name, True) for name in moe_blocks.NAMES if moe_blocks.family_of(name).groups],
)

GROUPS = (Group((0, 2, 3), 2, 2), Group((5, 6), 5, 1))
"""Inside the first and the second of four routing groups. 3 and 6 are beyond their caps."""


def inputs(rows: int = 2, length: int = 30) -> mx.array:
    return mx.random.normal((rows, length, moe_blocks.HIDDEN), key=mx.random.key(4))


def copy_rows(layer: MoeLayer, groups: Sequence[Group]) -> None:
    """What a patch does to the router of a lone block."""
    for name, array in layer.tensors().items():
        holder: Any = layer.block
        *path, last = name.removeprefix("block.").split(".")
        for part in path:
            holder = getattr(holder, part)
        for group in groups:
            array[mx.array(group.members)] = array[group.representative]
        holder[last] = array


def heard(layer: MoeLayer, x: mx.array, **options: Any) -> Routing:
    found: list[Routing] = []
    with listen([layer], found.append, **options):
        mx.eval(layer.block(x))
    return found[0]


def sets(chosen: mx.array) -> np.ndarray[Any, Any]:
    """Experts of each token, ascending."""
    return np.sort(np.array(chosen).astype(np.int64), axis=1)


# Every family


@with_routing_groups
def test_listening_changes_no_bit_and_hears_what_the_block_chose(name: str, grouped: bool) -> None:
    """Output equal, and the chosen are the k highest of the scores that were heard."""
    layer, x = moe_blocks.build(name, grouped=grouped), inputs()
    plain = layer.block(x)
    routing = heard(layer, x)
    assert mx.array_equal(layer.block(x), plain).item()
    scores = np.array(routing.scores.astype(mx.float32))
    best = np.sort(np.argsort(-scores, axis=1)[:, : layer.top_k], axis=1)
    assert (sets(routing.chosen) == best).all()
    assert mx.array_equal(routing.inputs, x.reshape(-1, x.shape[-1])).item()
    rows = layer.router.weight
    expected = routing.inputs @ rows.T + layer.router.get("bias", 0.0)
    assert mx.allclose(routing.logits, expected, atol=1e-4).item()


def test_a_layer_has_one_listener_at_a_time() -> None:
    """A second one is refused, hears nothing, and leaves the first in place."""
    layer, x = moe_blocks.build("mixtral.MixtralSparseMoeBlock"), inputs()
    first: list[Routing] = []
    with listen([layer], first.append):
        with pytest.raises(RouterError, match="listened to already"), listen([layer]):
            pass
        mx.eval(layer.block(x))
    mx.eval(layer.block(x))
    assert len(first) == 1


@with_routing_groups
def test_tokens_that_exceed_no_cap_keep_their_experts_and_others_lose_the_barred(
    name: str, grouped: bool
) -> None:
    """300 tokens on equal rows, with members 3 and 6 beyond their caps. Who had neither keeps all of
    its experts; the CPU may add them up in another order, which is all that its output shows.
    """
    layer, x = moe_blocks.build(name, grouped=grouped), inputs(1, 300)
    copy_rows(layer, GROUPS)
    routing = heard(layer, x)
    own, output = sets(routing.chosen), np.array(layer.block(x))[0]
    for group in GROUPS:
        scores = routing.scores[:, mx.array(group.members)]
        assert (scores == scores[:, :1]).all().item()
    select_tie_safe(layer, GROUPS)
    safe, changed = sets(heard(layer, x).chosen), np.array(layer.block(x))[0]
    exceeded = np.isin(own, [3, 6]).any(axis=1)
    assert 0 < exceeded.sum() < len(exceeded)
    assert (safe[~exceeded] == own[~exceeded]).all()
    np.testing.assert_allclose(changed[~exceeded], output[~exceeded], atol=1e-5)
    assert not np.isin(safe, [3, 6]).any()


@with_routing_groups
def test_groups_within_their_caps_keep_every_bit(name: str, grouped: bool) -> None:
    """Nobody is barred, and this device computes equal rows equally: the block runs as it is."""
    layer, x = moe_blocks.build(name, grouped=grouped), inputs()
    groups = [Group(group.members, group.representative, len(group.members)) for group in GROUPS]
    copy_rows(layer, groups)
    plain = layer.block(x)
    select_tie_safe(layer, groups)
    assert mx.array_equal(layer.block(x), plain).item()


@each_block
def test_without_groups_the_block_is_not_touched(name: str) -> None:
    """Not its class, not its call, not a bit."""
    layer, x = moe_blocks.build(name), inputs()
    kind, plain = type(layer.selector), layer.block(x)
    select_tie_safe(layer, GROUPS)
    assert type(layer.selector) is not kind
    select_tie_safe(layer, ())
    assert type(layer.selector) is kind
    assert mx.array_equal(layer.block(x), plain).item()


# Ties


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_integers_order_scores_by_score_and_then_by_index(dtype: mx.Dtype) -> None:
    """Negative ones, zeros of both signs, infinities and 200 ties: as a stable sort has it."""
    drawn = mx.round(mx.random.normal((4, 256), key=mx.random.key(1)) * 3) / 3
    scores = mx.concatenate([drawn, mx.array([[0.0, -0.0, -mx.inf, 1e-30]] * 4)], axis=1)
    scores = scores.astype(dtype)
    keys = np.array(ordered(scores, mx.arange(260, dtype=mx.int64)))
    assert all(len(set(row)) == 260 for row in keys.tolist())
    expected = np.argsort(np.array(scores.astype(mx.float32)), axis=1, kind="stable")
    assert (np.argsort(keys, axis=1) == expected).all()


@pytest.mark.parametrize("experts", [8, 60, 128, 512])
def test_this_device_breaks_ties_by_index(experts: int) -> None:
    """What is leaned on, looked at; where it does not hold `TieSafe` orders for itself."""
    assert breaks_ties_by_index(experts)
    assert TieSafe.of(experts, GROUPS).order is None


@each_block
def test_a_device_that_breaks_ties_otherwise_gets_the_same_selection(name: str) -> None:
    """With integers in the place of scores: the same experts for every token."""
    layer, x = moe_blocks.build(name), inputs(1, 200)
    copy_rows(layer, GROUPS)
    select_tie_safe(layer, GROUPS)
    by_scores = sets(heard(layer, x).chosen)
    strict = replace(TieSafe.of(layer.count, GROUPS), order=mx.arange(layer.count, dtype=mx.int64))
    layer.selector._tie_safe = strict
    assert (sets(heard(layer, x).chosen) == by_scores).all()


def test_the_choice_does_not_depend_on_the_batch() -> None:
    """A token alone, among 7 and among 300: the same experts."""
    layer, x = moe_blocks.build("qwen3_next.Qwen3NextSparseMoeBlock"), inputs(1, 300)
    copy_rows(layer, GROUPS)
    select_tie_safe(layer, GROUPS)
    together = sets(heard(layer, x).chosen)
    for size in (1, 7):
        parts = [sets(heard(layer, x[:, i : i + size]).chosen) for i in range(0, 300, size)]
        assert (np.concatenate(parts) == together).all()


def test_a_device_that_computes_equal_rows_unequally_still_has_one_score_a_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A linear layer whose columns differ in the last bits, as a kernel's edge might make them."""
    layer, x = moe_blocks.build("mixtral.MixtralSparseMoeBlock"), inputs(1, 300)
    copy_rows(layer, GROUPS)
    plain = nn.Linear.__call__

    def uneven(self: nn.Linear, x: mx.array) -> mx.array:
        y = plain(self, x)
        return y * (1 + 1e-6 * mx.random.normal(y.shape, key=mx.random.key(9)))

    monkeypatch.setattr(nn.Linear, "__call__", uneven)
    own = heard(layer, x)
    select_tie_safe(layer, GROUPS)
    first, second = ((sets(own.chosen) == member).any(axis=1) for member in (0, 2))
    assert (second & ~first).any()  # the higher index without the lower one: noise decided
    chosen = sets(heard(layer, x).chosen)
    alone = (chosen == 0).any(axis=1) ^ (chosen == 2).any(axis=1)
    assert alone.any()
    assert len({tuple(np.intersect1d(row, (0, 2))) for row in chosen[alone]}) == 1


# Whole models


@cache
def rows() -> list[list[int]]:
    return calibration_tokens(bundled.load()[1], rows=8, row_tokens=128)


def routings(model: Any, tokens: list[list[int]], **options: Any) -> list[np.ndarray[Any, Any]]:
    """Experts of each token, ascending, layer by layer."""
    found: list[Routing] = []
    with listen(moe_layers(model), found.append, **options):
        mx.eval(model(mx.array(tokens)))
    return [sets(routing.chosen) for routing in found]


def as_groups(chosen: np.ndarray[Any, Any], groups: Sequence[Group]) -> np.ndarray[Any, Any]:
    """The same with every member called by its group's first: what is left when members are one."""
    names = np.arange(64)
    for group in groups:
        names[list(group.members)] = group.members[0]
    return np.sort(names[chosen], axis=1)


def noise(size: float) -> Callable[[MoeLayer, mx.array], mx.array]:
    """Normal noise on every logit."""

    def noisy(layer: MoeLayer, logits: mx.array) -> mx.array:
        return logits + size * mx.random.normal(logits.shape, key=mx.random.key(layer.index))

    return noisy


COPIES = {i: {2: (0, planted.exact), 5: (3, planted.exact)} for i in range(4)}


def planted_patch(row_noise: float) -> tuple[Any, Patch]:
    model = planted.bundled()
    for layer in moe_layers(model):
        planted.plant(layer, COPIES[layer.index], row_noise=row_noise)
    return model, discover(model, rows()).patch


def test_no_flip_inside_a_group_is_left_and_every_other_selection_stays() -> None:
    """Noise of 1e-5 on the logits of the bundled model with copies in every layer.

    Before the patch it swaps members of a group for some 500 of 4,096 choices, afterwards for none.
    Groups and other experts are chosen as before, for every token in every layer.
    """
    model, patch = planted_patch(row_noise=1e-6)
    before, noisy_before = routings(model, rows()), routings(model, rows(), logits=noise(1e-5))
    apply(model, patch)
    after, noisy_after = routings(model, rows()), routings(model, rows(), logits=noise(1e-5))
    inside_before = inside_after = 0
    for i, layer in enumerate(patch.layers):
        outside = as_groups(before[i], layer.groups)
        for other in (noisy_before[i], after[i], noisy_after[i]):
            assert (as_groups(other, layer.groups) == outside).all()
        inside_before += int((before[i] != noisy_before[i]).any(axis=1).sum())
        inside_after += int((after[i] != noisy_after[i]).any(axis=1).sum())
    assert inside_before > 100
    assert inside_after == 0


def test_exact_copies_with_equal_rows_keep_every_bit_of_every_logit() -> None:
    """A patch that has nothing to change changes nothing, groups or not."""
    model, _ = planted_patch(row_noise=0.0)
    groups = {layer.name: [Group((0, 2), 2, 2), Group((3, 5), 3, 2)] for layer in moe_layers(model)}
    patch = make_patch(model, groups, method="by hand")
    plain = model(mx.array(rows()[:2]))
    mx.eval(plain)
    assert apply(model, patch) == 0
    assert mx.array_equal(model(mx.array(rows()[:2])), plain).item()


def test_a_cap_keeps_a_group_from_taking_more_than_it_took() -> None:
    """Expert 2 becomes expert 0 in all but its row, and gets the row too. Weights alone let both in
    wherever 0 was chosen; with a cap of one, tokens that did not choose 2 keep their experts.
    """
    model = planted.random_model(16, top_k=4, layers=1)
    tokens = planted.random_rows(4, 128)
    before = routings(model, tokens)[0]
    patch = make_patch(model, {moe_layers(model)[0].name: [Group((0, 2), 0, 1)]}, method="by hand")
    apply(model, patch, tie_safe=False)
    weights_only = routings(model, tokens)[0]
    apply(model, patch)
    capped = routings(model, tokens)[0]
    kept = ~(before == 2).any(axis=1)
    had = (before == 0).any(axis=1)
    assert (kept & had).any()
    assert (weights_only[kept & had] == 2).any(axis=1).mean() > 0.9
    assert (capped[kept] == before[kept]).all()


def test_nothing_changes_bit_for_bit_when_nothing_was_planted() -> None:
    """The bundled model as it is: no groups, no row, no class, no bit."""
    model = planted.bundled()
    plain = model(mx.array(rows()[:2]))
    mx.eval(plain)
    patch = discover(model, rows()).patch
    assert patch.groups == 0
    assert apply(model, patch) == 0
    assert {type(layer.block).__module__ for layer in moe_layers(model)} == {
        "mlx_lm.models.qwen3_next"
    }
    assert mx.array_equal(model(mx.array(rows()[:2])), plain).item()


def test_every_family_of_the_tiny_models_takes_a_patch_and_decodes() -> None:
    """Hybrid and not: prefill in one go and token by token have the same logits."""
    for name in ("qwen3_next", "qwen3_5_moe", "qwen3_moe", "jamba", "gpt_oss", "deepseek_v3"):
        model = tiny.fresh(name)
        groups = {layer.name: [Group((0, 2), 2, 1)] for layer in moe_layers(model)}
        patch = make_patch(model, groups, method="by hand")
        tokens = tiny.random_tokens(20, 3)
        plain = tiny.cold_logits(model, tokens)
        assert apply(model, patch) == len(groups)
        assert applied(model) == patch.digest
        patched = tiny.cold_logits(model, tokens)
        assert not mx.array_equal(patched, plain).item(), name
        assert mx.allclose(tiny.cold_logits(model, tokens, step=5), patched, atol=1e-4).item()
        assert apply(model, patch) == 0
        assert mx.array_equal(tiny.cold_logits(model, tokens), patched).item()


# What is refused


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mamba2"])
def test_a_dense_model_is_refused(name: str) -> None:
    """It says what it is, and that nothing is routed."""
    with pytest.raises(RouterError, match="no mixture-of-experts layer"):
        moe_layers(tiny.build(name))


def test_an_unknown_block_is_refused_by_name() -> None:
    """Llama 4 weighs what its experts read, not what they give: the table does not describe that."""
    with pytest.raises(RouterError, match=r"llama4\.MoE"):
        moe_layers(tiny.build("llama4"))


def test_a_block_that_is_not_built_as_the_table_says_is_refused() -> None:
    """One row less in a router."""
    model = tiny.fresh("deepseek_v3")
    gate = model.layers[1].mlp.gate
    gate.e_score_correction_bias = gate.e_score_correction_bias[:-1]
    with pytest.raises(RouterError, match=r"not built as this version knows it"):
        moe_layers(model)


def change_expert(model: Any) -> None:
    experts = moe_layers(model)[1].experts.up_proj
    experts.weight = experts.weight * 1.0001


def change_router(model: Any) -> None:
    router = moe_layers(model)[1].router
    router.weight = router.weight * 1.0001


def change_elsewhere(model: Any) -> None:
    model.model.norm.weight = model.model.norm.weight * 1.0001


@pytest.mark.parametrize("change", [change_expert, change_router, change_elsewhere])
def test_a_patch_for_another_model_is_refused_and_changes_nothing(
    change: Callable[[Any], None],
) -> None:
    """The same shapes, other numbers: in one expert, in one router, in a norm."""
    model = tiny.fresh("qwen3_moe")
    groups = {layer.name: [Group((0, 2), 2, 1)] for layer in moe_layers(model)}
    patch = make_patch(model, groups, method="by hand")
    change(model)
    tokens = mx.array([tiny.random_tokens(20, 3)])
    plain = model(tokens)
    with pytest.raises(RouterError, match="another model"):
        apply(model, patch)
    assert mx.array_equal(model(tokens), plain).item()


def test_a_patch_for_another_family_is_refused() -> None:
    """Qwen3-Next's for Qwen3-MoE."""
    patch = make_patch(tiny.build("qwen3_next"), {}, method="by hand")
    with pytest.raises(RouterError, match="another model"):
        apply(tiny.fresh("qwen3_moe"), patch)


def test_groups_for_a_layer_that_does_not_exist_are_refused() -> None:
    """A name that no MoE layer has."""
    with pytest.raises(RouterError, match="no MoE layer nowhere"):
        make_patch(tiny.build("qwen3_moe"), {"nowhere": [Group((0, 1), 0, 1)]}, method="by hand")
