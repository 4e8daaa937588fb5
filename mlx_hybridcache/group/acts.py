"""What rank 0 tells the others, one message for each turn of a request: they do the same, and come to the same.

A decision of the engine follows from the requests, from their order and from a few facts that only rank 0 knows: the
time, how busy the worker is, and how much memory the tightest machine has left. So these are what is told. Whether all
came to the same is not believed but compared: with each message goes what rank 0's cache counts, and with each
restore its position, before anything is computed from there.
"""

from __future__ import annotations

import queue
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

from ..caches.memory import MemoryStore
from ..errors import GroupError
from ..machine import MemoryLeft, memory_left
from ..worker.turns import Load
from .connection import Message
from .figures import RankFigures
from .group import BEAT_SECONDS, Group

T = TypeVar("T")

AGREEING_SECONDS = 60
"""How long a rank waits to hear what the others say of what all do, in seconds in which it does not stand still itself."""


@dataclass(eq=False)
class Acts(ABC):
    """The facts that both sides go by: as of the last message `now`, in seconds of rank 0's clock, and what memory
    is `left` on the tightest machine, beside whose `own_reserve_bytes` all count with rank 0's `reserve_bytes`.
    """

    group: Group
    memory: MemoryStore
    load: Load
    now: float = field(default=0.0, init=False)
    left: MemoryLeft = field(default=MemoryLeft(2**62), init=False)
    reserve_bytes: int = field(default=0, init=False)
    own_reserve_bytes: int = field(default=0, init=False)
    _numbers: Iterator[int] = field(default_factory=count, init=False)

    def _taken(self, said: queue.SimpleQueue[T], rank: int) -> T:
        """The next that a rank has said."""
        for _ in range(round(AGREEING_SECONDS / BEAT_SECONDS)):
            if self.group.failure is not None:
                break
            with suppress(queue.Empty):
                return said.get(timeout=BEAT_SECONDS)
        raise self.group.fail(f"Rank {rank} said nothing for {AGREEING_SECONDS} s.")

    def counted(self) -> list[int]:
        """What this rank's cache comes to: the same on every rank, or they have parted ways."""
        budget = self.memory.budget
        return [
            budget.rows_bytes,
            budget.snapshot_bytes,
            budget.running_bytes,
            budget.used_bytes,
            self.memory.evictions,
            self.memory.clock,
        ]

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """What every rank says, by rank, as JSON: all ask at the same place. It takes as long as the slowest. Raises
        `GroupError` where one says nothing.
        """

    @abstractmethod
    def agree(self, position: int) -> None:
        """A request was restored at `position`: so it was on every rank, before anything is read there."""


@dataclass(eq=False)
class Telling(Acts):
    """Rank 0's side. Used on the worker thread only, but for `hear`. The others listen once `has_begun`."""

    has_begun: bool = field(default=False, init=False)
    figures: dict[int, RankFigures] = field(default_factory=dict, init=False)
    _read_at: float = field(default=0.0, init=False)
    read_by: Callable[[int, int], None] = field(default=lambda rank, number: None, init=False)
    _values: dict[int, queue.SimpleQueue[tuple[int, Any]]] = field(init=False)

    def __post_init__(self) -> None:
        self._values = {peer.rank: queue.SimpleQueue() for peer in self.group.peers}

    def hear(self, message: Message) -> None:
        """A rank says what all do, or that it is there, and how it does."""
        if message["do"] == "gather":
            self._values[message["rank"]].put((message["number"], message["value"]))
        elif message["do"] == "read":
            self.read_by(message["rank"], message["number"])
        else:
            self.figures[message["rank"]] = RankFigures.told(message)

    def gather(self, value: Any) -> list[Any]:
        values = [value]
        number = next(self._numbers)
        for rank, said in self._values.items():
            its, told = self._taken(said, rank)
            if its != number:
                raise self.group.fail(
                    f"Rank {rank} has parted ways with rank 0: it asked {its} times, not {number}."
                )
            values.append(told)
        self._send({"do": "gathered", "values": values})
        return values

    def tell(self, do: str, **what: Any) -> None:
        """Before it is done here. Raises `GroupError` where a rank is lost."""
        if self.group.failure is not None:
            raise self.group.failure
        self._look()
        load = self.load
        facts = {
            "do": do,
            "now": self.now,
            "left": [self.left.left_bytes, self.left.level],
            "load": [load.reading, load.waiting, load.writing],
            "counted": self.counted(),
        }
        self._send({**facts, **what})

    def agree(self, position: int) -> None:
        self._send({"do": "agree", "position": position})

    def _send(self, message: Message) -> None:
        for peer in self.group.peers:
            try:
                peer.send(message)
            except OSError as error:
                raise self.group.fail(f"Rank {peer.rank} is lost: {error.strerror}.") from error

    def _look(self) -> None:
        self.now = time.monotonic()
        if self.now >= self._read_at:
            self._read_at = self.now + BEAT_SECONDS
            own = memory_left()
            spare = [each.spare_bytes for each in [*self.figures.values()]]
            self.left = MemoryLeft(min([own.left_bytes, *spare]), own.level)


@dataclass(eq=False)
class Hearing(Acts):
    """Another rank's side."""

    _positions: queue.SimpleQueue[int] = field(default_factory=queue.SimpleQueue, init=False)
    _gathered: queue.SimpleQueue[list[Any]] = field(default_factory=queue.SimpleQueue, init=False)

    def heard(self, message: Message) -> None:
        """Before it is done here. Raises `GroupError` where this rank has come to something else than rank 0."""
        own = self.counted()
        if own != message["counted"]:
            raise GroupError(
                f"It has parted ways with rank 0: its cache counts {own}, rank 0's {message['counted']} "
                f"(bytes of rows, of states, of requests and of all, evictions, time), before {message['do']!r}."
            )
        self.now = message["now"]
        self.left = MemoryLeft(*message["left"])
        load: Sequence[int] = message["load"]
        self.load.reading, self.load.waiting, self.load.writing = load

    def has_read(self, number: int) -> None:
        """What the files of this rank had for that request is there, or could not be read."""
        with suppress(OSError):  # whoever listens to rank 0 notices
            told = {"do": "read", "rank": self.group.rank, "number": number}
            self.group.peers[0].send(told)

    def hear(self, message: Message) -> None:
        """What the turn at hand waits for: where rank 0 restores, or what all said. On the thread that listens."""
        if message["do"] == "agree":
            self._positions.put(message["position"])
        else:
            self._gathered.put(message["values"])

    def gather(self, value: Any) -> list[Any]:
        rank_0 = self.group.peers[0]
        try:
            number = next(self._numbers)
            rank_0.send({"do": "gather", "rank": self.group.rank, "number": number, "value": value})
        except OSError as error:
            raise GroupError(f"Rank 0 is lost: {error.strerror}.") from error
        return self._taken(self._gathered, 0)

    def agree(self, position: int) -> None:
        told = self._taken(self._positions, 0)
        if told != position:
            raise GroupError(
                f"It has parted ways with rank 0: it would restore {position:,} tokens, rank 0 {told:,}."
            )
