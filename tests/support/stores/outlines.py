"""Outlines as plain values: what other threads see, and what is there."""

from mlx_hybridcache.store.lazy_rows import full_nbytes


def seen(each):
    """An outline as plain values, bottom up."""
    return (
        each.start,
        each.end,
        each.tokens.tolist(),
        each.rows_bytes,
        each.checkpoint_bytes,
        each.is_pinned,
        each.last_used,
        {token: seen(child) for token, child in each.children.items()},
    )


def there(node):
    """The same read off the tree itself."""
    return (
        node.start,
        node.end,
        node.tokens.tolist(),
        full_nbytes(node),
        node.checkpoint.nbytes if node.checkpoint else None,
        node.pinned,
        node.last_used,
        {token: there(child) for token, child in (node.children or {}).items()},
    )
