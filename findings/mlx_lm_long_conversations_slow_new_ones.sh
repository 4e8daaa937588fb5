#!/bin/sh
# mlx-lm 0.32.2 (CPU): where its server's store holds long conversations only, looking up a new one takes time that grows with the
# square of their length, before a token is read. Any two chats begin alike, with the template's first tokens; from where they part the
# store looks for the nearest longer conversation, token by token, and copies the way it has come with each step.
#
# Found by a benchmark of the server: between conversations of 120,000 tokens a new one of 12,000, which else takes 1.2 s on a model that
# computes almost nothing, took 10.7 s. As soon as a short conversation is stored under the same first tokens the search ends there and
# the time is gone, so that it comes and goes with what else is stored.
#
# Not part of CI: it installs packages. Exits with 1 when what it sees has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx-lm==0.32.2" "mlx[cpu]==0.32.4"
"$folder/venv/bin/python" - <<'PYTHON'
import statistics
import sys
import time

from mlx_lm.models.cache import KVCache, LRUPromptCache

FIRST = [1, 2, 3]  # what a template begins every chat with
NEW = [*FIRST, 4, 5, 6, 7]


def conversation(length):
    return [*FIRST, *(8 + i % 1000 for i in range(length - len(FIRST)))]


def seconds(*lengths):
    """Of the processor, for a look at a store of conversations of these lengths that finds nothing of use."""
    store = LRUPromptCache()
    for length in lengths:
        store.insert_cache("model", conversation(length), [KVCache()])
    taken = []
    for _ in range(3):
        began = time.process_time()
        store.fetch_nearest_cache("model", NEW)
        taken.append(time.process_time() - began)
    return statistics.median(taken)


sizes = (15_000, 30_000, 60_000)
alone = {size: seconds(size) for size in sizes}
for size, taken in alone.items():
    print(f"one conversation of {size:,} tokens stored: {taken:.3f} s to look up a new one of {len(NEW)} tokens")
ratios = [alone[long] / alone[short] for short, long in zip(sizes, sizes[1:])]
print("twice as long takes", ", ".join(f"{ratio:.1f}" for ratio in ratios), "times as long")
store = LRUPromptCache()
store.insert_cache("model", conversation(60_000), [KVCache()])
store.insert_cache("model", [*NEW[:-1], 9], [KVCache()])
began = time.process_time()
store.fetch_nearest_cache("model", NEW)
beside_short = time.process_time() - began
print(f"with a short one stored that parts from the new one further on: {beside_short:.6f} s")
as_seen = min(ratios) > 2.8 and beside_short < alone[60_000] / 100
print("as seen" if as_seen else "CHANGED: what a look costs does not grow with the square any more")
sys.exit(not as_seen)
PYTHON
