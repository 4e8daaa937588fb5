"""Tie-safe selection, and listening to what a router does: a block's own code with one call replaced.

Every block of the table selects with one `argpartition` along its experts. That call is replaced, and
nothing else: the block's own code runs on, so every number it makes keeps its bits. What goes into
`argpartition` is changed in two ways. All members of a group get the score of its first member, so
that the group has one score; and members beyond the group's cap, by index, cannot be chosen. Then a
tie is left only between equal scores, and those `argpartition` takes by index: on the CPU it compares
(score, index), on Metal it is a stable sort.

MLX promises neither that nor that equal rows give equal scores. `breaks_ties_by_index` and
`computes_rows_alike` look, on the device, when a patch is applied. What holds there is left out of the
forward: on a small model a single operation costs a third of a percent of a decoded token. Where ties
are not broken by index, scores are replaced by integers that are ordered so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from ..errors import RouterError
from .discovery.experts import router_rows
from .families import MoeLayer
from .patch import Group

_FLOATS = (mx.float32, mx.bfloat16, mx.float16)

DIMENSIONS = range(1, 5)
"""How many a block's scores may have: its batch and sequence, flattened or not, in routing groups or not."""

PROBED_ROWS = (1, 2, 3, 8, 33, 300)
"""Batches in which equal rows are looked at: kernels depend on the shape."""


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """What one block's router did in one forward, for T tokens, E experts and k chosen. Lazy arrays."""

    layer: MoeLayer
    inputs: mx.array  # (T, D), what the block was called with
    logits: mx.array  # (T, E), what the router's rows give
    scores: (
        mx.array
    )  # (T, E), what the block selects by: the higher the better, corrections included
    chosen: mx.array  # (T, k) uint32, in the order in which the block adds up its experts


Shared = dict[int, mx.array]
"""Whose score each expert takes, (..., E) uint32: by the number of dimensions that scores have."""

Bars = dict[tuple[mx.Dtype, int, bool], mx.array]
"""What is added to scores: by their dtype, their number of dimensions, and whether the highest are selected."""


def shared_of(whose: npt.NDArray[np.uint32]) -> Shared:
    """The same for scores of one to four dimensions."""
    shared = {ndim: _with_dimensions(mx.array(whose), ndim) for ndim in DIMENSIONS}
    mx.eval([*shared.values()])
    return shared


def bars_of(lowered: npt.NDArray[np.floating[Any]]) -> Bars:
    """Bars (..., E) that lower each expert's score so much, where the highest are selected."""
    bars = {
        (dtype, ndim, highest): _with_dimensions(
            mx.array(-lowered if highest else lowered).astype(dtype), ndim
        )
        for dtype in _FLOATS
        for ndim in DIMENSIONS
        for highest in (True, False)
    }
    mx.eval([*bars.values()])
    return bars


def _with_dimensions(by_expert: mx.array, ndim: int) -> mx.array:
    """As many as the scores have: to broadcast would be an operation of its own.

    When one token is decoded there is nothing to broadcast then.
    """
    return by_expert.reshape(*[1] * (ndim - 1), -1)


@dataclass(frozen=True, eq=False)
class TieSafe:
    """What changes the scores of one layer before they are selected from. Evaluated arrays."""

    experts: int
    shared: Shared | None  # None where each keeps its own score
    bars: Bars | None  # None where nobody is barred
    order: mx.array | None  # (E,) int64, where `argpartition` does not break ties by index

    @classmethod
    def of(cls, experts: int, groups: Sequence[Group]) -> TieSafe:
        """The selection for these groups, whatever the device computes."""
        shared = np.arange(experts, dtype=np.uint32)
        barred = np.zeros(experts, dtype=bool)
        for group in groups:
            shared[list(group.members[: group.cap])] = group.members[0]
            barred[list(group.members[group.cap :])] = True
        made = cls(
            experts,
            None if (shared == np.arange(experts)).all() else shared_of(shared),
            bars_of(np.where(barred, np.inf, 0.0)) if barred.any() else None,
            None if breaks_ties_by_index(experts) else mx.arange(experts, dtype=mx.int64),
        )
        mx.eval(made.order)
        return made

    @property
    def changes_nothing(self) -> bool:
        """Whether scores stay what they are."""
        return self.shared is None and self.bars is None and self.order is None

    def __call__(self, scores: mx.array, *, highest: bool) -> mx.array:
        """Scores (..., E) to select the highest of, or the lowest, with one order and no other."""
        if self.shared is not None:
            scores = mx.take_along_axis(scores, self.shared[scores.ndim], axis=-1)
        if self.bars is not None:
            scores = scores + self.bars[scores.dtype, scores.ndim, highest]
        return scores if self.order is None else ordered(scores, self.order)


