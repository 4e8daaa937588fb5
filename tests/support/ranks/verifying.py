"""One rank's process that proves its group: `verifying.py FAMILY SPLIT [broken]`; rank 0 prints what it found."""

import sys

import oracle
import tiny
from matrix import shapes
from mlx_lm.models.cache import ArraysCache

from mlx_hybridcache import Group
from mlx_hybridcache.caches import checkpoint, counting
from mlx_hybridcache.group.load import split
from mlx_hybridcache.verify import verify_on_ranks
from ranks.process import say


def broken():
    """Every rank restores recurrent states that are a little off."""
    restore = checkpoint.restore

    def off(*args, **options):
        caches = restore(*args, **options)
        for cache in caches:
            if isinstance(cache, ArraysCache):
                tokens = counting.tokens_read(cache)
                cache.cache = [each if each is None else each + 0.01 for each in cache.cache]
                counting.note(cache, tokens)  # nobody is to notice
        return caches

    checkpoint.restore = off


def main(family, how, *faults):
    group = Group.form()
    model = shapes.build(family)
    split(group, model, pipeline=how == "pipeline")
    if faults:
        broken()
    prompts = [tiny.random_tokens(200, 1), tiny.random_tokens(120, 1) + tiny.random_tokens(60, 2)]
    proof = verify_on_ranks(group, model, oracle.word_tokenizer(), prompts, step=64)
    if proof is not None:
        restored = [[point.position, point.restored] for point in proof.points]
        say(holds=proof.holds, worst=proof.worst, restored=restored)


if __name__ == "__main__":
    main(*sys.argv[1:])
