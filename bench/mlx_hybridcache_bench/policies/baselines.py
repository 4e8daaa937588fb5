"""What others keep, at the same bytes: `mlx_lm.server`'s entries and llama.cpp's slots.

Neither has a tree: an entry is a copy of everything from position 0. So a prompt is compared with the
sequences of earlier requests, whose common beginnings are known beforehand (`Overlaps`). Where a source is in doubt,
it is given the benefit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mlx_hybridcache.store.tree import common_length

from .sized import Shape
from .traces import TracedRequest


class Overlaps:
    """How far the sequences of a trace agree: prompts, and prompts with their replies."""

    def __init__(self, trace: Sequence[TracedRequest]) -> None:
        self.count = len(trace)
        sequences = [asked.tokens for asked in trace]
        sequences += [np.concatenate([asked.tokens, asked.reply]) for asked in trace]
        # Neighbours in sorted order share most; any two share the least that neighbours between them do.
        order = sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">i4").tobytes())
        near = [common_length(sequences[a], sequences[b]) for a, b in pairwise(order)]
        self._lengths = np.zeros((len(order), len(order)), dtype=np.int64)
        steps = np.array(near, dtype=np.int64)
        for rank, index in enumerate(order):
            self._lengths[index, index] = len(sequences[index])
            shared = np.minimum.accumulate(steps[rank:])
            self._lengths[index, order[rank + 1 :]] = shared
            self._lengths[order[rank + 1 :], index] = shared

    def of_prompts(self, request: int) -> npt.NDArray[np.int64]:
        """Of one request's prompt and reply with every request's prompt: tokens, shape `(n,)`."""
        return self._lengths[self.count + request, : self.count]

    def shared(self, request: int, other: int) -> int:
        """Of one request's prompt and reply with another's: tokens."""
        return int(self._lengths[self.count + request, self.count + other])


@dataclass(slots=True)
class _Entry:
    """A copy of the first `tokens` tokens that request `owner` read or wrote."""

    owner: int
    tokens: int


@dataclass
class MlxLm:
    """`mlx_lm.server` 0.32.2: entries at the system prompt's end, the prompt's end and the reply's end.

    Only entries that are a prefix of the prompt serve a hybrid model. They leave in the order in which
    they came, those of the kind that has most first. Its cap of ten entries is left out: bytes alone count, and
    they are enforced at every insertion, which it does not do. Every chat is taken to begin with a system prompt
    and to end with a user's message, which is when it makes most checkpoints.
    """

    trace: Sequence[TracedRequest]
    overlaps: Overlaps
    shape: Shape
    budget_bytes: int
    _queues: dict[str, deque[_Entry]] = field(
        default_factory=lambda: {kind: deque() for kind in ("assistant", "user", "system")}
    )
    _nbytes: int = 0

    def serve(self, index: int) -> int:
        """Request `index` of the trace; returns the tokens replayed."""
        asked = self.trace[index]
        limit = len(asked.tokens) - 1
        running = self.shape.running_bytes(asked)
        if running > self.budget_bytes:
            return len(asked.tokens)
        restored = max(
            (
                entry.tokens
                for queue in self._queues.values()
                for entry in queue
                if entry.tokens <= min(limit, self.overlaps.of_prompts(entry.owner)[index])
            ),
            default=0,
        )
        room = self.budget_bytes - running
        self._fit(room)
        for kind, position in _segments(asked):
            if position > restored:
                self._insert(kind, _Entry(index, position), room)
        self._insert("assistant", _Entry(index, len(asked.tokens) + len(asked.reply)), room)
        return len(asked.tokens) - restored

    def _insert(self, kind: str, entry: _Entry, room: int) -> None:
        for queue in self._queues.values():
            for old in queue:
                same = old.tokens == entry.tokens
                if same and self.overlaps.shared(old.owner, entry.owner) >= entry.tokens:
                    queue.remove(old)
                    self._nbytes -= self.shape.prefix_bytes(old.tokens)
                    break
        self._queues[kind].append(entry)
        self._nbytes += self.shape.prefix_bytes(entry.tokens)
        self._fit(room)

    def _fit(self, room: int) -> None:
        while self._nbytes > room:
            assistant, user, system = self._queues.values()
            if assistant and len(assistant) >= len(user):
                gone = assistant.popleft()
            elif user and len(user) >= len(system):
                gone = user.popleft()
            else:
                gone = system.popleft()
            self._nbytes -= self.shape.prefix_bytes(gone.tokens)


def _segments(asked: TracedRequest) -> list[tuple[str, int]]:
    """Where entries are made while a prompt is read, with their kinds."""
    end = len(asked.tokens) - 1
    if len(asked.turns) < 2:
        return [("assistant", end)]
    system = [("system", asked.turns[1])] if len(asked.turns) > 2 else []
    # Behind the opener of the reply stand its role and a newline; more is a prepared `<think>`.
    tail = end + 1 - asked.turns[-1] - 2
    if 0 < tail <= 11:
        return [*system, ("user", end + 1 - tail), ("assistant", end)]
    return [*system, ("user", end)]


CHECKPOINTS = 32
EVERY = 8192
ENDS = (516, 4)
SIMILAR, KEPT_HALF, KEPT_QUARTER = 0.1, 0.5, 0.25


@dataclass(slots=True)
class _Slot:
    """Tokens of request `owner` from 0 to `tokens`, and the positions of context checkpoints, ascending."""

    owner: int
    tokens: int
    checkpoints: list[int]

    def nbytes(self, shape: Shape) -> int:
        return shape.prefix_bytes(self.tokens) + len(self.checkpoints) * shape.checkpoint_bytes


@dataclass
class LlamaCpp:
    """llama.cpp's server: one live slot, 32 context checkpoints in it, and a RAM cache of other slots.

    Defaults of 2026 (unified KV, idle slots saved): a slot that is at least a tenth alike is taken; one that would
    lose half of its tokens is saved first, and a better one looked for among those saved, which must agree for a quarter of their length and
    is taken out. Checkpoints every 8,192 tokens, at the last two turns, 516 and 4 tokens before the end; those
    beyond the common prefix are erased, the oldest beyond 32 too. Saved slots leave oldest first. The
    live slot is read on in place, so that a running request's rows are held once. The budget holds what that
    slot uses, checkpoints included, and the RAM cache: the context that is allocated beyond it at the start is left out.
    """

    trace: Sequence[TracedRequest]
    overlaps: Overlaps
    shape: Shape
    budget_bytes: int
    _live: _Slot | None = None
    _saved: list[_Slot] = field(default_factory=list)

    def serve(self, index: int) -> int:
        """Request `index` of the trace; returns the tokens replayed."""
        asked = self.trace[index]
        length = len(asked.tokens)
        slot = self._choose(index, length)
        restored = self._restore(slot, index, length) if slot is not None else 0
        kept = [at for at in slot.checkpoints if at <= restored] if slot is not None else []
        running = self.shape.running_bytes(asked)
        if running > self.budget_bytes:
            self._live = None
            return length
        room = self.budget_bytes - running
        most = min(CHECKPOINTS, room // self.shape.checkpoint_bytes)
        cuts = sorted({*kept, *self._cuts(asked, restored)})
        self._live = _Slot(
            index, length + len(asked.reply), cuts[len(cuts) - most :] if most < len(cuts) else cuts
        )
        room -= len(self._live.checkpoints) * self.shape.checkpoint_bytes
        saved = sum(slot.nbytes(self.shape) for slot in self._saved)
        while self._saved and saved > room:
            saved -= self._saved.pop(0).nbytes(self.shape)
        return length - restored

    def _choose(self, index: int, length: int) -> _Slot | None:
        live = self._live
        common = self._common(live, index)
        alike = live is not None and common / length > SIMILAR
        if live is not None and alike and common / live.tokens >= KEPT_HALF:
            return live
        base = live if alike else None
        if live is not None and alike:
            self._save(live)
        best, keep, similar = base, -1.0, 0.0
        if base is not None:
            keep, similar = common / base.tokens, common / length
        for slot in self._saved:
            shared = self._common(slot, index)
            if shared / slot.tokens < KEPT_QUARTER:
                continue
            if shared / slot.tokens > keep and shared / length > similar:
                best, keep, similar = slot, shared / slot.tokens, shared / length
        if best in self._saved:
            self._saved.remove(best)
        if live is not None and not alike:
            self._save(live)  # idle slots are saved when another one begins
        return best

    def _common(self, slot: _Slot | None, index: int) -> int:
        if slot is None:
            return 0
        return min(slot.tokens, int(self.overlaps.of_prompts(slot.owner)[index]))

    def _restore(self, slot: _Slot, index: int, length: int) -> int:
        common = self._common(slot, index)
        if common == slot.tokens < length:
            return common  # the live state goes on
        return max((at for at in slot.checkpoints if at <= min(common, length - 1)), default=0)

    def _cuts(self, asked: TracedRequest, restored: int) -> set[int]:
        length = len(asked.tokens)
        cuts = {*range((restored // EVERY + 1) * EVERY, length, EVERY), *asked.turns[-2:]}
        cuts.update(length - before for before in ENDS)
        return {cut for cut in cuts if restored < cut < length}

    def _save(self, slot: _Slot) -> None:
        if slot in self._saved:
            return
        self._saved = [
            old
            for old in self._saved
            if min(old.tokens, self.overlaps.shared(old.owner, slot.owner)) < old.tokens
            or old.tokens > slot.tokens
        ]
        self._saved.append(slot)