def ordered(scores: mx.array, order: mx.array) -> mx.array:
    """Integers (..., E), int64, that compare as (score, index) does: no two are equal."""
    scores = scores.astype(mx.float32) + 0.0  # -0.0 equals 0.0
    bits = scores.view(mx.int32)
    # The bits of a negative float grow with its size.
    bits = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.astype(mx.int64) * (1 << 20) + order


@cache
def breaks_ties_by_index(experts: int) -> bool:
    """Whether this device's `argpartition` puts the lower index first among equals, in any batch."""
    tied = mx.array(np.arange(experts) % 3, dtype=mx.float32)
    for rows in (1, 3, 64):
        for kth in {0, experts // 2, experts - 1}:
            found = np.array(mx.argpartition(mx.broadcast_to(tied, (rows, experts)), kth, axis=-1))
            expected = set(np.argsort(np.array(tied), kind="stable")[: kth + 1].tolist())
            if any(set(row[: kth + 1].tolist()) != expected for row in found):
                return False
    return True


def computes_rows_alike(layer: MoeLayer, groups: Sequence[Group]) -> bool:
    """Whether on this device the group's equal rows give equal logits, in batches of several shapes."""
    router = layer.router
    is_linear = isinstance(router, nn.Linear | nn.QuantizedLinear)
    held = router.get("scales", router.weight).dtype
    dtype = held if held in _FLOATS else mx.bfloat16  # scales of the fp4 and fp8 modes are bytes
    width = router_rows(layer).shape[1]
    members = mx.array(np.array([m for group in groups for m in group.members], np.uint32))
    firsts = mx.array(np.array([g.members[0] for g in groups for _ in g.members], np.uint32))
    for rows in PROBED_ROWS:
        x = mx.random.normal((1, rows, width), key=mx.random.key(rows)).astype(dtype)
        logits = router(x) if is_linear else x @ router.weight.T
        if not mx.array_equal(logits[..., members], logits[..., firsts]).item():
            return False
    return True


# The call itself


def _argpartition(
    experts: int,
    tie_safe: TieSafe | None,
    heard: Callable[[mx.array, mx.array, int], None] | None = None,
) -> Callable[..., mx.array]:
    """MLX's own, but along the experts: there the scores go through `tie_safe` first."""
    plain = mx.argpartition

    def argpartition(a: mx.array, kth: int, axis: int = -1, **options: Any) -> mx.array:
        if a.shape[-1] != experts or axis not in (-1, a.ndim - 1):
            return plain(a, kth, axis, **options)  # routing groups are chosen along another axis
        safe = a if tie_safe is None else tie_safe(a, highest=kth < 0)
        found = plain(safe, kth, axis, **options)
        if heard is not None:
            heard(a, found, kth)
        return found

    return argpartition


def _with_names(function: Any, names: dict[str, Any]) -> Any:
    """The same code, with some of its global names meaning something else.

    A function that mlx-lm compiles stays compiled: MLX hands out what it was compiled from.
    """
    return FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def _rewired(layer: MoeLayer, replaced: dict[str, Any], *, compiled: bool) -> Callable[..., Any]:
    """The selector's own `__call__`, its helpers with it, seeing `replaced` in `mx`."""
    plain = _plain_class(layer.selector)
    own = plain.__call__
    names: dict[str, Any] = {"mx": SimpleNamespace(**{**vars(mx), **replaced})}
    for helper in layer.family.helpers:
        found = own.__globals__[helper]
        rebuilt = _with_names(found, names)
        is_compiled = not isinstance(found, FunctionType)
        names = {**names, helper: mx.compile(rebuilt) if is_compiled and compiled else rebuilt}
    return _with_names(own, names)  # type: ignore[no-any-return]


def _plain_class(module: Any) -> type:
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, _Rewired))


class _Rewired:
    """Marks a class made for one module, whose call is its own code with other names in it."""


def _rewire(module: Any, call: Callable[..., Any] | None) -> None:
    """Let `module` be called as `call`, through a class of its own; None: as it was made."""
    kind = _plain_class(module)
    if call is not None:
        names = {"__call__": call, "__module__": kind.__module__}
        kind = type(kind.__name__, (kind, _Rewired), names)
    object.__setattr__(module, "__class__", kind)


def select_tie_safe(layer: MoeLayer, groups: Sequence[Group]) -> None:
    """Let `layer`, whose rows are patched, select by groups; without groups as mlx-lm does.

    The block stays what it is to everyone else: its parameters and their names do not change.
    """
    selector = layer.selector
    _rewire(selector, None)
    selector.__dict__.pop(_TIE_SAFE, None)
    if not groups:
        return
    tie_safe = TieSafe.of(layer.count, groups)
    object.__setattr__(selector, _TIE_SAFE, tie_safe)
    if computes_rows_alike(layer, groups):
        tie_safe = replace(tie_safe, shared=None)
    if not tie_safe.changes_nothing:
        select_through(layer, tie_safe)


