#!/bin/sh
# mlx-lm 0.32.2 on mlx 0.32.4 (Linux, CPU): behind max_position_embeddings, a model whose rope_scaling has the
# type "dynamic" computes other logits for the same prompt when it is read in other slices.
#
# rope_utils.DynamicNTKScalingRoPE stretches its base by the end of the slice (its length plus the offset), so all
# tokens of one slice share a base that their neighbours in the next slice do not have.
#
# Seen: 0.0000 for 128 tokens, the trained length, and 5.1309 for 300 tokens, as the largest difference of two
# log-probabilities between slices of 64 and one slice.
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
from mlx_lm.models import internlm2
from mlx_lm.models.cache import make_prompt_cache

mx.random.seed(0)
model = internlm2.Model(
    internlm2.ModelArgs(
        model_type="internlm2", hidden_size=64, num_hidden_layers=2, intermediate_size=96,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=160,
        max_position_embeddings=128, rope_scaling={"type": "dynamic", "factor": 2.0},
    )
)
model.update(tree_map(lambda x: 0.2 * mx.random.normal(x.shape) if x.ndim > 1 else x, model.parameters()))


def log_probabilities(prompt, step):
    cache = make_prompt_cache(model)
    for start in range(0, len(prompt) - 1, step):
        model(mx.array([prompt[start : min(start + step, len(prompt) - 1)]]), cache=cache)
        mx.eval([layer.state for layer in cache])
    logits = model(mx.array([prompt[-1:]]), cache=cache)[0, -1]
    return logits - mx.logsumexp(logits)


text = [(7 * i * i + 3 * i) % 160 for i in range(300)]
differences = {}
for length in (128, 300):
    prompt = text[:length]
    apart = mx.abs(log_probabilities(prompt, 64) - log_probabilities(prompt, 2048)).max()
    differences[length] = apart.item()
    print(f"{length} tokens, slices of 64 against one: {apart.item():.4f}")
as_seen = differences[128] < 1e-4 and differences[300] > 1e-2
print("as seen" if as_seen else "CHANGED: the result no longer depends on the slices as it did")
raise SystemExit(not as_seen)
PYTHON
