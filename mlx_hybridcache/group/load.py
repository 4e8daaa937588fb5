"""One rank's part of a model: whole layers of it, or a part of each."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .. import models
from ..errors import GroupError
from .group import Group


def load(
    group: Group,
    path_or_repo: str,
    *,
    pipeline: bool = False,
    chat_template: str = "",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """This rank's part of a model, and the tokenizer. Every rank loads at the same time, each its own weights.

    With `pipeline` a rank has some of the layers; else a part of each, where the family can be split so, and layers
    where it cannot. Unlike mlx-lm's loader this needs no index of the files. Raises `ModelError` for what cannot be
    loaded, and `GroupError` for a family that cannot be split.
    """
    model, tokenizer = models.load(
        path_or_repo, chat_template=chat_template, trust_remote_code=trust_remote_code, lazy=True
    )
    split(group, model, pipeline=pipeline)
    return model, tokenizer


def split(group: Group, model: Any, *, pipeline: bool = False) -> None:
    """Leave this rank's part of a model whose weights are not evaluated yet, and evaluate it."""
    layers = getattr(model, "model", None)
    by_layers, by_tensors = hasattr(layers, "pipeline"), hasattr(model, "shard")
    family = type(model).__module__.rpartition(".")[2]
    if not (by_layers or by_tensors):
        raise GroupError(
            f"{family} cannot be spread over ranks: mlx-lm splits neither its layers nor its tensors. Start it on "
            "one machine."
        )
    if pipeline and not by_layers:
        raise GroupError(f"{family} cannot be split by layers; leave --pipeline out.")
    try:
        if pipeline or not by_tensors:
            layers.pipeline(group.ranks)  # type: ignore[union-attr]
        else:
            model.shard(group.ranks)
    except (ValueError, AssertionError) as error:
        raise GroupError(
            f"{family} cannot be split over {group.size} ranks: {error or 'its sizes do not divide'}."
        ) from error
    mx.eval(model.parameters())
