"""The `mtp.*` weights of a checkpoint, which mlx-lm leaves out when it loads a model.

In the layout in which they were trained a norm's weight is stored less 1, and experts lie one by one or with two of
their matrices in one. What was converted for MLX has whole norms and stacked experts, as the model's own layers have.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import ModelError

Weights = dict[str, mx.array]

_NAME = re.compile(r"(?:^|\.)mtp\.(.+)")
_EXPERT = re.compile(r"(.+\.mlp)\.experts\.(\d+)\.(\w+)\.weight")
_JOINED, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def head_weights(directory: Path) -> Weights:
    """By their names behind `mtp.`, as MLX's layers have them; empty where there are none. Not read yet."""
    found: Weights = {}
    is_raw = False
    for file in sorted(directory.glob("*.safetensors")):
        arrays, about = _opened(file)
        own = {named[1]: array for name, array in arrays.items() if (named := _NAME.search(name))}
        found |= own
        # A convolution's kernel lies last in what was trained, where mlx-lm too looks for it.
        is_raw |= any(
            name.endswith("conv1d.weight") and array.shape[-1] != 1
            for name, array in arrays.items()
        )
        is_raw |= bool(own) and about.get("format") == "pt"
    return _with_whole_norms(_stacked(found)) if is_raw else _stacked(found)


def _opened(file: Path) -> tuple[Weights, dict[str, str]]:
    """The arrays in a file, of which its header alone is read now, and what that says of them."""
    try:
        found: Any = mx.load(str(file), return_metadata=True)
    except RuntimeError as error:
        raise ModelError(f"draft_mtp: {file.name} cannot be read: {error}") from error
    return found  # type: ignore[no-any-return]


def _with_whole_norms(weights: Weights) -> Weights:
    """Of a head all vectors but biases are norms."""
    return {
        name: array + 1.0 if name.endswith(".weight") and array.ndim == 1 else array
        for name, array in weights.items()
    }


def _stacked(weights: Weights) -> Weights:
    """All experts of a layer in one array for each of their matrices."""
    stacked: Weights = {}
    single: dict[str, dict[int, mx.array]] = {}
    for name, array in weights.items():
        if (expert := _EXPERT.fullmatch(name)) is not None:
            layer, number, matrix = expert.groups()
            single.setdefault(f"{layer}.switch_mlp.{matrix}.weight", {})[int(number)] = array
        elif name.endswith(_JOINED):
            layer, middle = name.removesuffix(_JOINED), array.shape[-2] // 2
            stacked[f"{layer}.switch_mlp.gate_proj.weight"] = array[..., :middle, :]
            stacked[f"{layer}.switch_mlp.up_proj.weight"] = array[..., middle:, :]
        elif name.endswith(_DOWN):
            stacked[f"{name.removesuffix(_DOWN)}.switch_mlp.down_proj.weight"] = array
        else:
            stacked[name] = array
    for name, arrays in single.items():
        stacked[name] = mx.stack([arrays[number] for number in sorted(arrays)])
    return stacked
