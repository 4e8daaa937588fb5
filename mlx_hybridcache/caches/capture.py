"""Capture hooks: states at interior positions of one full-size forward, for the price of a copy.

A Gated-DeltaNet layer scans its slice token by token, so running the scan in pieces inside one
forward passes through the state at every cut with the same bits as pausing there would. The
convolution's taps at a cut are rows of its own input. Both are had without a second version of the
layer: its own code runs, with mlx-lm's scan replaced by the same scan in pieces, and with its
convolution listened to. Pausing instead would cost a forward per cut, which on a large MoE reads
nearly all expert weights again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import FunctionType
from typing import Any

import mlx.core as mx
from mlx_lm.models import qwen3_5, qwen3_next

from .gated_delta import scan_here
from .kinds.kind import Snapshot
from .kinds.rows import compact
from .subclassed import Subclassed

SCAN = "gated_delta_update"
"""The function of mlx-lm that a hooked layer calls, looked up in the layer's module."""

HOOKED: tuple[type, ...] = (qwen3_next.Qwen3NextGatedDeltaNet, qwen3_5.GatedDeltaNet)


class _Recording:
    """What one layer's forward passes through at the given offsets into its slice."""

    def __init__(self, offsets: Sequence[int]):
        self.offsets = list(offsets)
        self.conv_input: mx.array | None = None
        self.states: list[mx.array] = []

    def scan_in_pieces(self, scan: Callable[..., Any]) -> Callable[..., Any]:
        def pieces(
            q: mx.array,
            k: mx.array,
            v: mx.array,
            a: mx.array,
            b: mx.array,
            A_log: mx.array,
            dt_bias: mx.array,
            state: mx.array | None = None,
            mask: mx.array | None = None,
            **options: Any,
        ) -> tuple[mx.array, mx.array | None]:
            outputs = []
            for start, end in pairwise([0, *self.offsets, q.shape[1]]):
                part = [x[:, start:end] for x in (q, k, v, a, b)]
                part_mask = None if mask is None else mask[:, start:end]
                output, state = scan(*part, A_log, dt_bias, state, part_mask, **options)
                outputs.append(output)
                self.states.append(state)
            return mx.concatenate(outputs, axis=1), state

        return pieces

    def listen_to(self, convolve: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        def convolved(x: mx.array) -> mx.array:
            self.conv_input = x
            return convolve(x)

        return convolved

    def snapshots(self, taps: int) -> list[Snapshot]:
        """One per offset: the convolution's last `taps` inputs and the state, unevaluated."""
        assert self.conv_input is not None
        return [
            Snapshot((compact(self.conv_input[:, offset : offset + taps]), state))
            for offset, state in zip(self.offsets, self.states, strict=False)
        ]


_listened = threading.local()
"""The recordings of the forward that runs on this thread, by layer. Another thread may run the same
model at the same time; it hears nothing and is heard by nobody."""


def _recording_of(layer: Any) -> _Recording | None:
    recordings: dict[int, _Recording] = getattr(_listened, "recordings", {})
    return recordings.get(id(layer))


def _listening(plain: Any) -> type:
    """A subclass of the layer class `plain` that can be listened to, and is it otherwise."""
    call = plain.__call__

    def listening_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        recording, plain_scan = _recording_of(self), call.__globals__[SCAN]
        scan = plain_scan if self.training else scan_here(plain_scan)
        if recording is not None:
            scan = recording.scan_in_pieces(scan)
        if scan is plain_scan:
            return call(self, *args, **kwargs)
        # The layer's own code, with one name looked up elsewhere.
        names = {**call.__globals__, SCAN: scan}
        own = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
        return own(self, *args, **kwargs)

    def conv1d(self: Any) -> Any:
        convolve, recording = self["conv1d"], _recording_of(self)
        return convolve if recording is None else recording.listen_to(convolve)

    names = {"__call__": listening_call, "conv1d": property(conv1d)}
    return type(f"Listening{plain.__name__}", (plain,), names)


_LISTENING = {plain: _listening(plain) for plain in HOOKED}


class CaptureHook:
    """Captures the recurrent layers of one model, keyed by their index among the model's caches.

    The layers have a subclass of their own class until `release`: one that came and went with each
    forward would be seen by other threads that run the same model.
    """

    def __init__(self, layers: dict[int, Any]):
        self._layers = layers
        self._subclassed = Subclassed(
            (layer, _LISTENING.get(type(layer), type(layer))) for layer in layers.values()
        )

    def release(self) -> None:
        """Let the layers be what they were."""
        self._subclassed.release()

    @classmethod
    def of(cls, model: Any, recurrent: set[int]) -> CaptureHook | None:
        """The hook, or None where some recurrent layer's family has none."""
        known = (*_LISTENING, *_LISTENING.values())
        found = {
            index: layer.linear_attn
            for index, layer in enumerate(model.layers)
            if type(getattr(layer, "linear_attn", None)) in known
        }
        return cls(found) if found and set(found) == recurrent else None

    @contextmanager
    def at(self, offsets: Sequence[int]) -> Iterator[Callable[[], dict[int, list[Snapshot]]]]:
        """Listen to one forward; the yielded function then gives each layer's snapshots, by offset.

        `offsets` are ascending, strictly inside the slice.
        """
        recordings = {index: _Recording(offsets) for index in self._layers}
        _listened.recordings = {
            id(layer): recordings[index] for index, layer in self._layers.items()
        }
        try:
            yield lambda: {
                index: recording.snapshots(self._layers[index].conv_kernel_size - 1)
                for index, recording in recordings.items()
            }
        finally:
            del _listened.recordings
