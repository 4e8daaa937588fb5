"""A server as a process of its own, which lives no longer than a `with` block."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from ..errors import HybridCacheError

MODULE = "mlx_hybridcache.server"
LISTENING = re.compile(rb"Listening on (http://\S+)\n")
LAST_WORDS = re.compile(rf"^{re.escape(MODULE)}: (?:error: )?(.*)", re.MULTILINE | re.DOTALL)
"""What a server says that cannot start: a sentence behind its name, and nothing after it."""

POLL_SECONDS = 0.02
STOP_SECONDS = 10.0
LOG_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Server:
    """A server that was started; its log is a file."""

    process: subprocess.Popen[bytes]
    log: int

    def wait_until_ready(self) -> str:
        """Its address, once it listens. Raises `HybridCacheError` in its own words if it ends.

        There is no deadline: a large model may be downloaded first.
        """
        while True:
            ended = self.process.poll() is not None  # before its last words are read
            said = self._said()
            if found := LISTENING.search(said):
                return found[1].decode()
            if ended:
                text = said.decode("utf-8", "replace")
                words = LAST_WORDS.search(text)
                raise HybridCacheError(
                    words[1].strip() if words else f"The server ended at its start:\n{text}"
                )
            time.sleep(POLL_SECONDS)

    def _said(self) -> bytes:
        # Not by seek and read: the server writes where this file stands.
        return os.pread(self.log, LOG_BYTES, 0)


@contextmanager
def running(flags: Sequence[str]) -> Iterator[Server]:
    """Start a server on a free port of this machine; stop it however the block ends.

    It is in a session of its own: a terminal's Ctrl-C is for whoever asks it.
    """
    command = [sys.executable, "-m", MODULE, "--host", "127.0.0.1", "--port", "0"]
    with (
        tempfile.TemporaryFile() as log,
        _exiting_on(signal.SIGTERM),
        _exiting_on(signal.SIGHUP),
    ):
        process = subprocess.Popen(
            [*command, "--log-level", "INFO", *flags],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield Server(process, log.fileno())
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, then make it."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:  # also when a second Ctrl-C ends the waiting
        process.kill()
        process.wait()


@contextmanager
def _exiting_on(number: int) -> Iterator[None]:
    """Let a signal that would end this process at once unwind it, so that nothing is left behind."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(number, leave)
    try:
        yield
    finally:
        signal.signal(number, before)
