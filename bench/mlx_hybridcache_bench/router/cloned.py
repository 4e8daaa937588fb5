"""A copy of a model directory in which every expert stands twice: equivalent experts, by their making."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_hybridcache import ModelError

COPIES = 2
GATE = ".mlp.gate.weight"

Groups = tuple[tuple[int, ...], ...]


def clone_experts(source: Path, target: Path, *, unlike: float, seed: int) -> list[Groups]:
    """Write `target`, and give the groups of equal experts in each MoE layer.

    The copies stand in an order drawn from `seed`; they and their rows in the router differ by noise
    of `unlike` of their own root mean square. A token gets twice as many experts less one, so that one
    of the last two copies must be chosen and the other left. For unquantized Qwen3-MoE, Qwen3-Next and
    their kin, in one file. Raises `ModelError` for anything else.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    gates = sorted(name for name in weights if name.endswith(GATE))
    if not gates or "num_experts" not in config or config.get("quantization"):
        raise ModelError(
            f"{source}: the experts of a {config.get('model_type')} in this form cannot be cloned here. "
            "An unquantized Qwen3-MoE or Qwen3-Next in one file is needed."
        )
    rng, count, groups = np.random.default_rng(seed), int(config["num_experts"]), []
    for gate in gates:
        origin = rng.permutation(np.repeat(np.arange(count), COPIES))
        members = (np.flatnonzero(origin == expert).tolist() for expert in range(count))
        groups.append(tuple(sorted(tuple(each) for each in members)))
        part = gate.removesuffix("gate.weight")
        for name in weights:
            if name == gate or name.startswith(f"{part}switch_mlp."):
                weights[name] = _roughened(weights[name][mx.array(origin)], unlike, rng)
    config["num_experts"] = COPIES * count
    config["num_experts_per_tok"] = COPIES * int(config["num_experts_per_tok"]) - 1
    target.mkdir()
    for file in source.iterdir():
        if file.suffix in {".json", ".jinja"} and file.name != "config.json":
            shutil.copyfile(file, target / file.name)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    mx.save_safetensors(str(target / "model.safetensors"), weights, metadata={"format": "mlx"})
    return groups


def _roughened(array: mx.array, unlike: float, rng: np.random.Generator) -> mx.array:
    """Each expert with noise of `unlike` of its root mean square."""
    values = np.array(array.astype(mx.float32), dtype=np.float64)
    rms = np.sqrt((values**2).mean(axis=tuple(range(1, values.ndim)), keepdims=True))
    noisy = values + unlike * rms * rng.standard_normal(values.shape)
    return mx.array(noisy.astype(np.float32)).astype(array.dtype)
