"""Start the ranks of a group as processes, hear what each prints, and leave none behind."""

import itertools
import json
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import forks

SUPPORT = str(Path(__file__).parents[1])
MOST_SECONDS = 1500
"""More than any group takes on a machine with other things to do: then it is killed, and its test fails."""


LOWEST, EACH = 12_000, 1_000
"""Each worker of the tests has so many ports of its own, below those that the system gives to whoever names none."""

_turns = itertools.count(os.getpid())


def free_ports(count):
    """Nobody takes one of them between this look and the start of what is to listen there."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    found = []
    while len(found) < count:
        port = LOWEST + EACH * worker + next(_turns) % EACH
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            found.append(port)
    return found


class Rank:
    """One process: its lines of JSON, as they come, and the rest of what it printed."""

    def __init__(self, number, process, lines):
        self.number = number
        self.process = process
        self.lines = lines
        self.said = []
        self.other = []
        self._came = threading.Condition()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self):
        for line in self.lines:
            with self._came:
                if line.startswith("{"):
                    self.said.append(json.loads(line))
                elif line.strip():
                    self.other.append(line)
                self._came.notify_all()
        with self._came:
            self._came.notify_all()

    def hears(self, key, count=1):
        """What it has said under `key`, once that were `count` things."""
        until = time.monotonic() + MOST_SECONDS
        with self._came:
            while len(found := [each[key] for each in self.said if key in each]) < count:
                is_over = self.process.poll() is not None and not self._reading.is_alive()
                assert not is_over, f"{self} ended without {key}\n{self.printed}"
                assert time.monotonic() < until, f"{self}: no {key}\n{self.printed}"
                self._came.wait(1)
        return found

    def ends(self):
        """Its exit status, once it has ended."""
        status = self.process.wait(MOST_SECONDS)
        self._reading.join(5)
        return status

    def kill(self, how=signal.SIGKILL):
        self.process.send_signal(how)

    @property
    def printed(self):
        return "".join(self.other[-60:])

    def __str__(self):
        return f"rank {self.number}"


@contextmanager
def group_of(size, tmp_path, *arguments, module="ranks.process", env=None):
    """So many ranks that run `module`, by default the scenario of `process.py` that the arguments name."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    ranks = []
    try:
        for number in range(size):
            own = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([SUPPORT, os.environ.get("PYTHONPATH", "")]),
                "MLX_RANK": str(number),
                "MLX_HOSTFILE": str(hosts),
                **(env or {}),
            }
            ranks.append(Rank(number, *forks.piped([module, *map(str, arguments)], own)))
        yield ranks
    finally:
        for rank in ranks:
            rank.process.kill()
        for rank in ranks:
            rank.ends()
            rank.lines.close()
