"""Models as a whole: loading one, evaluating every array, its fingerprint, the default budget."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import hf_repo_to_path, load_config

from .backend import say_if_several
from .errors import ModelError

SAMPLE_BYTES = 4096
"""At most so many bytes of each tensor go into the fingerprint."""

ADAPTER_FILES = ("adapter_config.json", "adapters.safetensors")
"""What lies in the directory of an adapter."""

_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}

SUMMED_WORDS = 1 << 22
"""How many words of a tensor are summed at a time: each has a weight, which takes memory."""

SHARE_OF_FREE_MEMORY = 0.25
"""The default budget where MLX does not name a recommended working set."""


def evaluate(model: Any) -> None:
    """Evaluate every array of `model`, on the thread that built it.

    Scaled RoPE keeps lazy arrays outside `parameters()`, and a lazy array cannot be evaluated on
    another thread.
    """
    mx.eval([*_arrays(model)])


def _arrays(model: Any) -> Iterator[mx.array]:
    for module in model.modules():
        for value in [*vars(module).values(), *module.values()]:
            yield from (leaf for _, leaf in _flat([value]) if isinstance(leaf, mx.array))


def _flat(tree: Any) -> list[tuple[str, Any]]:
    return list(tree_flatten(tree))  # type: ignore[arg-type]  # its other result needs an argument


def fingerprint(model: Any, without: frozenset[str] = frozenset()) -> str:
    """A digest of the parameters in memory: names, shapes, dtypes, and for each a sample and two sums.

    So a re-trained model in the same folder, an adapter and a quantization all differ, down to a
    single number, and it does not matter where the weights were loaded from. Hashing every byte would
    take a minute for 80 GB; the sums are taken where the weights live. What the model's configuration
    says counts too: it is not all in the weights. Of parameters named in `without` only that they are
    there counts.
    """
    digest = hashlib.blake2b(repr(getattr(model, "args", "")).encode(), digest_size=16)
    for name, array in sorted(_flat(model.parameters())):
        digest.update(f"{name} {array.shape} {array.dtype};".encode())
        if array.size and name not in without:
            digest.update(_sample(array).tobytes())
            digest.update(_sums(array).tobytes())
    return digest.hexdigest()


def _sample(array: mx.array) -> np.ndarray[Any, Any]:
    count = max(1, SAMPLE_BYTES // array.dtype.size)
    flat = array.reshape(-1)[:: -(-array.size // count)]
    return np.array(mx.view(mx.contiguous(flat), mx.uint8))


def _sums(array: mx.array) -> np.ndarray[Any, Any]:
    """The plain and a weighted sum of all words, modulo 2**32 and exact on every device.

    Any one word that changes changes the first; words that swap places change the second.
    """
    words = mx.contiguous(array).reshape(-1).view(_WORDS[math.gcd(array.nbytes, 4)])
    sums = []
    for start in range(0, words.size, SUMMED_WORDS):
        part = words[start : start + SUMMED_WORDS].astype(mx.uint32)
        weights = mx.arange(2 * start + 1, 2 * (start + part.size), 2, dtype=mx.uint32)
        sums.append(mx.stack([part.sum(), (part * weights).sum()]))
    return np.array(mx.stack(sums))


def parameter_bytes(model: Any) -> int:
    """Bytes of the model's weights."""
    return sum(array.nbytes for _, array in _flat(model.parameters()))


def default_budget(model: Any) -> int:
    """Bytes for store and running requests when the user names none.

    On Metal what the recommended working set leaves beside the weights, less a tenth; elsewhere a
    stated share of the memory that is free now.
    """
    if has_metal():
        return budget_beside(parameter_bytes(model), metal_working_set())
    return budget_of_free_memory()


def has_metal() -> bool:
    """Whether MLX can use a GPU of Apple's here."""
    return bool(mx.metal.is_available())


def has_cuda() -> bool:
    """Whether a GPU of NVIDIA's computes here."""
    return mx.cuda.is_available() and mx.default_device() == mx.gpu


def metal_working_set() -> int:
    """Bytes that macOS recommends as the most for the GPU."""
    return int(mx.device_info()["max_recommended_working_set_size"])


def budget_beside(weights_bytes: int, working_set_bytes: int) -> int:
    """What a working set leaves beside the weights, less a tenth for what a forward computes with."""
    return max(0, int((working_set_bytes - weights_bytes) * 0.9))


