"""Servers and ranks that have imported everything already: a start costs a tenth of what it costs a user.

A process that has imported what servers import, and done nothing yet, is forked for each start
(`multiprocessing`'s fork server). From there on it is `python -m mlx_hybridcache.server`,
mlx_lm.server, or a rank's module. Where Metal is, which does not survive a fork, a new interpreter is started as ever.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import itertools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import connection, forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, TextIO
from unittest import mock

import psutil
import pytest

OURS, THEIRS = "mlx_hybridcache.server", "mlx_lm.server"
STARTED = {("-m", OURS): OURS, ("-m", "mlx_lm", "server"): THEIRS}
"""What follows the interpreter on a command line."""

IMPORTED = (
    "mlx_hybridcache_server.service",
    "mlx_lm.models.qwen3_next",
    "mlx_lm.tool_parsers.json_tools",
    THEIRS,
    __name__,
)


_one_at_a_time = threading.Lock()
"""`multiprocessing` asks every process for its status at each start. It can be read once: who comes second, on another
thread, is told 255."""


class Running(Protocol):
    """What tests do with a process."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, number: int) -> None: ...
    def kill(self) -> None: ...


Output = str | connection.Connection
"""A file that is appended to, or the writing end of a pipe."""


class Forked:
    """One process, with the manners of `subprocess.Popen`."""

    def __init__(self, command: list[str], out: Output, err: Output, environment: dict[str, str]):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        given = (command, out, err, environment)
        self._process = context.Process(target=_serve, args=given, daemon=True)
        with _one_at_a_time:
            with mock.patch.dict(os.environ, environment):  # some modules read it on import
                forkserver.ensure_running()
            self._process.start()
        self.pid = int(self._process.pid or 0)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        with _one_at_a_time:
            return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        """As `poll`."""
        return self.poll()

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it has ended."""
        connection.wait([self._process.sentinel], timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Nothing once it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def start(command: list[str], out: str, err: str, environment: dict[str, str]) -> Running:
    """Start a server, a module's name and its flags; what it writes is appended to these files."""
    if sys.platform == "linux":
        return Forked(command, out, err, environment)
    module, *flags = command
    words = next(words for words, name in STARTED.items() if name == module)
    with Path(out).open("ab") as stdout, Path(err).open("ab") as stderr:
        return subprocess.Popen(
            [sys.executable, *words, *flags],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=environment,
        )


def piped(command: list[str], environment: dict[str, str]) -> tuple[Running, TextIO]:
    """Start a module with its arguments; and all that it writes, to be closed by the caller."""
    if sys.platform == "linux":
        reader, writer = connection.Pipe(duplex=False)
        with reader, writer:
            process = Forked(command, writer, writer, environment)
            return process, os.fdopen(os.dup(reader.fileno()), encoding="utf-8")
    started = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    assert started.stdout is not None
    return started, started.stdout


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the bench start its servers so too; its other programs are started as ever."""
    from mlx_hybridcache_bench.serving import servers

    if sys.platform == "linux":
        replaced = SimpleNamespace(**{**vars(subprocess), "Popen": popen})
        monkeypatch.setattr(servers, "subprocess", replaced)


def popen(command: list[str], *, stdout: Any, **how: Any) -> Any:
    """`subprocess.Popen`, but for servers; what they write goes to `stdout`. `env` may come before them, for variables
    that nothing reads on import.
    """
    given, (program, *rest) = _without_env(command)
    elsewhere = given.keys() & {"PATH", "PYTHONPATH"}
    for words, module in STARTED.items():
        if program == sys.executable and tuple(rest[: len(words)]) == words and not elsewhere:
            log = f"/proc/{os.getpid()}/fd/{stdout.fileno()}"
            return Forked([module, *rest[len(words) :]], log, log, {**os.environ, **given})
    return subprocess.Popen(command, stdout=stdout, **how)


def _without_env(command: list[str]) -> tuple[dict[str, str], list[str]]:
    """The variables that `env` is given, and the command behind them."""
    if command[0] != "/usr/bin/env":
        return {}, command
    variables = list(itertools.takewhile(lambda word: "=" in word, command[1:]))
    return dict(word.split("=", 1) for word in variables), command[1 + len(variables) :]


def cpu_seconds() -> float:
    """What all processes that were forked took so far, with what they were forked from."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is None:
        return 0.0
    ticks = sum(_ticks(pid))
    with contextlib.suppress(psutil.Error):  # what ends meanwhile is counted the next time
        for each in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(OSError):
                ticks += sum(_ticks(each.pid))
    return ticks / os.sysconf("SC_CLK_TCK")


def _ticks(pid: int) -> Iterator[int]:
    """A process's in its own code and in the system's, and those of its processes that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return map(int, fields[11:15])


def _serve(command: list[str], out: Output, err: Output, environment: dict[str, str]) -> None:
    """In the new process: become what the command names."""
    os.environ.clear()
    os.environ.update(environment)
    for number, where in enumerate((os.devnull, out, err)):
        if isinstance(where, connection.Connection):
            os.dup2(where.fileno(), number)
            continue
        opened = os.open(where, os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)
    if isinstance(out, connection.Connection):
        out.close()  # whoever reads it waits for the last end to be closed
    module, *_ = sys.argv = command
    try:
        if module == THEIRS:
            importlib.import_module(module).main()
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
