"""Applying a patch to a model in memory: rows copied, selection by groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from ..errors import RouterError
from ..models import fingerprint
from .families import MoeLayer, moe_layers
from .patch import Group, LayerPatch, Patch, RouterTensor, copied_rows, differing_rows, rows_digest
from .select import Routing, listen, select_tie_safe


def make_patch(model: Any, groups: Mapping[str, Sequence[Group]], *, method: str) -> Patch:
    """The patch that makes `groups` of experts one, by their layer's name; changes nothing yet.

    Raises `RouterError` as `moe_layers` does, and for a layer that the model does not have.
    """
    layers = moe_layers(model)
    if unknown := groups.keys() - {layer.name for layer in layers}:
        raise RouterError(f"There is no MoE layer {min(unknown)} in this model.")
    return Patch(
        body_fingerprint(model, layers),
        method,
        tuple(_layer_patch(layer, tuple(groups.get(layer.name, ()))) for layer in layers),
    )


def _layer_patch(layer: MoeLayer, groups: tuple[Group, ...]) -> LayerPatch:
    tensors = []
    for name, array in layer.tensors().items():
        before = raw_bytes(array)
        after = copied_rows(before, layer.count, groups)
        tensors.append(
            RouterTensor(name, tuple(array.shape), rows_digest(before), rows_digest(after))
        )
    return LayerPatch(layer.name, layer.count, layer.top_k, groups, tuple(tensors))


def body_fingerprint(model: Any, layers: Sequence[MoeLayer]) -> str:
    """A digest of the model's configuration and parameters, but for its router tensors."""
    names = frozenset(name for layer in layers for name in layer.tensors())
    return fingerprint(model, without=names)


def apply(model: Any, patch: Patch, *, tie_safe: bool = True) -> int:
    """Give every group's members one row, in memory and for good; how many rows that changed.

    With `tie_safe` layers with groups also select by groups; without, this is what a written
    checkpoint is under plain mlx-lm. Applying the same patch again changes nothing.

    Raises `RouterError`, with the model as it was, for a patch that was made for another model.
    """
    layers = {layer.name: layer for layer in moe_layers(model)}
    changed: list[tuple[str, mx.array]] = []
    rows = 0
    if body_fingerprint(model, [*layers.values()]) != patch.model:
        raise RouterError(_foreign("its weights or its configuration differ"))
    if layers.keys() != {one.name for one in patch.layers}:
        raise RouterError(_foreign("its MoE layers differ"))
    for one in patch.layers:
        layer = layers[one.name]
        tensors = layer.tensors()
        if tensors.keys() != {tensor.name for tensor in one.tensors}:
            raise RouterError(_foreign(f"the router of {one.name} is of another kind"))
        differing: set[int] = set()
        for tensor in one.tensors:
            array = tensors[tensor.name]
            before = raw_bytes(array)
            if rows_digest(before) not in (tensor.before, tensor.after):
                raise RouterError(_foreign(f"{tensor.name} has other numbers"))
            after = copied_rows(before, layer.count, one.groups)
            if after != before:
                changed.append((tensor.name, from_raw(after, array)))
                differing |= differing_rows(before, after, layer.count)
        rows += len(differing)
    model.update(tree_unflatten(changed))
    mx.eval([array for _, array in changed])
    for one in patch.layers:
        select_tie_safe(layers[one.name], one.groups if tie_safe else ())
    object.__setattr__(model, "_router_patch", patch.digest if tie_safe else None)
    return rows


def applied(model: Any) -> str | None:
    """The digest of the patch by which `model` selects, None where it selects as mlx-lm does."""
    found: str | None = model.__dict__.get("_router_patch")
    return found


def largest_difference(model: Any, patch: Patch, tokens: Sequence[Sequence[int]]) -> float:
    """The largest difference of two logits inside a group, over `tokens`, of a model that has the patch.

    0 where the device gives equal rows equal numbers.
    """
    groups = {layer.name: layer.groups for layer in patch.layers if layer.groups}
    found: list[mx.array] = [mx.array(0.0)]

    def hear(routing: Routing) -> None:
        for group in groups[routing.layer.name]:
            inside = routing.logits[:, mx.array(group.members)].astype(mx.float32)
            found.append(mx.max(inside.max(axis=-1) - inside.min(axis=-1)))
            mx.eval(found[-1])

    with listen([layer for layer in moe_layers(model) if layer.name in groups], hear):
        model(mx.array(np.asarray(tokens, np.int32)))
    return float(np.max(np.array(mx.stack(found))))


def _foreign(why: str) -> str:
    return (
        f"The router patch was made for another model: {why}. "
        "Make one for this model with `mlx-hybridcache canonicalize`."
    )


def raw_bytes(array: mx.array) -> bytes:
    """The array's bytes, row-major, as a safetensors file holds them. numpy knows no bfloat16."""
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).tobytes()


def from_raw(data: bytes, like: mx.array) -> mx.array:
    """An array of `like`'s shape and dtype from bytes."""
    flat = mx.array(np.frombuffer(data, dtype=np.uint8))
    return flat.view(like.dtype).reshape(like.shape)
