"""Connections: how long a client may take to say what it wants, and how many there may be.

uvicorn waits for ever for the rest of a header or a body, and for a client that takes nothing; and it
takes every connection that comes, until the process has no file left to open.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from enum import Enum
from http import HTTPStatus
from typing import Any, NamedTuple

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import ApiError
from ..log import CLIENTS
from .wire import written

log = logging.getLogger(CLIENTS)

HEAD_SECONDS = 20
"""From a connection's beginning, or the first byte of its next request, to the end of the header."""

BODY_SECONDS = 20
"""In each such time a body advances by `BODY_BYTES`, or ends."""

BODY_BYTES = 10_000

UNSENT_SECONDS = 90
"""A client that takes nothing for so long is gone. Longer than what ends a reply, which says so."""

MOST_CONNECTIONS = 1024

SPARE_CONNECTIONS = 256
"""Beside those that run and wait: pages, monitors, and clients that were refused."""

OWN_FILES = 256
"""Open files that are no connections: the model's, the cache's, the log."""


class Awaited(Enum):
    """What a client owes, in the order in which its connection gives way to a new one."""

    HEAD = "head"
    REQUEST = "request"  # nothing was begun: an agent thinks
    BODY = "body"


class Crowd:
    """All connections of a server. Who asks and listens stays; who is waited for longest gives way."""

    def __init__(self, most: int):
        self._most = most
        self._all: set[Connection] = set()
        self._waiting: dict[Awaited, dict[Connection, None]] = {each: {} for each in Awaited}

    def enter(self, connection: Connection) -> bool:
        """Whether there is room, or there was one to make room."""
        if len(self._all) >= self._most:
            slow = next((next(iter(each)) for each in self._waiting.values() if each), None)
            log.warning(
                "There are %d connections, as many as may be; %s.",
                self._most,
                "all are being served, and more are refused" if slow is None else "slow ones end",
            )
            if slow is None:
                return False
            self.leave(slow)
            slow.give_way()
        self._all.add(connection)
        return True

    def note(self, connection: Connection, awaited: Awaited | None) -> None:
        """It now waits for this, since now."""
        for each in self._waiting.values():
            each.pop(connection, None)
        if awaited is not None and connection in self._all:
            self._waiting[awaited][connection] = None

    def leave(self, connection: Connection) -> None:
        """It ends."""
        self.note(connection, None)
        self._all.discard(connection)


