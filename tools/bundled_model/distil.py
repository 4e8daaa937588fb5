"""Cut a draft out of the bundled model and distil it: `python -m tools.bundled_model.distil --out DIRECTORY`.

Two of its four layers, the first Gated-DeltaNet layer and the one of attention, with its embeddings, learn what
the whole expects next (arXiv 1503.02531) in the dialogues that it was trained on. In 6 bits that is under 1 MB.
With `--head` it is a multi-token-prediction head that learns so: the directory then holds the bundled model, and
beside it the head's `mtp.*` weights.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models import qwen3_next

from mlx_hybridcache import models
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.drafting.head import HeadLayers

from .architecture import SHAPE
from .corpus import documents, split
from .data import Batch, Data, batch, encode_dialogue, load_tokenizer
from .dialogues import Writer, draw
from .gated_delta import training_forms
from .plan import Stage
from .train import TOKENIZER_FILES, Settings, weights_of

KEPT = (0, 3)
"""Layers of the bundled model."""

ATTENTION = 3
"""Its layer of attention."""

DRAFT = {**SHAPE, "num_hidden_layers": len(KEPT), "full_attention_interval": len(KEPT)}
QUANTIZATION = {"group_size": 64, "bits": 6}
STAGE = Stage(0, "dialogues", {64: 0.3, 128: 0.4, 256: 0.3}, 0.0)
TOP, WARM_UP, FINAL_SHARE = 2e-3, 10, 0.03
"""The learning rate: its highest value, the steps that lead there, and what is left of it at the end."""


def rate_at(step: int, steps: int) -> float:
    """Learning rate of a step: a linear rise, then half a cosine."""
    if step < WARM_UP:
        return TOP * (step + 1) / WARM_UP
    share = 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))
    return TOP * (FINAL_SHARE + (1 - FINAL_SHARE) * share)


def dialogues(count: int) -> Data:
    """Dialogues of the training side, as tokens."""
    settings, tokenizer = Settings(), load_tokenizer(BUNDLED_MODEL)
    writer = Writer([each.text for each in split(documents(), settings.seed)[0]])
    drawn = islice(draw(writer, held_out=False), count)
    pool = [encode_dialogue(tokenizer, each) for each in drawn]
    return Data(np.zeros(0, dtype=np.int32), {"dialogues": pool})


def cut(whole: Any) -> Any:
    """A model of the layers that are kept, with the whole's own weights."""
    draft: Any = qwen3_next.Model(qwen3_next.ModelArgs.from_dict(DRAFT))
    found = {}
    for name, array in weights_of(whole).items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in KEPT:
                continue
            parts[2] = str(KEPT.index(int(parts[2])))
        found[".".join(parts)] = mx.array(array)
    draft.update(tree_unflatten([*found.items()]))
    mx.eval(draft.parameters())
    return draft


def _counted(model: Any, given: Batch) -> mx.array:
    """Logits at the counted places, `(counted, vocabulary)`."""
    hidden = model.model(mx.array(given.tokens[:, :-1]))
    counted = hidden.reshape(-1, hidden.shape[-1])[mx.array(given.index)]
    logits: mx.array = model.model.embed_tokens.as_linear(counted)
    return logits


def distil(whole: Any, draft: Any, data: Data, steps: int, tokens: int, seed: int) -> None:
    """Let the draft take so many steps of so many `tokens`."""
    optimizer = optim.AdamW(rate_at(0, steps), betas=[0.9, 0.95], weight_decay=0.01)

    def loss(model: Any, given: Batch, expected: mx.array) -> tuple[mx.array, mx.array]:
        logits = _counted(model, given)
        told = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        agreed = mx.mean(mx.argmax(logits, axis=-1) == mx.argmax(expected, axis=-1))
        return -mx.mean(mx.sum(expected * told, axis=-1)), agreed

    gradient, began = nn.value_and_grad(draft, loss), time.perf_counter()
    with training_forms():
        for step in range(steps):
            given = batch(data, seed, step, tokens, STAGE)
            expected = mx.stop_gradient(mx.softmax(_counted(whole, given), axis=-1))
            (value, agreed), gradients = gradient(draft, given, expected)
            gradients, _ = optim.clip_grad_norm(gradients, 1.0)
            optimizer.learning_rate = rate_at(step, steps)
            optimizer.update(draft, gradients)
            mx.eval(draft.parameters(), optimizer.state)
            if step % 25 == 0 or step == steps - 1:
                _say(step, value, agreed, began)


def _say(step: int, loss: mx.array, agreed: mx.array, began: float) -> None:
    said = {"step": step, "loss": loss.item(), "agreed": agreed.item()}
    said["seconds"] = time.perf_counter() - began
    print(json.dumps(said), file=sys.stderr)


