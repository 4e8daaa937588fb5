#!/bin/sh
# mlx-lm 0.32.2 on mlx 0.32.4 (Linux, CPU): behind its window, PLaMo 3 computes other logits for the same prompt
# when it is read in other slices.
#
# plamo3 keeps `window_size` rows (RotatingKVCache(max_size=window_size)) and asks its mask to show `window_size + 1`.
# Within a slice a token sees that many; the first ones of the next slice see one less, because the cache no longer
# has it; a token that is decoded alone sees one less, too.
#
# Not part of CI: it installs packages. Exits with 1 when what it sees has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4" "mlx-lm==0.32.2"
"$folder/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models import plamo3
from mlx_lm.models.cache import make_prompt_cache

WINDOW = 32
mx.random.seed(0)
model = plamo3.Model(
    plamo3.ModelArgs(
        hidden_size=64, num_hidden_layers=4, intermediate_size=96, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=160, window_size=WINDOW, sliding_window_pattern=2,
    )
)
model.eval()
model.update(tree_map(lambda x: 0.2 * mx.random.normal(x.shape) if x.ndim > 1 else x, model.parameters()))


def log_probabilities(prompt, step):
    cache = make_prompt_cache(model)
    for start in range(0, len(prompt) - 1, step):
        model(mx.array([prompt[start : min(start + step, len(prompt) - 1)]]), cache=cache)
        mx.eval([layer.state for layer in cache])
    logits = model(mx.array([prompt[-1:]]), cache=cache)[0, -1]
    return logits - mx.logsumexp(logits)


text = [(7 * i * i + 3 * i) % 160 for i in range(120)]
differences = {}
for length in (WINDOW, 120):
    prompt = text[:length]
    apart = mx.abs(log_probabilities(prompt, 16) - log_probabilities(prompt, 2048)).max()
    differences[length] = apart.item()
    print(f"{length} tokens, slices of 16 against one: {apart.item():.4f}")
as_seen = differences[WINDOW] < 1e-4 and differences[120] > 1e-2
print("as seen" if as_seen else "CHANGED: the result no longer depends on the slices as it did")
raise SystemExit(not as_seen)
PYTHON
