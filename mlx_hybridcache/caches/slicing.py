"""How far it does not matter into which slices a prompt is cut: asked of the model's own parts.

mlx-lm's dynamic RoPE stretches its frequencies by the end of the slice that a token is read in, once
that lies beyond the trained length. A window whose mask shows more rows than its cache keeps shows a token
more of its past within a slice than behind a slice's beginning. Up to some position neither happens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

DOUBLINGS = 22
"""Offsets that are tried: 1, 2, 4 and so on, as far as no model was trained for. A single far one will not
do: there a few tokens more no longer show in float32."""

HEADS = 256
"""No model has more. A formula may take them for tokens, as one in mlx-lm's `internlm3` does."""

_WIDTHS = range(8, 1032, 8)
_NOISE = 1e-3
"""Differences up to here are rounding; stretched frequencies turn some pair by 0.04 or more."""

Rotate = Callable[[mx.array, int], mx.array]
"""What a positional encoding makes of `(1, heads, tokens, width)` from an offset on."""


def rotation_limit(model: Any) -> int | None:
    """The number of tokens up to which the model's positional encodings do not depend on slices.

    None where they never do; 0 where one could not be asked.
    """
    rotations = [_rotation(module) for module in _encodings(model)]
    asked = [each for each in rotations if each is not None]
    if len(asked) < len(rotations):
        return 0
    # Not halves of one token: those may have a kernel of their own, which rounds otherwise.
    high = next((1 << k for k in range(DOUBLINGS) if _depend(asked, 1 << k, 4)), None)
    if high is None:
        return None
    low = 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _depend(asked, middle, 2) else (middle + 1, high)
    return low + 1


def _encodings(model: Any) -> Iterable[Any]:
    """Modules without weights or children that are called with an offset, one of each configuration."""
    found, kinds = {}, {type(module) for module in model.modules()}  # many modules, few kinds
    taking = {kind for kind in kinds if _takes_offset(kind)}
    for module in model.modules():
        if type(module) in taking and not _has_parts(module):
            found[_configuration(module)] = module
    return found.values()


def _takes_offset(kind: type) -> bool:
    is_called = any("__call__" in vars(each) for each in kind.__mro__)
    return is_called and "offset" in inspect.signature(kind.__call__).parameters


def _configuration(module: Any) -> tuple[Any, ...]:
    held = {**vars(module), **module}
    return (type(module), *((name, _told(value)) for name, value in sorted(held.items())))


def _told(value: Any) -> str:
    return repr(value.tolist() if isinstance(value, mx.array) else value)


def _has_parts(module: Any) -> bool:
    return bool(module.parameters()) or any(isinstance(x, nn.Module) for x in module.values())


def _rotation(encoding: Any) -> tuple[Rotate, mx.array] | None:
    """The encoding with something for it to turn; None where it takes nothing of any width."""
    told = getattr(encoding, "dims", getattr(encoding, "dim", None))
    for width in _WIDTHS if told is None else (told,):
        x = mx.random.normal((1, HEADS, 4, width), key=mx.random.key(width))
        try:
            mx.eval(encoding(x, offset=0))
        except Exception:  # whatever an unknown module thinks of this shape
            continue
        return partial(_called, encoding), x
    return None


def _called(encoding: Any, x: mx.array, offset: int) -> mx.array:
    return encoding(x, offset=offset)  # type: ignore[no-any-return]


def _depend(rotations: Sequence[tuple[Rotate, mx.array]], offset: int, tokens: int) -> bool:
    """Whether any of them turns `tokens` at `offset` otherwise when they come in two halves."""
    half, worst = tokens // 2, mx.array(0.0)
    for rotate, x in rotations:
        whole = rotate(x[:, :, :tokens], offset)
        first, second = x[:, :, :half], x[:, :, half:tokens]
        halves = mx.concatenate([rotate(first, offset), rotate(second, offset + half)], axis=2)
        worst = mx.maximum(worst, mx.abs(whole - halves).max())
    return bool((worst > _NOISE).item())


class MaskListener:
    """Hears how much of the past a model asks the masks of its windows to show."""

    def __init__(self, leaves: Sequence[Any]):
        self._shown: list[tuple[int, int]] = []
        for cache in leaves:
            if hasattr(cache, "max_size") and hasattr(cache, "make_mask"):
                cache.make_mask = partial(self._heard, cache.make_mask, cache.max_size)

    def _heard(self, make: Callable[..., Any], kept: int, *args: Any, **options: Any) -> Any:
        self._shown.append((options.get("window_size") or 0, kept))
        return make(*args, **options)

    @property
    def limit(self) -> int | None:
        """As `rotation_limit`, for windows."""
        return min((kept for shown, kept in self._shown if shown > kept), default=None)