def select_through(layer: MoeLayer, tie_safe: TieSafe) -> None:
    """Let the scores of `layer` go through `tie_safe` before it selects from them."""
    replaced = {"argpartition": _argpartition(layer.count, tie_safe)}
    _rewire(layer.selector, _rewired(layer, replaced, compiled=True))


_TIE_SAFE = "_tie_safe"
"""Where a selector keeps its selection by groups, for those who listen."""


# Listening


@contextmanager
def listen(
    layers: Sequence[MoeLayer],
    on_routing: Callable[[Routing], None] | None = None,
    *,
    logits: Callable[[MoeLayer, mx.array], mx.array] | None = None,
    block: Callable[[MoeLayer, Callable[[mx.array], mx.array], mx.array], mx.array] | None = None,
) -> Iterator[None]:
    """Hear, and with `logits` or `block` change, what the routers of `layers` do while this lasts.

    `on_routing` gets every forward of every block, in order. `logits` takes a layer and its router's
    logits (..., E) and gives those to go on with: noise, or another precision. `block` stands in for
    a block's whole call: it takes the layer, the block's own call and its input (B, L, D), and gives the
    output. Tie-safe selection stays as it was applied. Not for serving: the model must not run on
    another thread meanwhile. Raises `RouterError` for a layer that is listened to already.
    """
    ears = [_Ear(layer, on_routing, logits, block) for layer in layers]
    try:
        for ear in ears:
            ear.open()
        yield
    finally:
        for ear in ears:
            ear.close()


_HEARD = "_heard"
"""Marks a block that is listened to."""


class _Ear:
    """One layer listened to."""

    def __init__(self, layer: MoeLayer, on_routing: Any, logits: Any, block: Any):
        self.layer = layer
        self.on_routing = on_routing
        self.change = logits
        self.block = block
        self.inputs: mx.array | None = None
        self.logits: mx.array | None = None
        self.undo: list[Callable[[], None]] = []

    def open(self) -> None:
        layer = self.layer
        selector, router, block = layer.selector, layer.router, layer.block
        if _HEARD in block.__dict__:
            raise RouterError(f"{layer.name} is listened to already; one listener at a time.")
        object.__setattr__(block, _HEARD, True)
        self.undo.append(lambda: object.__delattr__(block, _HEARD))
        before = type(selector)
        self.undo.append(lambda: object.__setattr__(selector, "__class__", before))
        replaced: dict[str, Any] = {
            "argpartition": _argpartition(layer.count, selector.__dict__.get(_TIE_SAFE), self._hear)
        }
        if isinstance(router, nn.Linear | nn.QuantizedLinear):
            parent, _, name = layer.family.router.rpartition(".")
            holder = layer.block
            for part in parent.split(".") if parent else ():
                holder = getattr(holder, part)
            self.undo.append(lambda: dict.__setitem__(holder, name, router))
            dict.__setitem__(holder, name, lambda x: self._through(router(x)))
        else:  # a matrix: its product is what the scoring function is called with
            for scoring in ("softmax", "sigmoid"):
                replaced[scoring] = self._scoring(getattr(mx, scoring))
        call = _rewired(layer, replaced, compiled=False)
        if selector is block:
            _rewire(selector, lambda own, x: self._call(lambda x: call(own, x), x))
            return
        _rewire(selector, call)
        own = _plain_class(block).__call__
        self.undo.append(lambda: _rewire(block, None))
        _rewire(block, lambda module, x: self._call(lambda x: own(module, x), x))

    def close(self) -> None:
        for undo in reversed(self.undo):
            undo()

    def _call(self, own: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        def run(x: mx.array) -> mx.array:
            self.inputs = x
            return own(x)

        return run(x) if self.block is None else self.block(self.layer, run, x)

    def _through(self, logits: mx.array) -> mx.array:
        if self.change is not None:
            logits = self.change(self.layer, logits)
        self.logits = logits
        return logits

    def _scoring(self, plain: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def scoring(a: mx.array, *args: Any, **options: Any) -> mx.array:
            is_router = a.shape[-1] == self.layer.count and self.logits is None
            return plain(self._through(a) if is_router else a, *args, **options)

        return scoring

    def _hear(self, scores: mx.array, found: mx.array, kth: int) -> None:
        inputs, logits = self.inputs, self.logits
        self.logits = None
        if self.on_routing is None or inputs is None or logits is None:
            return
        experts, k = self.layer.count, self.layer.top_k
        self.on_routing(
            Routing(
                self.layer,
                inputs.reshape(-1, inputs.shape[-1]),
                logits.reshape(-1, experts),
                (scores if kth < 0 else -scores).reshape(-1, experts),
                (found[..., -k:] if kth < 0 else found[..., :k]).reshape(-1, k),
            )
        )
