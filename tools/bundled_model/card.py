"""Write the bundled model's card: `python -m tools.bundled_model.card`.

Measures the committed weights (a few minutes on one core) and writes README.md beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache

from mlx_hybridcache.demo import BUNDLED_MODEL

from .architecture import SHAPE
from .evaluate import greedy, held_out_dialogues, held_out_rows, judge, model_loss, stale_state
from .ngrams import NGrams
from .plan import COSINES, STAGES
from .train import Settings, load_data, weights_of

LOG = Path(__file__).with_name("training.jsonl")
"""What the training wrote: its settings, then a line a step."""

TEXTS = {
    "reference": "language reference",
    "library": "docstrings, sources",
    "dialogues": "dialogues",
}
# Prompts of each table row: kind of dialogue, whether the model is to reason.
PROMPTS: dict[str, tuple[str, bool | None]] = {
    "function calls": ("call", None),
    "answers after a function's result": ("result", None),
    "chat, reasoning": ("chat", True),
    "chat, no reasoning": ("chat", False),
    "recall from an earlier turn": ("recall", None),
    "questions about a quoted text": ("long", None),
}
CHECKS = ["ends by itself", "closes its reasoning", "parseable call", "as intended"]
STALE_AGES = (1, 64, 1000)


def losses(model: Any, tokenizer: Any, settings: Settings, directory: Path, rows: int) -> list[str]:
    """Held-out loss beside n-grams fitted on the training tokens of the same kind."""
    data = load_data(settings, directory)
    chat = [token for tokens, _ in data.pools["dialogues"] for token in tokens.tolist()]
    fitted = {"text": NGrams.fit(data.text.tolist(), SHAPE["vocab_size"])}
    fitted["dialogues"] = NGrams.fit(chat, SHAPE["vocab_size"])
    lines = []
    for kind, title in TEXTS.items():
        sample = held_out_rows(tokenizer, kind, rows)
        alone, paired = fitted.get(kind, fitted["text"]).losses(sample)
        loss = model_loss(model, sample)
        tokens = sample.shape[0] * (sample.shape[1] - 1)
        lines.append(f"| {title} | {tokens:,} | {alone:.3f} | {paired:.3f} | **{loss:.3f}** |")
    return lines


def replies(model: Any, tokenizer: Any, count: int) -> list[str]:
    """Shares of `count` greedy replies a row for which each check holds."""
    lines = []
    for title, (kind, thinking) in PROMPTS.items():
        held: Counter[str] = Counter()
        asked: Counter[str] = Counter()
        for dialogue in held_out_dialogues(count, kind, thinking):
            found = judge(tokenizer, dialogue, greedy(model, tokenizer, dialogue))
            asked.update(found.keys())
            held.update(name for name, true in found.items() if true)
        cells = [f"{held[c]} / {asked[c]}" if asked[c] else "" for c in CHECKS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr)
    return lines


def prefill_speed(model: Any, tokens: list[int], step: int = 2048) -> float:
    """Tokens per second of reading `tokens` in slices, as mlx-lm reads a prompt."""
    cache = make_prompt_cache(model)
    began = time.perf_counter()
    for i in range(0, len(tokens), step):
        model(mx.array(tokens[i : i + step])[None], cache=cache)
        mx.eval([c.state for c in cache])
    return len(tokens) / (time.perf_counter() - began)


def card(directory: Path, count: int, rows: int) -> str:
    """The card's text."""
    model, tokenizer = load(str(directory))[:2]
    log = [json.loads(line) for line in LOG.read_text().splitlines()]
    steps = [entry for entry in log if "step" in entry]
    head = [entry for entry in log if "settings" in entry][-1]
    settings = Settings(**head["settings"])
    minutes = sum(entry["seconds"] for entry in steps) / 60
    parameters = sum(p.size for p in weights_of(model).values())
    size = (directory / "model.safetensors").stat().st_size
    lengths = Counter(entry["length"] for entry in steps)
    read = settings.tokens_per_step * len(steps)
    long = sum(n for length, n in lengths.items() if length >= 512) / len(steps)
    text = held_out_rows(tokenizer, "library", 30).reshape(-1).tolist()
    stale = stale_state(model, text[:2048], STALE_AGES)
    return CARD.format(
        parameters=parameters,
        size=size / 1e6,
        shape="\n".join(f"| `{k}` | {v} |" for k, v in SHAPE.items() if k != "model_type"),
        losses="\n".join(losses(model, tokenizer, settings, directory, rows)),
        checks=" | ".join(CHECKS),
        rule="|".join(["---"] * (len(CHECKS) + 1)),
        replies="\n".join(replies(model, tokenizer, count)),
        count=count,
        stale="\n".join(f"| {age:,} | {change:.3f} |" for age, change in stale.items()),
        steps=len(steps),
        read=read / 1e6,
        minutes=minutes,
        long=long,
        speed=prefill_speed(model, text[:4096]),
        **{k: head[k] for k in ("text_tokens", "dialogue_tokens", "python", "mlx")},
        seed=settings.seed,
        rate=COSINES[0].top,
        stages=", then ".join(f"{s.pool} to step {s.until:,}" for s in STAGES),
        tokens_per_step=settings.tokens_per_step,
    )


