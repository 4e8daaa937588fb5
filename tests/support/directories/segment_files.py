"""Segments of known tokens and bytes, and their files."""

import os
from contextlib import contextmanager

import numpy as np

from mlx_hybridcache.disk.segment import Segment, Tensor, prefix_key, prefix_keys, read_data, write

SPACE = "0f" * 16


FLOATS = (Tensor("0.0", "F32", (1, 2, 4, 3)),)
"""96 bytes."""


def rows(start=0, end=4, tensors=FLOATS, model="tiny"):
    """Rows of tokens 10, 11, ... behind a parent of the same history."""
    tokens = np.arange(10, 10 + end, dtype=np.int32)
    parent, key = prefix_keys(SPACE, tokens, [start, end])
    return Segment(
        "rows", SPACE, key, parent if start else "", start, end, tokens[start:], tensors, model
    )


def state(at=4, tensors=FLOATS):
    key = prefix_key(SPACE, np.arange(10, 10 + at, dtype=np.int32))
    return Segment("state", SPACE, key, key, at, at, np.empty(0, np.int32), tensors)


def content(segment):
    """Bytes that differ from each other and between segments."""
    return np.random.default_rng(segment.end).bytes(segment.data_nbytes)


def stored(root, segment):
    """A segment in its file."""
    write(root, segment, [content(segment)])
    return place(root, segment)


def read(root, segment):
    room = bytearray(segment.data_nbytes)
    read_data(root, segment, [memoryview(room)])
    return bytes(room)


def place(root, segment):
    return root / "segments" / segment.name


def left_in(root):
    return [path for path in root.rglob("*") if path.is_file()]


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
