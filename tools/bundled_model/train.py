"""Train the bundled model: `python -m tools.bundled_model.train --out runs/demo`.

Writes checkpoints with the optimizer's state, a log, and at the end a directory that
`mlx_lm.load` reads. `--resume` goes on from the newest checkpoint and gives the very weights of a
run that was never interrupted. `--smoke` trains a few small steps to show that everything works.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_hybridcache.demo import BUNDLED_MODEL

from .architecture import fresh_model, write_config
from .corpus import documents, split
from .data import Batch, Data, Tokens, Weights, batch, encode_dialogue, encode_text, load_tokenizer
from .dialogues import Writer, draw
from .fast_math import cross_entropy
from .gated_delta import training_forms
from .plan import STEPS, rate_at, stage_at

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


@dataclass(frozen=True, slots=True)
class Settings:
    """All that the weights depend on, besides the text and the plan."""

    steps: int = STEPS
    tokens_per_step: int = 2048
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    balance: float = 0.01  # weight of the routers' loss
    dialogues: int = 30_000
    documents: int = 0  # 0: all
    plan_speed: int = 1  # steps of the plan in one step, to see all stages in a few
    seed: int = 20261122


SMOKE = {"tokens_per_step": 256, "dialogues": 100, "documents": 6, "plan_speed": 1450}


def load_data(settings: Settings, tokenizer_directory: Path) -> Data:
    """The training side of the split, as tokens."""
    tokenizer = load_tokenizer(tokenizer_directory)
    texts = split(documents(), settings.seed)[0]
    texts = texts[: settings.documents or None]
    writer = Writer([d.text for d in texts])

    def encoded(count: int, kind: str = "") -> list[tuple[Tokens, Weights]]:
        drawn = islice(draw(writer, held_out=False, kind=kind), count)
        return [encode_dialogue(tokenizer, dialogue) for dialogue in drawn]

    some = settings.dialogues // 4
    pools = {
        "lookups": encoded(some, "lookup"),
        "functions": encoded(some, "call") + encoded(some, "result"),
        "dialogues": encoded(settings.dialogues),
    }
    return Data(encode_text(tokenizer, texts), pools)


class Run:
    """A model, its optimizer and the number of steps done."""

    def __init__(self, settings: Settings, data: Data) -> None:
        self.settings, self.data, self.step = settings, data, 0
        self.model: Any = fresh_model(settings.seed)
        self.optimizer = optim.AdamW(
            rate_at(0), betas=[0.9, 0.95], weight_decay=settings.weight_decay
        )
        self.optimizer.init(self.model.trainable_parameters())

    def advance(self, until: int, report: Callable[[dict[str, float]], None]) -> None:
        """Train up to step `until`, reporting each step's figures."""
        self.model.train()
        with training_forms() as balance:

            def loss(model: Any, given: Batch) -> tuple[mx.array, mx.array]:
                balance.terms.clear()
                hidden = model.model(mx.array(given.tokens[:, :-1]))
                counted = hidden.reshape(-1, hidden.shape[-1])[mx.array(given.index)]
                logits = model.model.embed_tokens.as_linear(counted)
                targets = mx.array(given.tokens[:, 1:].reshape(-1)[given.index])
                text = cross_entropy(logits, targets, mx.array(given.weights))
                uneven = sum(balance.terms, mx.array(0.0)) / len(balance.terms)
                return text + self.settings.balance * uneven, uneven

            gradient = nn.value_and_grad(self.model, loss)
            while self.step < until:
                began = time.perf_counter()
                settings = self.settings
                planned = self.step * settings.plan_speed
                stage = stage_at(planned)
                given = batch(self.data, settings.seed, self.step, settings.tokens_per_step, stage)
                (value, uneven), gradients = gradient(self.model, given)
                gradients, norm = optim.clip_grad_norm(gradients, settings.clip)
                self.optimizer.learning_rate = rate_at(planned)
                self.optimizer.update(self.model, gradients)
                mx.eval(self.model.parameters(), self.optimizer.state)
                self.step += 1
                report(
                    {
                        "step": self.step,
                        "loss": round(value.item(), 4),
                        "balance": round(uneven.item(), 3),
                        "gradient_norm": round(norm.item(), 3),
                        "length": given.tokens.shape[1] - 1,
                        "seconds": round(time.perf_counter() - began, 3),
                    }
                )
        self.model.eval()

    def save(self, directory: Path) -> None:
        """Write a checkpoint; it appears under its name only when it is complete."""
        partial = directory.with_name(directory.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        mx.save_safetensors(str(partial / "model.safetensors"), weights_of(self.model))
        state = dict(tree_flatten(self.optimizer.state))
        mx.save_safetensors(str(partial / "optimizer.safetensors"), state)
        progress = {"step": self.step, "settings": asdict(self.settings)}
        (partial / "progress.json").write_text(json.dumps(progress, indent=2) + "\n")
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)

    def restore(self, directory: Path) -> None:
        """Go on from a checkpoint; raises ValueError when it was made with other settings."""
        progress = json.loads((directory / "progress.json").read_text())
        if progress["settings"] != asdict(self.settings):
            raise ValueError(
                f"{directory} was trained with {progress['settings']}, not {asdict(self.settings)}: "
                "use the same settings or another --out"
            )
        self.model.load_weights(str(directory / "model.safetensors"))
        state: Any = mx.load(str(directory / "optimizer.safetensors"))
        self.optimizer.state = tree_unflatten(list(state.items()))
        mx.eval(self.model.parameters(), self.optimizer.state)
        self.step = progress["step"]


