"""How ranks talk beside MLX: messages of JSON over one connection between rank 0 and each of the others.

MLX's own collectives wait for every rank, for ever if one is gone, and can be waited for by one thread only. So what is
to be said and to be noticed goes over sockets: a rank that ends closes its own at once, and one that stands
still is no longer heard of.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import Any

import numpy as np

from ..errors import GroupError
from ..tokens import Tokens

Message = dict[str, Any]

MOST_BYTES = 1 << 28
"""Of one message: prompts have fewer tokens."""

MEETING_SECONDS = 60.0
"""How long rank 0 waits for the others to connect, once all have joined MLX's own group."""

MOST_DIGITS = 16
"""Of a rank's number, which is the first that it says."""

TOKENS = "tokens"
"""The entry of a message that is sent as bytes behind it."""


class Peer:
    """The connection to one other rank. Any thread may send; one receives."""

    def __init__(self, rank: int, connection: Connection):
        self.rank = rank
        self._connection = connection
        self._sending = threading.Lock()
        _send_at_once(connection)

    def send(self, message: Message) -> None:
        """Raises `OSError` where nobody is there any more."""
        tokens = message.get(TOKENS)
        if tokens is not None:
            message = {**message, TOKENS: len(tokens)}
        with self._sending:
            self._connection.send_bytes(json.dumps(message).encode())
            if tokens is not None:
                self._connection.send_bytes(np.asarray(tokens, np.int32).tobytes())

    def receive(self) -> Message:
        """The next. Raises `OSError` or `EOFError` where nobody is there any more."""
        message: Message = json.loads(self._connection.recv_bytes(MOST_BYTES))
        if TOKENS in message:
            message[TOKENS] = _tokens(self._connection.recv_bytes(MOST_BYTES))
        return message

    def is_heard(self, seconds: float) -> bool:
        """Whether something comes within so many seconds; an end counts."""
        return self._connection.poll(seconds)

    def close(self) -> None:
        """Say and hear nothing any more."""
        self._connection.close()


def _tokens(sent: bytes) -> Tokens:
    return np.frombuffer(sent, np.int32).copy()


def _send_at_once(connection: Connection) -> None:
    """Small messages would wait for the answer to the one before (Nagle), up to 40 ms."""
    with socket.socket(fileno=connection.fileno()) as shared:
        shared.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        shared.detach()


class Meeting:
    """Where rank 0 waits for the others: at an address of the group's own network, with a key that only they know."""

    def __init__(self, host: str, key: bytes):
        self._key = key
        try:
            self._listening = socket.create_server((host, 0))
        except OSError as error:
            raise GroupError(
                f"Rank 0 cannot listen on {host}, its own address in the hostfile: {error.strerror}. Name an "
                "address that this machine has and the others reach."
            ) from error
        self.port: int = self._listening.getsockname()[1]
        self._arrived: queue.SimpleQueue[Peer] = queue.SimpleQueue()

    def wait_for(self, ranks: range) -> list[Peer]:
        """The connections of all of `ranks`, in order."""
        accepting = threading.Thread(target=self._accept, daemon=True)
        accepting.start()
        found: dict[int, Peer] = {}
        until = time.monotonic() + MEETING_SECONDS
        try:
            while len(found) < len(ranks):
                peer = self._arrived.get(timeout=max(0.0, until - time.monotonic()))
                found[peer.rank] = peer
        except queue.Empty as error:
            missing = ", ".join(str(rank) for rank in ranks if rank not in found)
            raise GroupError(
                f"Rank {missing} did not reach rank 0 within {MEETING_SECONDS:.0f} s. Ports between the "
                "machines may be closed."
            ) from error
        finally:
            self._listening.shutdown(socket.SHUT_RDWR)  # which ends `accept` too
            self._listening.close()
        return [found[rank] for rank in ranks]

    def _accept(self) -> None:
        with suppress(OSError):  # it is closed
            while True:
                accepted, _ = self._listening.accept()
                # A stranger who says nothing keeps nobody waiting.
                threading.Thread(target=self._greet, args=(accepted,), daemon=True).start()

    def _greet(self, accepted: socket.socket) -> None:
        connection = Connection(accepted.detach())
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            self._arrived.put(Peer(int(connection.recv_bytes(MOST_DIGITS)), connection))
        except (AuthenticationError, OSError, EOFError, ValueError):
            connection.close()  # not one of ours


def join(host: str, port: int, key: bytes, rank: int) -> Peer:
    """The connection of a rank to rank 0."""
    try:
        connection = Client((host, port), authkey=key)
    except OSError as error:
        raise GroupError(
            f"Rank {rank} does not reach rank 0 at {host}:{port}: {error.strerror}. Ports between the "
            "machines may be closed, or MLX_HYBRIDCACHE_RANK_0 has to name an address of rank 0's."
        ) from error
    connection.send_bytes(str(rank).encode())
    return Peer(0, connection)
