"""What a model's requests and stored conversations weigh, and how much of that fits into a machine.

Every figure comes from the function by which the engine itself claims those bytes.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace

from .. import models
from ..caches.kinds.smaller import FULL, StorePrecision
from ..caches.layout import Layout, fresh_caches, leaves
from ..caches.quantizing.precision import Precision
from ..caches.room import ROW_STEP, batch_bytes, request_rows
from ..errors import ModelError
from ..group.layout import spread
from ..prefill import replay as replays
from ..prefill.schedule import Grid, Reading
from .unloaded_model import UnloadedModel

SMALL_MACHINE = 32 * 2**30
"""Up to here macOS recommends two thirds of the memory for the GPU, beyond it three quarters or more."""

UNLIMITED = 2**24
"""Tokens, for models whose configuration names no longest context."""

MOST_RUNNING = 32
"""More replies at once than the server runs by default."""


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes for store and running requests together, and where that number comes from."""

    budget_bytes: int
    working_set_bytes: int | None
    source: str


@dataclass(frozen=True, slots=True)
class Occupancy:
    """So many requests of the planned length under way. All in bytes.

    `live` are their caches; `joined` what they claim for a moment while the last of them joins the
    others' batch; `stored` the rows and checkpoints that they leave, `least_stored` with one
    checkpoint each and, where the store can leave them there, rows in their caches alone.
    """

    requests: int
    live_bytes: int
    joined_bytes: int
    stored_bytes: int
    least_stored_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most of all this at one moment."""
        return max(self.live_bytes, self.joined_bytes) + self.stored_bytes

    @property
    def needed_bytes(self) -> int:
        """What cannot be done without: no batch, one checkpoint each."""
        return self.live_bytes + self.least_stored_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """One model, one length of prompt. Use `make`."""

    model: UnloadedModel
    layout: Layout
    room: Room
    context: int
    max_tokens: int
    checkpoints: int

    @property
    def rows_bytes(self) -> int:
        """The rows of one conversation of `context` tokens, as they are stored."""
        return self.layout.rows_nbytes(0, self.context)

    @property
    def conversation_bytes(self) -> int:
        """The same with every checkpoint that a cold prompt of that length gets."""
        return self.rows_bytes + self.checkpoints * self.layout.stored_snapshot_bytes

    @property
    def least_conversation_bytes(self) -> int:
        """With the one at its end."""
        return self.rows_bytes + self.layout.stored_snapshot_bytes

    @property
    def running_bytes(self) -> int:
        """What one running request claims."""
        return self.layout.running_bytes(request_rows(self.context, self.max_tokens))

    def occupancy(self, requests: int) -> Occupancy:
        """`requests` of them at once."""
        joined = held = requests * self.running_bytes
        if requests > 1 and self.layout.merges:
            # A batch grows by ROW_STEP at a time. The first two make one, the others join it.
            capacity = request_rows(self.context, self.max_tokens) + ROW_STEP
            before = requests - 1 if requests > 2 else 0
            alone = requests - before
            joined = before * self.layout.running_bytes(capacity) + alone * self.running_bytes
            joined += batch_bytes(self.layout, requests, capacity, joined)[1]
        rows = requests * self.rows_bytes
        if (
            self.layout.shares_rows
        ):  # they lie in the caches, and move to the store a layer at a time at most
            rows = max(kind.rows_nbytes(0, self.context) for kind in self.layout.kinds)
        return Occupancy(
            requests=requests,
            live_bytes=held,
            joined_bytes=joined,
            stored_bytes=requests * self.conversation_bytes,
            least_stored_bytes=requests * self.layout.stored_snapshot_bytes
            + rows
            + self.layout.restoring_bytes(self.context),
        )

    def conversations(self, conversation_bytes: int) -> int:
        """How many of that size stay stored beside one running request."""
        return max(0, self.room.budget_bytes - self.running_bytes) // conversation_bytes

    @property
    def at_once(self) -> int:
        """How many requests fit at once, each with what it leaves stored."""
        return min(MOST_RUNNING, self.room.budget_bytes // self.occupancy(1).needed_bytes)

    @property
    def fits(self) -> bool:
        """Whether one request does."""
        return self.at_once > 0

    @property
    def longest_context(self) -> int:
        """The longest prompt of which one request fits, in tokens, at most the model's own limit."""
        limit = self.model.longest_context or UNLIMITED

        def needed(steps: int) -> int:
            return replace(self, context=steps * ROW_STEP).occupancy(1).needed_bytes

        steps = range(1, limit // ROW_STEP + 1)
        return bisect.bisect_right(steps, self.room.budget_bytes, key=needed) * ROW_STEP


def make(
    model: UnloadedModel,
    room: Room,
    *,
    context: int,
    max_tokens: int,
    step: int,
    every: int,
    precision: Precision | None = None,
    storing: StorePrecision = FULL,
    ranks: int = 1,
) -> Plan:
    """The plan for prompts of `context` tokens and replies of up to `max_tokens`, 0 for no limit.

    `precision` is what keys and values are quantized to, in layers whose shapes allow it; `storing` what a
    smaller store keeps. Of several `ranks`, each with some of the layers, the plan is for one machine, and `room` for what
    it holds of the weights. `step` and `every` are the server's prefill step and its distance of regular checkpoints. Raises
    `ModelError` for a model whose caches cannot be stored, or whose shapes cannot be told.
    """
    try:
        layout = Layout.traced(model.model, step, precision=precision, storing=storing)
        layout.release()
    except Exception as error:  # whatever a model's forward raises without numbers
        raise ModelError(
            f"The caches of {model.name} ({model.family}) cannot be told from its configuration: "
            f"{type(error).__name__}: {error}"
        ) from error
    if layout.unsupported:
        raise ModelError(
            f"{model.name} ({model.family}) keeps {', '.join(layout.unsupported)}, which this version "
            "cannot store: it is served without the cache, so there is nothing to plan."
        )
    if ranks > 1:
        layout = spread(layout, [len(leaves([each])) for each in fresh_caches(model.model)], ranks)
    grid = Grid(step, -(-every // step) * step, alignment=layout.alignment)
    reading = Reading(start=0, end=context - 1)
    cuts = replays.route_of(layout, grid, reading, exact=False).cuts
    return Plan(model, layout, room, context, max_tokens, len(cuts))


def room_on_a_mac(
    weights_bytes: int, memory_bytes: int, working_set_bytes: int | None = None
) -> Room:
    """A Mac with so much memory, of which macOS recommends `working_set_bytes` for the GPU.

    When that is not known it is assumed: two thirds up to 32 GiB and three quarters beyond, as Macs
    report (llama.cpp issues 1870 and 2048, exo pull request 1672). Newer systems give more on
    large machines, 107.5 of 128 GiB (ds4 pull request 893).
    """
    source = "as given"
    if working_set_bytes is None:
        small = memory_bytes <= SMALL_MACHINE
        working_set_bytes = memory_bytes * 2 // 3 if small else memory_bytes * 3 // 4
        source = f"assumed, {'two thirds' if small else 'three quarters'} of the memory"
    budget = models.budget_beside(weights_bytes, working_set_bytes)
    return Room(budget, working_set_bytes, source)


def room_here(weights_bytes: int) -> Room:
    """This machine, as the server's default budget would have it."""
    if models.has_metal():
        working_set = models.metal_working_set()
        budget = models.budget_beside(weights_bytes, working_set)
        return Room(budget, working_set, "as this machine's MLX says")
    budget = models.budget_of_free_memory(weights_bytes)
    return Room(budget, None, "a quarter of what is free on this machine without Metal")
