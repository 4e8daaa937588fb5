"""One server that several clients ask at once, and what it says of itself."""

from __future__ import annotations

import json
import re
import threading
import time

import httpx2

from .client import Client, Reply, RequestFailed
from .scenarios import Step
from .servers import ServerError, ServerProcess

PATIENCE_SECONDS = 600.0
READ_TOKENS = re.compile(r"^mlx_hybridcache_replayed_tokens_total (\S+)$", re.MULTILINE)


class Target:
    """A server that may be asked from any thread. It is started again when it died."""

    def __init__(self, process: ServerProcess) -> None:
        self.name = process.name
        self.gone = ""  # why it is asked no more
        self._process = process
        self._client = self._connect()

    def _connect(self) -> Client:
        return Client(self._process.url, cpu_clock=self._process.cpu_seconds)

    def close(self) -> None:
        """Give the connections back; the process belongs to whoever started it."""
        self._client.close()

    def ask(self, step: Step) -> Reply:
        """Raises `RequestFailed`."""
        return self._client.ask(step.path, step.body)

    def first_token_seconds(self, step: Step, begun: threading.Event) -> float:
        """Seconds until a prompt is read; sets `begun` when the server is at it, or has failed.

        Both servers say how far they are in comments of the stream. Raises `RequestFailed`.
        """
        sent, body = time.perf_counter(), {"temperature": 0.0, **step.body, "stream": True}
        url, first = f"{self._process.url}{step.path}", None
        try:
            with (
                httpx2.Client(timeout=PATIENCE_SECONDS, trust_env=False) as client,
                client.stream("POST", url, json=body) as response,
            ):
                for line in response.iter_lines():
                    if line.startswith(":"):
                        begun.set()
                    elif first is None and _is_token(line):
                        first = time.perf_counter() - sent
        except httpx2.HTTPError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        finally:
            begun.set()
        if first is None:
            raise RequestFailed(f"status {response.status_code}, and no reply")
        return first

    def read_tokens(self) -> float | None:
        """Prompt tokens that it has read since its start; None where it does not say."""
        try:
            said = httpx2.get(f"{self._process.url}/metrics", timeout=30, trust_env=False)
        except httpx2.HTTPError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        found = READ_TOKENS.search(said.text) if said.status_code == 200 else None
        return float(found[1]) if found else None

    def revive(self) -> bool:
        """Whether it had to be started again. If it will not start, the run goes on without it."""
        if self._process.healthy():
            return False
        self._client.close()
        try:
            self._process.restart()
        except ServerError as error:
            self.gone = str(error)
        self._client = self._connect()
        return True


def _is_token(line: str) -> bool:
    """Whether an event brings text. Raises `RequestFailed` when it tells of an error."""
    if not line.startswith("data: {"):
        return False
    chunk = json.loads(line.removeprefix("data: "))
    if "error" in chunk:
        raise RequestFailed(f"the stream says: {chunk['error']}")
    deltas = [choice.get("delta") or {} for choice in chunk.get("choices") or ()]
    return any(value for delta in deltas for name, value in delta.items() if name != "role")
