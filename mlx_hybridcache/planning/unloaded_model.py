"""A model without its weights: mlx-lm's own class, built from the configuration, none of it computed.

MLX is lazy, so parameters have names, shapes and dtypes before they have bytes. Where the weights'
files are there, their headers are read and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from mlx.utils import tree_map_with_path
from mlx_lm.utils import _get_classes, load_config, load_model

from .. import models
from ..errors import ModelError
from ..group.layout import layers_of

INDEX = "model.safetensors.index.json"
DESCRIBING = ["config.json", INDEX]
"""What is fetched of a repository on the hub."""

MOST_LAYERS = 10_000
"""A number of layers beyond this is a slip, not a model."""

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True, slots=True)
class UnloadedModel:
    """`model` can be asked for shapes, not for numbers. `notes` say what had to be assumed."""

    name: str
    model: Any
    family: str
    longest_context: int | None
    weights_bytes: int
    weights_from: str
    notes: tuple[str, ...]


def heaviest_part(model: UnloadedModel, ranks: int) -> UnloadedModel:
    """What the rank holds that has most of the weights, where each has some of the layers and all the rest.

    Raises `ModelError` for a family that cannot be split by layers.
    """
    if ranks == 1:
        return model
    stack = getattr(model.model, "model", None)
    if not hasattr(stack, "pipeline"):
        raise ModelError(f"{model.family} cannot be split by layers over several machines.")
    each = [models.parameter_bytes(layer) for layer in model.model.layers]
    scale = model.weights_bytes / models.parameter_bytes(model.model)
    rest = models.parameter_bytes(model.model) - sum(each)
    most = max(sum(each[a:b]) for a, b in layers_of(len(each), ranks))
    nbytes = int(scale * (most + rest))
    return replace(
        model, weights_bytes=nbytes, weights_from=f"{model.weights_from}, of one of {ranks} ranks"
    )


def describe(path_or_repo: str) -> UnloadedModel:
    """The model in a local directory, or of a repository on the hub, by its configuration.

    Of a repository only the configuration and the list of files are fetched. No code of the model's
    own is run. Raises `ModelError` for what cannot be read or built.
    """
    path = models.local_directory(path_or_repo) or _fetched(path_or_repo)
    config = _config(path)
    index = _index(path)
    notes: list[str] = []
    if _is_complete(path, index):
        told = f"{path / 'config.json'} and the safetensors files beside it do"
        model = _built(told, lambda: load_model(path, lazy=True)[0])
        nbytes, source = models.parameter_bytes(model), "the headers of its safetensors files"
    else:
        told = f"{path / 'config.json'} does"
        model = _built(told, lambda: _from_config(config, index, notes))
        nbytes, source = models.parameter_bytes(model), "the shapes that its configuration gives"
        if index is not None and isinstance(index.get("metadata", {}).get("total_size"), int):
            nbytes, source = index["metadata"]["total_size"], f"its {INDEX}"
    return UnloadedModel(
        name=path_or_repo,
        model=model,
        family=config["model_type"],
        longest_context=models.longest_context(config),
        weights_bytes=nbytes,
        weights_from=source,
        notes=tuple(notes),
    )


def _fetched(repo: str) -> Path:
    try:
        return Path(snapshot_download(repo, allow_patterns=DESCRIBING))
    except Exception as error:  # the hub's client raises whatever it meets
        raise ModelError(
            f"{repo}: its config.json could not be fetched from the hub: {error}\n"
            "Check the name and the network, or name a local directory."
        ) from error


def _config(path: Path) -> dict[str, Any]:
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path} has no config.json, which says how many layers of which kind a model has. "
            "Name the directory of a model."
        )
    try:
        config = load_config(path)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ModelError(
            f"{path / 'config.json'} cannot be read: {error}. Download it again."
        ) from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise ModelError(
            f"{path / 'config.json'} names no model_type, so it is not a language model's. "
            "Name the directory of a model."
        )
    if config.get("model_file") is not None:
        raise ModelError(
            f"{path} brings its own code ({config['model_file']}), which is not run here. "
            "It can be planned when mlx-lm knows its model_type."
        )
    for part in (config, config.get("text_config")):
        layers = part.get("num_hidden_layers", 1) if isinstance(part, dict) else 1
        if not isinstance(layers, int) or not 0 < layers <= MOST_LAYERS:
            raise ModelError(
                f"{path / 'config.json'} says num_hidden_layers {layers!r}; a whole number from 1 to "
                f"{MOST_LAYERS:,} is needed. Download it again."
            )
    return config


def _index(path: Path) -> dict[str, Any] | None:
    """The list of files beside the weights; None where there is none that can be read."""
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return index if isinstance(index, dict) and isinstance(index.get("weight_map"), dict) else None


def _is_complete(path: Path, index: Mapping[str, Any] | None) -> bool:
    """Whether every file that holds weights is there."""
    if index is not None:
        return all((path / name).is_file() for name in set(index["weight_map"].values()))
    return any(path.glob("model*.safetensors"))


def _built(told: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except Exception as error:  # mlx-lm's classes raise whatever a number leads them to
        raise ModelError(
            f"{told} not describe a model that mlx-lm {version('mlx-lm')} can build "
            f"({type(error).__name__}: {error}). Is the download whole, and a language model? A newer "
            "mlx-lm may know it."
        ) from error


def _from_config(
    config: dict[str, Any], index: Mapping[str, Any] | None, notes: list[str]
) -> nn.Module:
    """What `load_model` would build, from the configuration and the names of the weights, if known."""
    model_class, arguments = _get_classes(config)
    model: nn.Module = model_class(arguments.from_dict(config))
    _cast(model, _dtype(config, notes))
    quantization = config.get("quantization")
    if quantization is not None:
        _quantize(model, quantization, None if index is None else index["weight_map"])
    elif config.get("quantization_config") or config.get("text_config", {}).get(
        "quantization_config"
    ):
        notes.append(
            "Its quantization is of another format than mlx-lm's own: without its files the weights "
            "are counted unquantized, which is too much."
        )
    model.eval()
    return model


def _dtype(config: dict[str, Any], notes: list[str]) -> mx.Dtype:
    parts = [config, config.get("text_config") or {}]
    named = [part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)]
    dtype = _DTYPES.get(named[0]) if named else None
    if dtype is None:
        found = f"the dtype {named[0]}" if named else "no dtype"
        notes.append(f"Its configuration names {found}: bfloat16 is assumed.")
    return dtype or mx.bfloat16


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """As `mlx_lm.convert` does, which leaves some parameters of some families in float32."""
    follows = getattr(model, "cast_predicate", lambda name: True)

    def cast(name: str, array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(dtype) if floating and follows(name) else array

    model.update(tree_map_with_path(cast, model.parameters()))


def _quantize(
    model: nn.Module, quantization: dict[str, Any], names: Mapping[str, Any] | None
) -> None:
    """As mlx-lm loads: what the configuration says of a layer, else what has scales.

    Without `names`, those of the weights, what mlx-lm would have quantized has scales.
    """
    size = quantization["group_size"]
    allowed = getattr(model, "quant_predicate", lambda path, layer: True)

    def predicate(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        if path in quantization:
            own: bool | dict[str, Any] = quantization[path]
            return own
        if not hasattr(layer, "to_quantized"):
            return False
        if names is not None:
            return f"{path}.scales" in names
        fits: bool = layer.weight.shape[-1] % size == 0
        return fits and allowed(path, layer)

    nn.quantize(
        model,
        group_size=size,
        bits=quantization["bits"],
        mode=quantization.get("mode", "affine"),
        class_predicate=predicate,
    )
