"""`bench router`: the models it plants, and the command with the real server."""

import json
from pathlib import Path
from typing import Any

import bundled
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_hybridcache_bench.cli import main
from mlx_hybridcache_bench.router import command as router
from mlx_hybridcache_bench.router.cloned import clone_experts
from mlx_hybridcache_bench.router.kinds import ALPHABET, kinds
from mlx_hybridcache_bench.router.models import Size
from mlx_hybridcache_bench.router.servers import ServerLoad
from mlx_hybridcache_bench.router.specialised import COPIES, held_out_texts, specialised

from mlx_hybridcache import ModelError
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.router import discover, moe_layers
from mlx_hybridcache.router.trial.arms import CANONICALIZED, ORIGINAL


def perplexity(model: Any, texts: list[list[int]]) -> float:
    tokens = mx.array(texts)
    logits = model(tokens[:, :-1])
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return float(mx.exp(-mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()))


def test_the_kinds_of_text_are_eight_and_held_out() -> None:
    """Four fifths of each are counted, and one is not."""
    assert len(kinds()) == len(COPIES) == 8
    for counted, held_out in kinds().values():
        assert len(counted) > 3 * len(held_out) > 0
        assert 0 <= counted.min() <= counted.max() < len(ALPHABET)


def test_a_specialised_model_needs_each_of_its_experts() -> None:
    """It predicts text that it never saw; experts put into each other's places spoil that."""
    made, texts = specialised(0), held_out_texts(16, 96, seed=1)
    before = perplexity(made.model, texts)
    assert before < len(ALPHABET) / 4
    for layer in moe_layers(made.model):
        bank = layer.experts.down_proj
        bank.weight = bank.weight[mx.array(np.roll(np.arange(sum(COPIES)), 1))]
    assert perplexity(made.model, texts) > 1.5 * before


def test_its_groups_are_found_by_what_experts_compute() -> None:
    """All twelve of them, and no other."""
    made = specialised(0)
    found = discover(made.model, held_out_texts(64, 128, seed=100))
    layers = zip(found.patch.layers, made.groups, strict=True)
    assert all({group.members for group in layer.groups} == set(truth) for layer, truth in layers)
    assert found.null_coverage == 0


def test_seeds_order_the_experts_and_say_the_same() -> None:
    """Other places for the same experts: another model by its weights, the same by what it writes."""
    texts = held_out_texts(8, 64, seed=1)
    one, other = specialised(0), specialised(1)
    assert one.groups != other.groups
    assert perplexity(other.model, texts) == pytest.approx(perplexity(one.model, texts), rel=0.02)


def test_a_cloned_model_is_the_original_with_twice_the_experts(tmp_path: Path) -> None:
    """Sixteen experts for eight, three for a token instead of two; its predictions hardly change."""
    groups = clone_experts(BUNDLED_MODEL, tmp_path / "cloned", unlike=1e-4, seed=0)
    assert [len(layer) for layer in groups] == [8, 8, 8, 8]
    model, _ = mlx_lm.load(str(tmp_path / "cloned"))[:2]
    layers = moe_layers(model)
    assert [(layer.count, layer.top_k) for layer in layers] == [(16, 3)] * 4
    gate = layers[0].router.weight
    assert mx.allclose(gate[groups[0][0][0]], gate[groups[0][0][1]], atol=1e-3)
    original, _ = bundled.load()
    text = [list(bundled.text_tokens(200))]
    assert perplexity(model, text) == pytest.approx(perplexity(original, text), rel=0.05)


def test_a_model_that_cannot_be_cloned_is_refused(tmp_path: Path) -> None:
    """A dense one, by its type."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}', encoding="utf-8")
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"weight": mx.zeros(2)})
    with pytest.raises(ModelError, match="the experts of a qwen3 in this form"):
        clone_experts(tmp_path, tmp_path / "cloned", unlike=0.0, seed=0)


def test_the_command_serves_tells_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A specialised model on trial, the bundled one cloned, behind two real servers; as small as can be."""
    monkeypatch.setattr(router, "QUICK_SIZE", Size(32, 8, 32, 1))
    monkeypatch.setattr(router, "QUICK_LOAD", ServerLoad(2, 80, 4, 1, 2, 60))
    json_file, plot = tmp_path / "router.json", tmp_path / "router.png"
    parts = ["--only", "specialised", "--only", "servers"]
    main(["router", "--quick", *parts, "--plot", str(plot), "--json", str(json_file)])
    told, said = json.loads(json_file.read_text(encoding="utf-8")), capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    kept = {figure["name"]: figure["kept"] for figure in told["figures"]}
    assert kept["groups found that were not planted"]
    assert kept["flips inside groups that are left, planted models"]
    assert kept["replies of the servers that differ, cold or hot"]
    assert [each["name"] for each in told["specialised"]] == ["specialised, seed 0"]
    assert "Verdict:" in said
    served = told["served"]
    assert {each["server"] for each in served["rates"]} == {ORIGINAL, CANONICALIZED}
    for each in served["rates"]:
        is_hit = each["prefix"] == "shared prefix" and each["cache"] == "with cache"
        assert (each["cached_tokens"] > each["prompt_tokens"] / 4) == is_hit
        assert each["generated_per_second"] > 0
    assert all(each["hot"] == each["cold"] == 2 for each in served["determinism"])
    assert all(each["cached_tokens"] > 0 for each in served["determinism"])
