"""One server under measurement, asked from any thread, and started again when it died."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import Any, Protocol

import httpx2

from .client import Client, Reply, RequestFailed
from .scenarios import Step
from .servers import ServerError

PATIENCE_SECONDS = 600.0
READ_TOKENS = re.compile(r"^mlx_hybridcache_replayed_tokens_total (\S+)$", re.MULTILINE)


class Server(Protocol):
    """A server that can be asked: a process of ours, or one that runs elsewhere."""

    name: str

    @property
    def url(self) -> str: ...

    def healthy(self) -> bool: ...

    def restart(self) -> bool: ...

    def cpu_seconds(self) -> float | None: ...


class Target:
    """A server that may be asked from any thread. It is started again when it died.

    `fields` are sent with every request. After `most_restarts` the server is given up; None goes
    on for ever. `head_start_seconds` is how long a prompt at most counts as not yet begun.
    """

    def __init__(
        self,
        server: Server,
        *,
        timeout_seconds: float = PATIENCE_SECONDS,
        fields: Mapping[str, Any] | None = None,
        api_key: str | None = None,
        most_restarts: int | None = None,
        head_start_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self.name = server.name
        self.gone = ""  # why it is asked no more
        self.head_start_seconds = head_start_seconds
        self._server = server
        self._timeout_seconds = timeout_seconds
        self._fields = dict(fields or {})
        self._api_key = api_key
        self._restarts_left = most_restarts
        self._client = self._connect()

    def _connect(self) -> Client:
        return Client(
            self._server.url,
            timeout_seconds=self._timeout_seconds,
            cpu_clock=self._server.cpu_seconds,
            fields=self._fields,
            api_key=self._api_key,
        )

    def close(self) -> None:
        """Give the connections back; the process belongs to whoever started it."""
        self._client.close()

    def ask(self, step: Step, begun: threading.Event | None = None) -> Reply:
        """The reply. `begun` is set when the server is at it or has failed. Raises `RequestFailed`.

        Servers say how far they are in comments of the stream.
        """
        if begun is None:
            return self._client.ask(step.path, step.body)
        try:
            return self._client.ask(step.path, step.body, begun.set)
        finally:
            begun.set()

    def leave_out(self, name: str) -> None:
        """Send a field no more, which this server refuses."""
        self._fields[name] = None
        self._client.close()
        self._client = self._connect()

    def read_tokens(self) -> float | None:
        """Prompt tokens that it has read since its start; None where it does not say."""
        try:
            said = httpx2.get(f"{self._server.url}/metrics", timeout=30, trust_env=False)
        except httpx2.HTTPError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        found = READ_TOKENS.search(said.text) if said.status_code == 200 else None
        return float(found[1]) if found else None

    def revive(self, *, hung: bool = False) -> bool:
        """Whether it was started again, if need be. If that fails, the run goes on without it.

        `hung` says that it did not answer, however healthy it looks.
        """
        if not hung and self._server.healthy():
            return False
        self._client.close()
        again = False
        if self._restarts_left == 0:
            self.gone = "it failed again and again"
        else:
            self._restarts_left = self._restarts_left and self._restarts_left - 1
            try:
                again = self._server.restart()
            except ServerError as error:
                self.gone = str(error)
        self._client = self._connect()
        return again