class Connection(H11Protocol):
    """uvicorn's, with an end to every wait for the client. What the client waits for may take as
    long as it takes.
    """

    def __init__(self, *args: Any, crowd: Crowd, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._crowd = crowd
        self._has_room = False
        self._awaited: Awaited | None = None
        self._waiting: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._received = self._received_before = 0
        self._unsent = 0

    # What asyncio calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # So writing pauses when the system takes no more, and resumes when it has all.
        transport.set_write_buffer_limits(high=0)
        self._has_room = self._crowd.enter(self)
        self._await(Awaited.HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        self._await(None)
        self._crowd.leave(self)
        super().connection_lost(exc)  # which also resumes writing

    def data_received(self, data: bytes) -> None:
        if (
            not self._has_room
        ):  # heard before it is refused: else the system would cut it off unread
            self._end(TOO_MANY, is_said=True)
            return
        self._received += len(data)
        super().data_received(data)
        self._await(self._owed(Awaited.HEAD))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()
        self._sending = self.loop.call_later(UNSENT_SECONDS, self._look_at_unsent)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    # What uvicorn calls

    def on_response_complete(self) -> None:
        super().on_response_complete()
        has_begun = bool(self.conn.trailing_data[0])
        self._await(self._owed(Awaited.HEAD if has_begun else Awaited.REQUEST))

    def send_400_response(self, msg: str) -> None:
        self._end(NO_HTTP)

    def shutdown(self) -> None:
        if self._awaited is Awaited.BODY:
            self._end(STOPPING)
        else:
            super().shutdown()

    def _should_upgrade(self) -> bool:
        return False  # nothing here is a WebSocket, and a client's offer is no reason for a warning

    # Our own

    def give_way(self) -> None:
        """Make room for another."""
        self._end(TOO_SLOW, is_said=True)

    def _owed(self, between: Awaited) -> Awaited | None:
        """What the client owes; `between` requests it is the next one's header, or the next one."""
        if self.transport.is_closing():
            return None
        if self.conn.their_state is h11.IDLE:
            return between
        return Awaited.BODY if self.conn.their_state is h11.SEND_BODY else None

    def _await(self, awaited: Awaited | None) -> None:
        if awaited is self._awaited:
            return  # the time goes on
        self._awaited = awaited
        self._crowd.note(self, awaited)
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        if awaited is Awaited.HEAD:
            self._waiting = self.loop.call_later(HEAD_SECONDS, self._end, TOO_SLOW)
        elif awaited is Awaited.BODY:
            self._await_body()

    def _await_body(self) -> None:
        self._received_before = self._received
        self._waiting = self.loop.call_later(BODY_SECONDS, self._look_at_body)

    def _look_at_body(self) -> None:
        is_answered = self.conn.our_state not in WAITING
        advanced = self._received - self._received_before
        # While we do not read, the client cannot write.
        if not is_answered and (self.flow.read_paused or advanced >= BODY_BYTES):
            self._await_body()
        else:
            self._end(TOO_SLOW)

    def _look_at_unsent(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent >= self._unsent:
            self.transport.abort()
            return
        self._unsent = unsent
        self._sending = self.loop.call_later(UNSENT_SECONDS, self._look_at_unsent)

    def _end(self, last_words: LastWords, *, is_said: bool = False) -> None:
        """Close it with `last_words`, which the log has, unless it was said for all of the crowd."""
        if self.transport.is_closing():
            return
        has_asked = self._awaited is not Awaited.REQUEST and self._received > 0
        if (has_asked or not self._has_room) and self.conn.our_state in WAITING:
            self.transport.write(last_words.sent)
            if not is_said:
                log.info("A connection was ended: %s.", last_words.reason)
        self._await(None)
        self.transport.close()


WAITING = (h11.IDLE, h11.SEND_RESPONSE)
"""States of ours in which no reply has begun."""


class LastWords(NamedTuple):
    """A whole response, after which a connection is closed, and what the log says of it."""

    sent: bytes
    reason: str


def _reply(status: HTTPStatus, message: str, code: str) -> LastWords:
    body = written(ApiError(status, message, code=code).body())
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        *(["retry-after: 5"] if status is HTTPStatus.SERVICE_UNAVAILABLE else []),
    ]
    sent = "\r\n".join([*lines, "", ""]).encode() + body
    return LastWords(sent, f"{status.value} {code}")


TOO_SLOW = _reply(
    HTTPStatus.REQUEST_TIMEOUT,
    "The request did not arrive in time. Send it again, as a whole.",
    "request_timeout",
)
TOO_MANY = _reply(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "The server has as many connections as it can serve. Try again later.",
    "too_many_connections",
)
NO_HTTP = _reply(HTTPStatus.BAD_REQUEST, "The request is not valid HTTP.", "invalid_http")
STOPPING = _reply(HTTPStatus.SERVICE_UNAVAILABLE, "The server is shutting down.", "shutting_down")


def room(busy: int) -> int:
    """How many connections to take, where so many may be busy at once.

    Each is an open file, and a process may have few: 256 is a Mac's limit, which it may raise itself.
    """
    wanted = max(MOST_CONNECTIONS, busy + SPARE_CONNECTIONS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + OWN_FILES:
        more = wanted + OWN_FILES
        more = more if hard == resource.RLIM_INFINITY else min(more, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
        except (OSError, ValueError) as error:
            log.info("The limit of open files stays at %d: %s.", soft, error)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return min(wanted, max(soft - OWN_FILES, soft // 2))
