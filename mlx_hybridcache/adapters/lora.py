"""LoRA and DoRA adapters of one model, put in and taken out in memory: the modules around its layers change, its weights do not."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import AdapterError

INNER = ("linear", "embedding")
"""Where mlx-lm's modules around a layer have that layer."""

LEAVES = ("lora_a", "lora_b", "m")
"""The weights of an adapter."""

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"

MOST = 8
"""Adapters that are held in memory, the last ones used."""

Modules = Mapping[str, Any]
"""Modules of a model by where they lie in it."""


@dataclass(frozen=True, eq=False, slots=True)
class Adapter:
    """One that was read. `digest` tells it from all others by its numbers, wherever its files lie."""

    digest: str
    modules: Modules


def is_small(path: str | Path) -> bool:
    """Whether the adapter in a directory stands beside the weights of a model; a full fine-tune replaces them."""
    try:
        config = json.loads((Path(path).expanduser() / CONFIG).read_text())
        return str(config.get("fine_tune_type", "lora")) != "full"
    except (OSError, ValueError, AttributeError):
        return True  # which reading it says better


class Adapters:
    """The adapters of one model; None is for the model as it came. Used on the thread that owns the model.

    Several caches may serve one model. What one of them would change under the others is refused.
    """

    def __init__(self, model: Any):
        """Raises `AdapterError` where another cache has put one in, which it may take out at any time."""
        if any(each._used is not None for each in _serving_now(model)):
            raise AdapterError(
                "Another cache has put an adapter into this model. Take it out there first, with "
                "use_adapter(None), or load the model again for this cache."
            )
        self._model = model
        self._own = {name: each for name, each in _modules(model) if LEAVES[0] in each}
        self._read: OrderedDict[tuple[object, ...], Adapter] = OrderedDict()
        self._used: Adapter | None = None

    @contextmanager
    def serving(self) -> Iterator[None]:
        """For as long as the model answers requests; behind that it is as it came."""
        _serving[id(self)] = self
        try:
            yield
        finally:
            self._change(None)
            del _serving[id(self)]

    @property
    def digest(self) -> str:
        """What tells the adapter in use from others; empty without one."""
        return "" if self._used is None else self._used.digest

    def use(self, path: str | Path | None) -> None:
        """Put in the adapter in a directory, or have the model as it came.

        Raises `AdapterError` for what cannot be read or does not fit, and while another cache serves the model;
        then it is what it was.
        """
        if path is not None and is_served(self._model, beside=self):
            raise AdapterError(
                "Another cache serves this model, and an adapter would change its replies too. Close that "
                "one first, or load the model again for this cache."
            )
        self._change(None if path is None else self._found(Path(path).expanduser()))

    def _change(self, wanted: Adapter | None) -> None:
        if wanted is not self._used:
            with self._bare():
                self._used = wanted

    def _found(self, folder: Path) -> Adapter:
        key = _files(folder)
        if key not in self._read:
            self._read[key] = self._made(folder)
            while len(self._read) > MOST:
                self._read.popitem(last=False)
        self._read.move_to_end(key)
        return self._read[key]

    def _made(self, folder: Path) -> Adapter:
        if not is_small(folder):
            raise AdapterError(
                f"{folder} replaces weights of the model (fine_tune_type full), so that it cannot stand "
                "beside them. Load the model with it instead."
            )
        from mlx_lm.tuner.utils import (
            load_adapters,  # with all that trains models, which few ask for
        )

        with self._bare():
            before = dict(_modules(self._model))
            try:
                load_adapters(self._model, str(folder))
                found = _adapter(self._model, before, folder)
            except AdapterError:
                raise
            except Exception as error:  # mlx-lm raises whatever it meets
                raise AdapterError(f"The adapter {folder} cannot be used: {error}") from error
            finally:
                put = {
                    name: before[name]
                    for name, each in _modules(self._model)
                    if _is_new(name, each, before)
                }
                _put(self._model, put)
        return found

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """The model without any adapter meanwhile; what is `_used` at the end is put in."""
        _put(self._model, {name: _inner(each) for name, each in self._now().items()})
        try:
            yield
        finally:
            _put(self._model, self._now())

    def _now(self) -> Modules:
        return self._own if self._used is None else self._used.modules


_serving: dict[int, Adapters] = {}
"""Those of all caches whose models answer requests. There is no lock: the garbage collector may end a cache anywhere,
and waits for the thread that takes its own out of here.
"""


def is_served(model: Any, beside: Adapters | None = None) -> bool:
    """Whether a cache, or another one than that of `beside`, answers requests with a model, which must stay what it is."""
    return any(each is not beside for each in _serving_now(model))


def _serving_now(model: Any) -> list[Adapters]:
    return [each for each in [*_serving.values()] if each._model is model]


def _adapter(model: Any, before: Modules, folder: Path) -> Adapter:
    """The one that mlx-lm has just read into `model`, evaluated: any thread may use it."""
    modules = {name: each for name, each in _modules(model) if _is_new(name, each, before)}
    if not modules:
        raise AdapterError(f"The adapter {folder} changes no layer of this model.")
    weights: Any = mx.load(str(folder / WEIGHTS))
    digest = hashlib.blake2b(digest_size=16)
    for name, module in sorted(modules.items()):
        module.eval()  # no dropout
        digest.update(f"{name} {type(module).__name__} {getattr(module, 'scale', None)};".encode())
        for leaf, array in _weights(module):
            if f"{name}.{leaf}" not in weights:
                raise AdapterError(
                    f"The adapter {folder} has no {name}.{leaf}, which its configuration names."
                )
            mx.eval(array)
            digest.update(f"{leaf} {array.shape} {array.dtype};".encode())
            digest.update(np.array(mx.view(mx.contiguous(array), mx.uint8)).tobytes())
    return Adapter(digest.hexdigest(), modules)


def _weights(module: Any) -> list[tuple[str, mx.array]]:
    named: Any = tree_flatten(module.parameters())
    return sorted((name, array) for name, array in named if name in LEAVES)


def _modules(model: Any) -> list[tuple[str, Any]]:
    return list(model.named_modules())


def _is_new(name: str, module: Any, before: Modules) -> bool:
    return name in before and module is not before[name]


def _inner(module: Any) -> Any:
    return next(getattr(module, name) for name in INNER if hasattr(module, name))


def _put(model: Any, modules: Modules) -> None:
    if modules:
        model.update_modules(tree_unflatten([*modules.items()]))


def _files(folder: Path) -> tuple[object, ...]:
    """What tells the files in a directory from others that are put there later."""
    try:
        known = [(folder / name).stat() for name in (CONFIG, WEIGHTS)]
    except OSError as error:
        raise AdapterError(
            f"{folder} has no adapter: {CONFIG} and {WEIGHTS} are needed ({error.strerror})."
        ) from error
    return (
        str(folder.resolve()),
        *((each.st_mtime_ns, each.st_size, each.st_ino) for each in known),
    )
