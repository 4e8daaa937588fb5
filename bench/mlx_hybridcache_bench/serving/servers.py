"""Server processes: start one on a free port, wait until it answers, stop it."""

from __future__ import annotations

import ctypes
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import httpx2
import psutil

from mlx_hybridcache import HybridCacheError

OURS = "mlx_hybridcache.server"
THEIRS = "mlx_lm.server"

COMMANDS: dict[str, tuple[str, ...]] = {
    # `python -m mlx_lm.server` is deprecated in favour of the subcommand.
    THEIRS: ("-m", "mlx_lm", "server", "--log-level", "WARNING"),
    OURS: ("-m", "mlx_hybridcache.server", "--log-level", "WARNING"),
}
"""How each server is started by this Python, with its own defaults but for the logging."""

START_SECONDS = 180.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.05
LOG_TAIL = 2000
"""Characters of a server's log that an error quotes."""


class ServerError(HybridCacheError):
    """A server did not start, or stopped answering while it was needed."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What to start: a name for tables, and a program with its arguments but for the port."""

    name: str
    arguments: tuple[str, ...]
    program: str = sys.executable

    @classmethod
    def of(cls, name: str, model: str, extra: Sequence[str] = ()) -> Launch:
        """`OURS` or `THEIRS` on `model`, a directory or owner/name."""
        return cls(name, (*COMMANDS[name], "--model", model, *extra))

    def within(self, variables: Mapping[str, str]) -> Launch:
        """The same in an environment with these variables, such as another checkout's."""
        given = (f"{key}={value}" for key, value in variables.items())
        return replace(
            self, program="/usr/bin/env", arguments=(*given, self.program, *self.arguments)
        )


class ServerProcess:
    """One server on the loopback interface, which lives no longer than its `with` block."""

    def __init__(self, launch: Launch, *, start_seconds: float = START_SECONDS) -> None:
        self.name = launch.name
        self._start_seconds = start_seconds
        self.port = 0
        self._command = (launch.program, *launch.arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as the server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._log.close()

    def start(self) -> None:
        """Start the process; `wait_ready` waits until it answers, so that two may load at once."""
        assert self._process is None, "it runs already; a second process would never be stopped"
        self.port = free_port()
        self._log.seek(0)
        self._log.truncate()
        self._process = subprocess.Popen(
            [*self._command, "--port", str(self.port)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def wait_ready(self) -> None:
        """Return when `/health` answers 200. Raises `ServerError` with the log's end otherwise."""
        deadline = time.monotonic() + self._start_seconds
        while not self.healthy():
            if self._process is None or self._process.poll() is not None:
                raise ServerError(
                    f"{self.name} ended while starting. Its last words:\n{self._tail()}"
                )
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.name} did not answer within {self._start_seconds:.0f} s:\n{self._tail()}"
                )
            time.sleep(POLL_SECONDS)

    def healthy(self) -> bool:
        """Whether the process runs and `/health` says that it can generate."""
        if self._process is None or self._process.poll() is not None:
            return False
        try:
            return httpx2.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200
        except httpx2.HTTPError:
            return False

    @property
    def pid(self) -> int | None:
        """The process's number while it runs."""
        return self._process.pid if self._process is not None else None

    def cpu_seconds(self) -> float | None:
        """Processor time that the process has used, all its threads; None where nothing tells."""
        return cpu_seconds(self._process.pid) if self._process is not None else None

    def stop(self, patience_seconds: float = STOP_SECONDS) -> None:
        """Ask it to end, then make it."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """End it without asking: SIGKILL, as when the power goes."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def restart(self) -> bool:
        """Replace a server that died: true, for its cache is gone with it. Raises `ServerError`."""
        self.stop()
        self.start()
        self.wait_ready()
        return True

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace")[-LOG_TAIL:].strip()


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def cpu_seconds(pid: int) -> float | None:
    """Processor time of a running process, by the clock that Linux keeps for it, elsewhere by what the
    system tells; None of one that may not be seen.
    """
    clock = ctypes.c_int()
    clock_of = getattr(ctypes.CDLL(None), "clock_getcpuclockid", None)  # macOS has none
    if clock_of is not None:
        is_there = clock_of(pid, ctypes.byref(clock)) == 0
        return time.clock_gettime(clock.value) if is_there else None
    try:
        used = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return used.user + used.system
