"""LoRA and DoRA adapters of random weights for tiny models."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import tiny
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

SETTINGS = {"rank": 2, "scale": 4.0, "dropout": 0.5}


def write_adapter(
    folder: Path,
    seed: int,
    family: str = "qwen3_next",
    kind: str = "lora",
    settings: dict[str, Any] = SETTINGS,
) -> Path:
    """One with random weights, on the last two layers."""
    model = tiny.fresh(family)
    linear_to_lora_layers(model, 2, settings, use_dora=kind == "dora")
    draw = np.random.default_rng(seed)
    weights = {
        name: mx.array(draw.normal(size=array.shape).astype(np.float32)) * 0.2
        for name, array in tree_flatten(model.parameters())
        if name.rpartition(".")[2] in ("lora_a", "lora_b", "m")
    }
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