def export(draft: Any, out: Path) -> None:
    """Write a directory that `mlx_lm.load` reads."""
    out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(BUNDLED_MODEL / name, out / name)
    ends = json.loads((BUNDLED_MODEL / "config.json").read_text())["eos_token_id"]
    config = {"architectures": ["Qwen3NextForCausalLM"], **DRAFT, "dtype": "float32"}
    config |= {"eos_token_id": ends, "quantization": QUANTIZATION}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    nn.quantize(draft, group_size=QUANTIZATION["group_size"], bits=QUANTIZATION["bits"])
    mx.save_safetensors(
        str(out / "model.safetensors"), weights_of(draft), metadata={"format": "mlx"}
    )


# A head


def fresh_head(whole: Any) -> HeadLayers:
    """One that begins with the model's own layer of attention, and sees the embedding and the state in equal parts."""
    args, own = whole.args, weights_of(whole)
    layer: Any = qwen3_next.Qwen3NextDecoderLayer(args, ATTENTION)
    prefix = f"model.layers.{ATTENTION}."
    found = {name.removeprefix(prefix): own[name] for name in own if name.startswith(prefix)}
    layer.update(tree_unflatten([*found.items()]))
    head: Any = HeadLayers(args.hidden_size, args.rms_norm_eps, layer)
    head.fc.weight = mx.concatenate([0.5 * mx.eye(args.hidden_size)] * 2, axis=1)
    head.norm.weight = own["model.norm.weight"]
    mx.eval(head.parameters())
    return head  # type: ignore[no-any-return]


def distil_head(
    whole: Any, head: HeadLayers, data: Data, steps: int, tokens: int, seed: int
) -> None:
    """Let the head take so many steps of so many `tokens`. It learns what the model expects behind the next token."""
    optimizer = optim.AdamW(rate_at(0, steps), betas=[0.9, 0.95], weight_decay=0.01)
    embeddings = whole.model.embed_tokens

    def loss(
        model: Any, read: mx.array, hidden: mx.array, counted: mx.array
    ) -> tuple[mx.array, mx.array]:
        out = model(embeddings(read), hidden[:, :-1], None)
        logits = embeddings.as_linear(out.reshape(-1, out.shape[-1])[counted])
        expected = embeddings.as_linear(hidden[:, 1:].reshape(-1, out.shape[-1])[counted])
        told = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        agreed = mx.mean(mx.argmax(logits, axis=-1) == mx.argmax(expected, axis=-1))
        return -mx.mean(mx.sum(mx.softmax(expected, axis=-1) * told, axis=-1)), agreed

    gradient, began = nn.value_and_grad(head, loss), time.perf_counter()
    with training_forms():
        for step in range(steps):
            given = batch(data, seed, step, tokens, STAGE)
            rows, length = given.tokens.shape[0], given.tokens.shape[1] - 1
            is_counted = np.zeros(rows * length, dtype=bool)
            is_counted[given.index] = True
            counted = mx.array(np.flatnonzero(is_counted.reshape(rows, length)[:, 1:]))
            hidden = mx.stop_gradient(whole.model(mx.array(given.tokens[:, :-1])))
            (value, agreed), gradients = gradient(
                head, mx.array(given.tokens[:, 1:-1]), hidden, counted
            )
            gradients, _ = optim.clip_grad_norm(gradients, 1.0)
            optimizer.learning_rate = rate_at(step, steps)
            optimizer.update(head, gradients)
            mx.eval(weights_of(head), optimizer.state)
            if step % 25 == 0 or step == steps - 1:
                _say(step, value, agreed, began)


def export_head(head: HeadLayers, out: Path) -> None:
    """Write the bundled model's directory with the head's weights in a file of their own."""
    shutil.copytree(BUNDLED_MODEL, out, dirs_exist_ok=True)
    named = {f"mtp.{name}": array for name, array in weights_of(head).items()}
    mx.save_safetensors(str(out / "mtp.safetensors"), named, metadata={"format": "mlx"})


def main(argv: list[str] | None = None) -> None:
    """Cut, distil and write, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=512, help="of a step (512)")
    parser.add_argument("--dialogues", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=Settings().seed)
    parser.add_argument("--head", action="store_true", help="a head, not a draft model")
    chosen = parser.parse_args(argv)
    whole, _ = models.load(str(BUNDLED_MODEL))
    data = dialogues(chosen.dialogues)
    if chosen.head:
        head = fresh_head(whole)
        distil_head(whole, head, data, chosen.steps, chosen.tokens, chosen.seed)
        export_head(head, chosen.out)
        return
    draft = cut(whole)
    distil(whole, draft, data, chosen.steps, chosen.tokens, chosen.seed)
    export(draft, chosen.out)


if __name__ == "__main__":
    main()
