"""The ranks of one model: how they find each other, agree on what only some of them know, and notice who is gone."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import GroupError
from .address import MOST_NAME, address_of_rank_0
from .connection import Meeting, Message, Peer, join

log = logging.getLogger("mlx_hybridcache")

BEAT_SECONDS = 1.0
"""How often a rank says that it is there."""

LOST_SECONDS = 20.0
"""Of whom nothing is heard for so long, that one is lost. One that computes is heard; who ends is lost at once.
It is counted in looks of `BEAT_SECONDS`, because a rank that stood still itself (a machine that slept, a debugger) has
heard nobody meanwhile.
"""

LOOKS = round(LOST_SECONDS / BEAT_SECONDS)

KEY_BYTES = 16

LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""What the environment of a process has that `mlx.launch` or mpirun started as one of several."""


def is_launched() -> bool:
    """Whether this process was started as one rank of several."""
    return any(name in os.environ for name in LAUNCHED)


@dataclass(eq=False)
class Group:
    """The ranks of one model, of which this process is `rank`, of `size`. Every rank forms one, at the same time.

    `ranks` is MLX's own group, over which the model computes. What is to be said beside that goes over `peers`: on
    rank 0 connections to all others, on each other rank the one to rank 0.
    """

    ranks: mx.distributed.Group
    peers: list[Peer]
    failure: GroupError | None = field(default=None, init=False)
    _on_failure: list[Callable[[GroupError], None]] = field(default_factory=list, init=False)
    _failing: threading.Lock = field(default_factory=threading.Lock, init=False)
    _is_over: threading.Event = field(default_factory=threading.Event, init=False)

    @classmethod
    def form(cls, backend: str = "any") -> Group:
        """Meet the other ranks that `mlx.launch` started. `backend` is MLX's: ring, jaccl, mpi or any.

        Raises `GroupError` where there are no others, or one does not come.
        """
        ranks = mx.distributed.init(backend=backend)
        if ranks.size() < 2:
            raise GroupError(
                "There is one rank only. Start several: mlx.launch -n 2 --backend ring -- PROGRAM."
            )
        host, key = address_of_rank_0(ranks), secrets.token_bytes(KEY_BYTES)
        if ranks.rank():
            host, port, key = _told(ranks, None)
            return cls(ranks, [join(host, port, key, ranks.rank())])
        meeting = Meeting(host, key)
        _told(ranks, (host, meeting.port, key))
        return cls(ranks, meeting.wait_for(range(1, ranks.size())))

    @property
    def rank(self) -> int:
        return self.ranks.rank()

    @property
    def size(self) -> int:
        return self.ranks.size()

    # Before the first request

    def agree(self, value: Any) -> list[Any]:
        """What every rank says, by rank, as JSON; each rank calls this, in the same order."""
        try:
            if self.rank:
                self.peers[0].send({"value": value})
                return list(_value(self.peers[0].receive()))
            values = [value, *(_value(peer.receive()) for peer in self.peers)]
            for peer in self.peers:
                peer.send({"value": values})
        except (OSError, EOFError) as error:
            raise GroupError(
                "A rank ended before the model was ready; what it printed says why."
            ) from error
        return values

    def agree_or_say(self, value: Any, what: str) -> None:
        """Raises `GroupError` where not all ranks have the same `value` of `what`."""
        values = self.agree(value)
        odd = next((rank for rank, each in enumerate(values) if each != values[0]), None)
        if odd is not None:
            raise GroupError(
                f"The ranks differ in {what}: rank 0 has {values[0]}, rank {odd} has {values[odd]}. "
                "Start all of them alike."
            )

    # While it serves

    def watch(self, hear: Callable[[Message], None], beat: Callable[[], Message]) -> None:
        """From now on messages of the others go to `hear`, on threads of its own, and they hear of this rank each
        second what `beat` says. A rank of which nothing is heard is lost.
        """
        for peer in self.peers:
            threading.Thread(target=self._listen, args=(peer, hear), daemon=True).start()
        threading.Thread(target=self._beat, args=(beat,), daemon=True).start()

    def on_failure(self, do: Callable[[GroupError], None]) -> None:
        """To be called once, on any thread, when a rank is lost."""
        self._on_failure.append(do)

    def fail(self, why: str) -> GroupError:
        """This group serves nothing any more; the first reason stands. The others are told."""
        with self._failing:
            if self.failure is not None:
                return self.failure
            self.failure = failure = GroupError(why)
        log.error("%s", why)
        for peer in self.peers:
            self._tell(peer, {"do": "fail", "why": why})
        for do in self._on_failure:
            do(failure)
        return failure

    def end(self) -> None:
        """Rank 0 has ended as it should: nothing is to be noticed any more."""
        self._is_over.set()

    def wait(self) -> None:
        """Until rank 0 ends. Raises `GroupError` where a rank is lost before."""
        while not self._is_over.wait(BEAT_SECONDS):
            if self.failure is not None:
                raise self.failure

    def close(self) -> None:
        """Nothing is to be heard or noticed any more; the others end too."""
        self._is_over.set()
        for peer in [] if self.rank else self.peers:
            self._tell(peer, {"do": "end"})

    def _tell(self, peer: Peer, message: Message) -> None:
        def tell() -> None:
            try:
                peer.send(message)
            except OSError:
                log.debug("Rank %d hears nothing any more.", peer.rank)

        telling = threading.Thread(target=tell, daemon=True)
        telling.start()
        telling.join(BEAT_SECONDS)  # who stands still takes nothing

    def _listen(self, peer: Peer, hear: Callable[[Message], None]) -> None:
        try:
            while any(peer.is_heard(BEAT_SECONDS) for _ in range(LOOKS)):
                message = peer.receive()
                if message.get("do") == "fail":
                    self.fail(f"Rank {peer.rank}: {message['why']}")
                    return
                hear(message)
                if message.get("do") == "end":
                    return
            why = f"Nothing was heard of it for {LOST_SECONDS:.0f} s"
        except (OSError, EOFError):
            why = "Its process has ended"
        except Exception as error:
            why = f"What it says is not understood ({error!r})"
        if not self._is_over.is_set():
            self.fail(
                f"Rank {peer.rank} is lost. {why}; what it printed last may say more. Start all ranks again."
            )

    def _beat(self, beat: Callable[[], Message]) -> None:
        while not self._is_over.is_set() and self.failure is None:
            for peer in self.peers:
                try:
                    peer.send(beat())
                except OSError:
                    return  # whoever listens to it notices
            time.sleep(BEAT_SECONDS)


def _value(message: Message) -> Any:
    if "value" not in message:
        raise GroupError(str(message.get("why", "A rank said something else than was asked.")))
    return message["value"]


def _told(
    ranks: mx.distributed.Group, here: tuple[str, int, bytes] | None
) -> tuple[str, int, bytes]:
    """Where rank 0 waits, and the key; what only rank 0 knows goes over MLX's own group."""
    sent = np.zeros(MOST_NAME + KEY_BYTES + 1, np.int32)
    if here is not None:
        host, port, key = here
        name = host.encode()
        sent[: len(name)] = list(name)
        sent[MOST_NAME:-1] = list(key)
        sent[-1] = port
    came = mx.distributed.all_sum(mx.array(sent), group=ranks)
    mx.eval(came)
    numbers: list[int] = np.array(came).tolist()
    host = bytes(numbers[:MOST_NAME]).rstrip(b"\0").decode()
    return host, numbers[-1], bytes(numbers[MOST_NAME:-1])
