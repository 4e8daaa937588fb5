"""What a smaller store makes of numbers: small, full and small again are the same bytes."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_hybridcache.caches.kinds.kind import Snapshot
from mlx_hybridcache.caches.kinds.recurrent import RecurrentKind
from mlx_hybridcache.caches.kinds.rows import RowsKind
from mlx_hybridcache.caches.kinds.smaller import FULL, StorePrecision, full, full_pieces
from mlx_hybridcache.caches.kinds.window import WindowKind

ROWS = RowsKind(((1, 2, 1, 64),) * 2, (mx.bfloat16,) * 2, headroom=True)
STATE = RecurrentKind(0)


def numbers(dtype, shape=(1, 2, 300, 64), scale=1.0, offset=0.0, seed=5):
    """Rows of any size, among them zeros, ones far larger than the rest, and a row of one sign."""
    x = (mx.random.normal(shape, key=mx.random.key(seed)) + offset) * scale
    x[:, :, 3], x[:, 1, 5, :40] = 0, 0
    x[:, :, 7] = mx.abs(x[:, :, 7])
    x[:, :, 9, 2] = 100 * scale
    return x.astype(dtype)


def same(one, other):
    return all(
        a.dtype == b.dtype
        and np.array_equal(np.array(a.view(mx.uint8)), np.array(b.view(mx.uint8)))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("scale", [1.0, 3e-5, 250.0, 1e-38, 3e-31])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_what_came_back_is_made_small_to_the_same_bytes(bits, dtype, scale, offset):
    """However often rows move between the store and running caches, they do not drift."""
    precision = StorePrecision(kv_bits=bits)
    once = precision.rows(ROWS, (numbers(dtype, scale=scale, offset=offset),))
    back = full(once)
    assert back[0].dtype == dtype
    assert same(precision.rows(ROWS, back), once)
    assert same(full(precision.rows(ROWS, back)), back)


@pytest.mark.parametrize(("bits", "most"), [(8, 1 / 254), (4, 1 / 14)])
def test_no_number_is_off_by_more_than_half_a_step(bits, most):
    """A step is the 127th, or the seventh, part of the largest magnitude in a group of 64."""
    x = numbers(mx.float32)
    (back,) = full(StorePrecision(kv_bits=bits).rows(ROWS, (x,)))
    largest = mx.abs(x).max(axis=-1, keepdims=True)
    assert (mx.abs(back - x) <= largest * most * 1.0001).all().item()
    is_largest = mx.abs(x) == largest
    assert mx.array_equal(mx.where(is_largest, back, 0), mx.where(is_largest, x, 0))


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_cut_and_joined_by_the_token(bits):
    """Tokens 100 to 210 of what is small are what 100 to 210 are made to."""
    precision, x = StorePrecision(kv_bits=bits), numbers(mx.bfloat16)
    whole = precision.rows(ROWS, (x, x * 2))
    part = precision.rows(ROWS, (x[:, :, 100:210], (x * 2)[:, :, 100:210]))
    assert same([each[:, :, 100:210] for each in whole], part)


def test_long_rows_are_made_small_and_full_in_pieces():
    """5,000 tokens: the copies are what one go makes, and so is what comes back, of running rows too."""
    precision, x = StorePrecision(kv_bits=8), numbers(mx.bfloat16, (1, 1, 5000, 32))
    small = precision.rows(ROWS, (x,))
    assert same(precision.row_copies(ROWS, (x,)), small)
    for stretch in (small, (x,)):
        pieces = [piece[0] for piece in full_pieces(precision, ROWS, [stretch])]
        assert [piece.shape[2] for piece in pieces] == [2048, 2048, 904]
        assert same([mx.concatenate(pieces, axis=2)], full(small))


@pytest.mark.parametrize(("bits", "share"), [(8, 0.52), (4, 0.27)])
@pytest.mark.parametrize("width", [64, 128, 256, 96])
def test_bytes_of_a_token(bits, share, width):
    """bf16 to 8 bits with a scale for 64 numbers: 0.516 of the bytes, to 4 bits 0.266; 96 has groups of 32."""
    x = numbers(mx.bfloat16, (1, 2, 10, width))
    small = StorePrecision(kv_bits=bits).rows(ROWS, (x,))
    more = 0.02 if width % 64 else 0.0
    assert sum(each.nbytes for each in small) <= (share + more) * x.nbytes


def test_a_state_is_made_small_and_its_taps_are_not():
    """Gated-DeltaNet's float32 state of 128 by 128 a head: 0.26 of the bytes, a scale for each value row."""
    taps, state = numbers(mx.bfloat16, (1, 3, 96, 64))[0], mx.random.normal((1, 4, 128, 128))
    small = StorePrecision(state_bits=8).snapshot(STATE, Snapshot((taps, state, None)))
    assert small.arrays[0] is taps
    assert small.arrays[-1] is None
    assert sum(each.nbytes for each in small.arrays[1:3]) <= 0.26 * state.nbytes
    assert small.arrays[2].shape == (1, 4, 128, 1)
    assert full(small.arrays)[1].shape == state.shape


def test_nothing_else_is_changed():
    """Windows, layers without values, integers, and everything where nothing was asked for."""
    precision, x = StorePrecision(kv_bits=8, state_bits=8), numbers(mx.bfloat16)
    window, kept = WindowKind(8, 8, 8, 0), Snapshot((x, x))
    assert precision.snapshot(window, kept) is kept
    empty, whole = mx.zeros((1, 2, 300, 0), mx.bfloat16), mx.zeros((1, 2, 300, 64), mx.int32)
    assert precision.rows(ROWS, (empty, whole)) == (empty, whole)
    assert FULL.rows(ROWS, (x,))[0] is x
    assert not FULL
    assert precision
