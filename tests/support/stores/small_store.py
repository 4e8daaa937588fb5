"""Rows and states of known size, and what a store really holds of them."""

import mlx.core as mx

from mlx_hybridcache.caches.checkpoint import Checkpoint
from mlx_hybridcache.caches.kinds.kind import Snapshot
from mlx_hybridcache.caches.kinds.rows import RowBlock
from mlx_hybridcache.store.lazy_rows import rows_before
from mlx_hybridcache.tokens import Namespace, as_tokens

ROW = 16
"""Bytes of one token's rows: a key and a value of two float32 each."""

STATE = 400
"""Bytes of one checkpoint."""


def rows(start, end):
    keys, values = (mx.zeros((1, 1, end - start, 2)) for _ in range(2))
    mx.eval(keys, values)
    return RowBlock(start, end, ((keys, values),))


def weigh(start, end):
    """What they weigh."""
    return (end - start) * ROW


def state(position):
    array = mx.full((100,), float(position))
    mx.eval(array)
    return Checkpoint(position, (None, Snapshot((array,))))


N = Namespace("n")


def save(store, tokens, *, is_end=False, is_branch_point=False, space=N):
    return store.save(
        space,
        as_tokens(tokens),
        lambda start: rows(start, len(tokens)),
        state(len(tokens)) if store.needs(space) else None,
        rows_nbytes=weigh,
        is_end=is_end,
        is_branch_point=is_branch_point,
    )


def blocks(found):
    """The rows that it restores."""
    return rows_before(found.nodes(), found.position)


def held(store, space=N):
    """What the nodes really hold, counted afresh."""
    tree = store._trees[space]
    return sum(node.rows_nbytes for node in tree.nodes()), sum(
        node.checkpoint.nbytes for node in tree.nodes() if node.checkpoint
    )