CARD = """\
# The bundled model

A small Qwen3-Next (`model_type: qwen3_next`): three Gated-DeltaNet layers, one gated attention
layer, a mixture of experts with a shared expert in each. {parameters:,} parameters, float32,
{size:.1f} MB. Made to try a prompt cache on a real hybrid model without a download: it follows
ChatML, reasons between `<think>` tags, calls functions, and knows next to nothing. Do not use it
for its answers. Made in November 2026.

```python
from mlx_lm import load

model, tokenizer = load("mlx_hybridcache/demo/model")
```

## Held-out loss

Nats per token in rows of 512, each read from an empty state. The unigram (Laplace) and the bigram
(Dirichlet, its prior chosen in its favour on these rows) are fitted on the training tokens of the
same kind.

| text | tokens | unigram | bigram | this model |
|---|---|---|---|---|
{losses}

Documents are held out by the hash of their file's name, dialogues by the hash of their last
question.

## Held-out prompts

{count} prompts a row that training never saw, greedy, through mlx-lm's own generation (at most 160
tokens). A call is parseable when mlx-lm's tool parser reads it, its arguments are a JSON object and
its name is among the declared functions. "As intended" is stricter than usefulness needs: the
reply equals the generator's, letter by letter.

| prompts | {checks} |
|{rule}|
{replies}

## A stale recurrent state is visible

Largest absolute change of the last logits of a 2,048-token held-out text when keys and values are
right and only the recurrent state is taken from some tokens earlier. A cache that restores the
wrong state is caught.

| tokens too old | change |
|---|---|
{stale}

## Training

| | |
|---|---|
| text | Python's own language reference, docstrings and sources ({text_tokens:,} tokens, Python {python}) |
| dialogues | generated ({dialogue_tokens:,} tokens): chat, recall, quoted texts, function calls and results, half with reasoning |
| steps | {steps:,} of {tokens_per_step:,} tokens: {read:.1f} million tokens read; {long:.0%} of the steps in rows of 512 and 1,024 |
| stages | {stages} |
| optimizer | AdamW, peak rate {rate}, warm-up, three cosines (`plan.py`), gradients clipped at norm 1 |
| seed | {seed} |
| time | {minutes:.0f} minutes of steps, 2-core Linux machine, CPU backend, MLX {mlx}, one core, a faster BLAS preloaded |
| prefill | {speed:,.0f} tokens/s for 4,096 tokens on one core, plain MLX wheel, other work beside it |
| log | `tools/bundled_model/training.jsonl` of the sources, one line a step |

```
python -m tools.bundled_model.tokenizer            # tokenizer.json
python -m tools.bundled_model.train --steps {steps} --seed {seed} --out runs/demo
python -m tools.bundled_model.card --model mlx_hybridcache/demo/model
```

The text depends on the Python version, so another version gives other weights. Training was resumed
from its own checkpoints at steps 2,600 and 4,000, each time with a longer plan; `plan.py` there holds the
whole and gives the same batches and rates from the first step.

| shape | |
|---|---|
{shape}

## Licence

Weights, tokenizer and chat template: Apache-2.0. Trained on text from the Python distribution
(PSF License, Version 2; copyright Python Software Foundation) and on dialogues generated by the
scripts in `tools/bundled_model` of the sources.
"""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUNDLED_MODEL)
    parser.add_argument("--prompts", type=int, default=100, help="a row of the table")
    parser.add_argument("--rows", type=int, default=100, help="of 512 tokens for each loss")
    chosen = parser.parse_args()
    written = card(chosen.model, chosen.prompts, chosen.rows)
    (chosen.model / "README.md").write_text(written)


if __name__ == "__main__":
    main()
