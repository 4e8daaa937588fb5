#!/bin/sh
# mlx 0.32.4 (CPU backend): `mx.quantize` of what `mx.dequantize` gave back is not what was quantized before.
#
# With groups of 64 and 3 to 8 bits some of the numbers come back otherwise from a second round: the scale is fitted
# to the group's largest magnitude anew, and that need not be among what comes back. In float32 and float16, and in
# bfloat16 up to 6 bits, it is over after that: the second round's output is stable. In bfloat16 with 8 bits it goes
# on, because there the scale itself is rounded each time: after seven rounds the mean error is nearly twice the
# first one's. 2 bits are stable from the start.
#
# Who keeps rows or states quantized between turns, works on full ones, and quantizes them again after each turn
# (a cache of prompts, checkpoints of a finetuned model) sees them drift, most at the width that seems safest.
#
# Not part of CI: it installs packages. Exits with 1 when what it sees has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import mlx.core as mx

GROUP = 64
ROUNDS = 7


def rounds(bits, dtype):
    """Of each round after the first how many numbers changed; mean errors of the first and of the last."""
    mx.random.seed(0)
    full = mx.random.normal((64, 128)).astype(dtype)
    last, changed, errors = None, [], []
    for _ in range(ROUNDS):
        given = full if last is None else last
        back = mx.dequantize(*mx.quantize(given, GROUP, bits), GROUP, bits)
        if last is not None:
            changed.append(int((back != last).sum().item()))
        errors.append(float(mx.abs(back.astype(mx.float32) - full.astype(mx.float32)).mean().item()))
        last = back
    return changed, errors[0], errors[-1]


as_seen = True
for name in ("float32", "float16", "bfloat16"):
    for bits in (2, 3, 4, 5, 6, 8):
        changed, first, end = rounds(bits, getattr(mx, name))
        print(f"{name:8} {bits} bits: numbers of 8,192 that a further round changes {changed}, error {first:.5f} to {end:.5f}")
        goes_on = name == "bfloat16" and bits == 8
        if goes_on:
            as_seen = as_seen and all(changed) and end > 1.7 * first
        else:
            as_seen = as_seen and (changed[0] > 100) == (bits > 2) and not any(changed[1:])
print("as seen" if as_seen else "CHANGED: a second round gives other numbers than it did")
sys.exit(not as_seen)
PYTHON
