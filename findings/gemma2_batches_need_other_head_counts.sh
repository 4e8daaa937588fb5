#!/bin/sh
# mlx-lm 0.32.2 on mlx 0.32.4 (Linux, CPU): a batch of Gemma 2 with exactly as many sequences of unequal length
# as the model has key-value heads is computed with one head's mask for another's; any other number raises.
#
# Its attention scores have five dimensions (batch, key-value heads, repeats, queries, keys), a batch cache's mask
# has four (batch, 1, queries, keys). Aligned from the right the mask's batch meets the scores' heads, which is an
# error, unless the two are as many. Then nothing is said, and the padding of a sequence is looked at.
#
# Seen: with 2 key-value heads, two sequences (20 and 31 tokens) are off by 2.6931 in a logit, three raise broadcast_shapes; two of
# equal length agree to the last bit.
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
from mlx_lm.models import gemma2
from mlx_lm.models.cache import KVCache, make_prompt_cache

mx.random.seed(0)
model = gemma2.Model(
    gemma2.ModelArgs(
        model_type="gemma2", hidden_size=64, num_hidden_layers=2, intermediate_size=96, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=160,
    )
)
model.update(tree_map(lambda x: 0.2 * mx.random.normal(x.shape) if x.ndim > 1 else x, model.parameters()))
text = [(7 * i * i + 3 * i) % 160 for i in range(40)]


def read(length):
    caches = make_prompt_cache(model)
    model(mx.array([text[:length]]), cache=caches)
    mx.eval([cache.state for cache in caches])
    return caches


def apart(lengths):
    """The largest difference of a next logit, all at once against each alone."""
    every = [read(length) for length in lengths]
    merged = [KVCache.merge(list(layer)) for layer in zip(*every)]
    together = model(mx.array([[text[length]] for length in lengths]), cache=merged)[:, -1]
    alone = [model(mx.array([[text[length]]]), cache=read(length))[0, -1] for length in lengths]
    return mx.abs(together - mx.stack(alone)).max().item()


equal, unequal = apart([20, 20]), apart([20, 31])
print(f"two of equal length: {equal:.4f}; two of 20 and 31 tokens: {unequal:.4f}")
try:
    apart([20, 25, 31])
except ValueError as error:
    said = str(error)
else:
    said = "nothing"
print(f"three: {said}")
as_seen = equal == 0 and unequal > 1e-2 and "broadcast_shapes" in said
print("as seen" if as_seen else "CHANGED: such batches are no longer computed as they were")
raise SystemExit(not as_seen)
PYTHON