def budget_of_free_memory(weights_bytes: int = 0) -> int:
    """The share where there is no such recommendation, once `weights_bytes` more are taken.

    Free where MLX computes: on a GPU of NVIDIA's its own memory.
    """
    if has_cuda():
        free = int(mx.device_info()["free_memory"])
    elif sys.platform == "darwin":  # a Mac whose GPU MLX cannot use
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, int((free - weights_bytes) * SHARE_OF_FREE_MEMORY))


def load(
    path_or_repo: str,
    *,
    adapter_path: str | None = None,
    chat_template: str = "",
    trust_remote_code: bool = False,
    lazy: bool = False,
) -> tuple[Any, Any]:
    """The model and tokenizer in a local directory, or of a repository on the hub, by `mlx_lm.load`.

    `chat_template` replaces the tokenizer's own. No code from the model's directory is run, unless
    `trust_remote_code`. With `lazy` the weights take no memory until they are evaluated, on this
    thread. Raises `ModelError` for what cannot be loaded.
    """
    say_if_several()
    path = local_directory(path_or_repo)
    if path is not None:
        _check_directory(path)
    if adapter_path is not None:
        _check_adapter(Path(adapter_path).expanduser())
    try:
        model, tokenizer = mlx_lm.load(
            path_or_repo if path is None else str(path),
            tokenizer_config={"trust_remote_code": trust_remote_code}
            | ({"chat_template": chat_template} if chat_template else {}),
            adapter_path=adapter_path,
            trust_remote_code=trust_remote_code,
            lazy=lazy,
        )[:2]
    except Exception as error:  # the loader and the hub raise whatever they meet
        raise ModelError(f"{path_or_repo} could not be loaded: {error}") from error
    return model, tokenizer


def local_directory(path_or_repo: str) -> Path | None:
    """The directory that is named; None where the name is a repository's on the hub.

    Raises `ModelError` where it can only be a path and no directory is there.
    """
    path = Path(path_or_repo).expanduser()
    if path_or_repo and path.is_dir():
        return path
    looks_local = path_or_repo.startswith((".", "/", "~")) or path_or_repo.count("/") != 1
    is_file = bool(path_or_repo) and path.exists()
    if is_file or looks_local:
        found = "a file" if is_file else "nothing"
        raise ModelError(
            f"{path_or_repo!r}: found {found} there. Name a directory that holds config.json, "
            "*.safetensors and a tokenizer, or a repository as owner/name."
        )
    return None


def directory(path_or_repo: str) -> Path:
    """Where the files of a loaded model lie: the directory itself, or the hub's copy on this machine."""
    return local_directory(path_or_repo) or Path(hf_repo_to_path(path_or_repo))


def configuration(path_or_repo: str) -> dict[str, Any]:
    """The `config.json` of a model that was loaded; empty where it cannot be read."""
    try:
        found: dict[str, Any] = load_config(directory(path_or_repo))
    except (OSError, ValueError, ModelError):
        return {}
    return found


def longest_context(config: dict[str, Any]) -> int | None:
    """The most tokens that a configuration names for a prompt and its reply; None where it names none.

    Where YaRN or the like stretches the positions that a model was trained on, the stretched ones count.
    """
    for part in (config, config.get("text_config") or {}):
        found = part.get("max_position_embeddings")
        if isinstance(found, int) and found > 0:
            return max(found, _stretched(part))
    return None


def _stretched(part: dict[str, Any]) -> int:
    scaling = part.get("rope_scaling") or part.get("rope_parameters") or {}
    trained, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    if not (isinstance(trained, int) and isinstance(factor, int | float)):
        return 0
    return int(trained * factor)


def _check_adapter(path: Path) -> None:
    missing = [name for name in ADAPTER_FILES if not (path / name).is_file()]
    if missing:
        found = f"no {' and no '.join(missing)}" if path.is_dir() else "no directory"
        raise ModelError(
            f"The adapter {path}: found {found} there. Name the directory of an adapter."
        )


def _check_directory(path: Path) -> None:
    needed = {
        "config.json": "config.json",
        "weights": "*.safetensors",
        "a tokenizer": "tokenizer*",
    }
    missing = [what for what, pattern in needed.items() if not any(path.glob(pattern))]
    if missing:
        raise ModelError(
            f"{path} is not a complete model directory: {', '.join(missing)} missing. "
            "Download or convert the model again."
        )
    config = path / "config.json"
    try:
        json.loads(config.read_bytes())
    except ValueError as error:  # the loader would not say in which file
        raise ModelError(f"{config} cannot be read: {error}. Download it again.") from error
