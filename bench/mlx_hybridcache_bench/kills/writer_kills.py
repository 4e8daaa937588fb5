"""Kill writers of a cache directory, and look at what they left: what was promised, whole, and nothing else."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from mlx_hybridcache.disk.catalogue import Catalogue
from mlx_hybridcache.disk.directory import Directory
from mlx_hybridcache.disk.files import PARTIAL
from mlx_hybridcache.disk.segment import SEGMENTS, Segment, SegmentError, check_file, read_data

from .killed_writer import BUDGET_BYTES, Order, as_line, content

START_SECONDS = 0.05
"""In this time a writer opens the directory and hands over its first segments: half of them die in it."""

FEW_BYTES = 700 << 10
"""A budget at which already the second checkpoint makes others go."""

LONGEST_SECONDS = 0.25
"""The others live so long at most, and write and delete a few dozen files."""


@dataclass(eq=False)
class Account:
    """What writers reported, and what was found afterwards. Whatever is in `faults` must not be."""

    kills: int = 0
    finished: int = 0
    reported: int = 0
    deleted: int = 0
    checked: int = 0
    unfinished: int = 0
    promised: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    def hear(self, lines: list[str]) -> None:
        """Take down what one writer reported."""
        self.kills += 1
        for line in lines:
            name = line[1:]
            if line == "finished":
                self.finished += 1
            elif line.startswith("+"):
                self.reported += 1
                self.promised.add(name)
            else:
                assert line.startswith("-"), line
                self.deleted += 1
                self.promised.discard(name)

    def check(self, root: Path, budget_bytes: int = BUDGET_BYTES) -> None:
        """Open the directory as the next process would, and hold it against what was promised."""
        self.unfinished += sum(name.endswith(PARTIAL) for name, _ in _files(root))
        directory = Directory(root)
        entries = directory.open()
        self._expect(directory.is_writer, "the lock was not free")
        catalogue = Catalogue(budget_bytes, needs_checkpoints=True)
        gone: list[Segment] = []
        catalogue.on_unneeded(gone.append)
        known = {entry.segment.name: entry.segment for entry in entries}
        gone += catalogue.load(entries)
        for name in sorted(self.promised - known.keys()):
            self.faults.append(f"{name} was durable and is not there")
        offered = catalogue.segments()
        for segment in offered:
            self._check_bytes(root, segment)
        unneeded = {segment.name for segment in gone}
        for name in sorted(self.promised & known.keys() - unneeded - {x.name for x in offered}):
            self.faults.append(f"{name} is there and cannot be found")
        for segment in gone:
            directory.delete(segment)
        self.promised &= {segment.name for segment in offered}
        left = dict(_files(root))
        odd = left.keys() ^ {segment.name for segment in offered}
        self._expect(not odd, f"directory and catalogue differ: {sorted(odd)[:3]}")
        held = sum(left.values())
        self._expect(held <= budget_bytes, f"{held} bytes are over the budget")
        directory.close()

    def _check_bytes(self, root: Path, segment: Segment) -> None:
        self.checked += 1
        room = bytearray(segment.data_nbytes)
        try:
            found = check_file(root / SEGMENTS / segment.name)
            read_data(root, segment, [memoryview(room)])
        except (SegmentError, OSError) as error:
            self.faults.append(f"{segment.name} was offered: {error}")
            return
        self._expect(found == segment, f"{segment.name} is not what the index says")
        self._expect(room == content(segment), f"{segment.name} holds other bytes")

    def _expect(self, holds: bool, sentence: str) -> None:
        if not holds:
            self.faults.append(sentence)


class Writers:
    """The parent of all writers, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, order: Order) -> list[str]:
        """Let one writer work until it is killed; what it reported."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(as_line(order))
        self._process.stdin.flush()
        lines: list[str] = []
        for line in self._process.stdout:
            if line == "end\n":
                return lines
            lines.append(line.removesuffix("\n"))
        raise RuntimeError("The process that starts the writers has ended.")


@contextmanager
def started_writers() -> Iterator[Writers]:
    """The process from which writers are forked; it ends with the block."""
    command = [sys.executable, "-m", "mlx_hybridcache_bench.kills.killed_writer"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Writers(process)
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()  # type: ignore[union-attr]
            process.wait()


def lifetime(drawn: random.Random) -> float:
    """How long the next writer lives, in seconds."""
    early = drawn.random() < 0.5
    return drawn.uniform(*((0, START_SECONDS) if early else (START_SECONDS, LONGEST_SECONDS)))


def kill_at_random(writers: Writers, root: Path, kills: int, seed: int) -> Account:
    """Kill writers of one directory, one after the other, each after a random time."""
    account, drawn = Account(), random.Random(seed)
    for number in range(kills):
        account.hear(writers.run(Order(str(root), drawn.getrandbits(32), lifetime(drawn))))
        account.check(root)
        if account.faults:
            account.faults.insert(0, f"after kill {number} of seed {seed}")
            break
    return account


def kill_at_every_operation(writers: Writers, root: Path, checkpoints: int, seed: int) -> Account:
    """Kill a writer of so many checkpoints at its first file operation, the next at its second..."""
    account = Account()
    operation = 0
    while not account.finished and not account.faults:
        operation += 1
        where = root / str(operation)
        where.mkdir()
        order = Order(
            str(where),
            seed,
            seconds=60,
            at_operation=operation,
            budget_bytes=FEW_BYTES,
            most_checkpoints=checkpoints,
        )
        account.promised.clear()
        account.hear(writers.run(order))
        account.check(where, FEW_BYTES)
    if account.faults:
        account.faults.insert(0, f"at operation {operation} of seed {seed}")
    return account


def _files(root: Path) -> Iterator[tuple[str, int]]:
    """Name and size of everything below the folder of segments that is no folder."""
    for folder, _, names in os.walk(root / SEGMENTS):
        for name in names:
            path = Path(folder, name)
            yield str(path.relative_to(root / SEGMENTS)), path.stat().st_size