def weights_of(model: Any) -> dict[str, mx.array]:
    """Parameters by name."""
    return dict(tree_flatten(model.parameters()))


def newest_checkpoint(out: Path) -> Path | None:
    """The checkpoint with most steps below `out`, if there is one."""
    found = sorted(out.glob("checkpoint-[0-9]*[0-9]"))
    return found[-1] if found else None


def export(run: Run, out: Path, tokenizer_directory: Path) -> None:
    """Write a directory that `mlx_lm.load` reads."""
    for name in TOKENIZER_FILES:
        if tokenizer_directory.resolve() != out.resolve():
            shutil.copyfile(tokenizer_directory / name, out / name)
    write_config(out)
    mx.save_safetensors(
        str(out / "model.safetensors"), weights_of(run.model), metadata={"format": "mlx"}
    )


def main(argv: list[str] | None = None) -> None:
    """Train, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--tokenizer", type=Path, default=BUNDLED_MODEL, help="directory with a tokenizer"
    )
    parser.add_argument("--seed", type=int, default=Settings().seed)
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="end early, with a checkpoint")
    parser.add_argument("--smoke", action="store_true", help="few documents, small steps")
    chosen = parser.parse_args(argv)

    small: dict[str, Any] = SMOKE if chosen.smoke else {}
    settings = Settings(steps=chosen.steps, seed=chosen.seed, **small)
    data = load_data(settings, chosen.tokenizer)
    run = Run(settings, data)
    checkpoint = newest_checkpoint(chosen.out) if chosen.resume else None
    if checkpoint:
        run.restore(checkpoint)
    chosen.out.mkdir(parents=True, exist_ok=True)
    with (chosen.out / "training.jsonl").open("a" if checkpoint else "w") as log:

        def report(figures: dict[str, Any]) -> None:
            log.write(json.dumps(figures) + "\n")
            log.flush()
            if figures.get("step", 0) % 50 == 0 or chosen.smoke:
                print(json.dumps(figures), file=sys.stderr)

        report(
            {
                "begins_at": run.step,
                "settings": asdict(settings),
                "text_tokens": int(data.text.size),
                "dialogue_tokens": sum(len(tokens) for tokens, _ in data.pools["dialogues"]),
                "python": platform.python_version(),
                "mlx": version("mlx"),
            }
        )
        last = min(chosen.stop_at or settings.steps, settings.steps)
        while run.step < last:
            run.advance(min(run.step + chosen.save_every, last), report)
            run.save(chosen.out / f"checkpoint-{run.step:06}")
    export(run, chosen.out, chosen.tokenizer)


if __name__ == "__main__":
    main()
