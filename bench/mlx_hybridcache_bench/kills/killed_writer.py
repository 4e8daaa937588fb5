"""A process that writes a cache directory as the disk tier does, without a model, to be killed.

Run as a module it is the parent of such processes: it has imported everything, so that one starts
within a millisecond. It takes orders as lines of JSON and tells what the writers told, line by line.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import queue
import random
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hybridcache.disk.catalogue import Catalogue, Lacking
from mlx_hybridcache.disk.directory import Directory
from mlx_hybridcache.disk.segment import Segment, Tensor
from mlx_hybridcache.disk.thread import DiskThread, Transfer
from mlx_hybridcache.errors import BudgetError
from mlx_hybridcache.tokens import Tokens

BUDGET_BYTES = 3 << 20
"""A few dozen files, so that a writer deletes about as much as it writes."""

NAMESPACE = "ab" * 16
STEP = 256
"""Tokens in a file of rows at most: 128 KiB of data."""

MOST_CHECKPOINTS = 200
"""After so many a writer ends by itself, whoever forgot to kill it."""

FAMILIES = 3
"""Prompts that begin alike, so that files are shared, and a branch begins inside one."""

SHUTDOWN = 0x8004587D
"""FS_IOC_SHUTDOWN of Linux: a file system ends at once, and what was not flushed is lost."""

WITHOUT_LOG = struct.pack("I", 2)
"""Not even the file system's journal is flushed."""

FILE_OPERATIONS = (
    *("open", "fchmod", "write", "fsync", "lseek", "readv", "close"),
    *("replace", "unlink", "mkdir", "stat", "scandir"),
)
"""What Python calls in `os`, at which a writer may be told to end itself."""


@dataclass(frozen=True, slots=True)
class Order:
    """What one writer is to do, and when it ends.

    After `seconds` it is killed; with `cut` the file system is shut down first, as by a power cut.
    With `at_operation` it kills itself before its so manieth file operation, or in the midst of it
    if that is a write; `finished` tells whether it came to its end without.
    """

    root: str
    seed: int
    seconds: float
    at_operation: int = 0
    cut: bool = False
    budget_bytes: int = BUDGET_BYTES
    most_checkpoints: int = MOST_CHECKPOINTS


def content(segment: Segment) -> bytes:
    """The data that belongs to a segment: whoever knows its key knows every byte."""
    seed = int(segment.key, 16) + (segment.kind == "state")
    return np.random.default_rng(seed).bytes(segment.data_nbytes)


def tensors_of(lacking: Lacking) -> tuple[Tensor, ...]:
    """Two layers' rows of 256 bytes a token, or one state of 64 KiB."""
    if lacking.kind == "state":
        return (Tensor("1.0", "F32", (1, 64, 256)),)
    shape = (1, 2, lacking.end - lacking.start, 32)
    return Tensor("0.0", "F32", shape), Tensor("0.1", "F32", shape)


class Writer:
    """Writes checkpoints into `root`; `say` gets `+name` of what became durable, `-name` before it goes."""

    def __init__(self, root: Path, budget_bytes: int, say: Callable[[str], None]) -> None:
        self._say = say
        directory = Directory(root)
        entries = directory.open()
        assert directory.is_writer, "nobody else writes here"
        self.catalogue = Catalogue(budget_bytes, needs_checkpoints=True)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = DiskThread(directory, self._inbox.put)
        self._in_flight = 0
        self.catalogue.on_unneeded(self._delete)
        for orphan in self.catalogue.load(entries):
            self._delete(orphan)

    def write(self, tokens: Tokens) -> None:
        """Make the end of `tokens` durable, and everything before it."""
        catalogue, store = self.catalogue, self.catalogue.store
        store.tick()
        for lacking in catalogue.lacking(NAMESPACE, tokens, state=True, step=STEP):
            segment = Segment(
                lacking.kind,
                NAMESPACE,
                lacking.key,
                lacking.parent,
                lacking.start,
                lacking.end,
                tokens[lacking.start : lacking.end],
                tensors_of(lacking),
            )
            try:
                claim = store.claim(segment.file_nbytes, catalogue.find(NAMESPACE, tokens))
            except BudgetError:
                break
            self._hand_over(segment, tokens[: lacking.end], claim.release)
        while self._in_flight:
            self._inbox.get()()
        found = catalogue.find(NAMESPACE, tokens)
        names = catalogue.use(found) if found.position else []
        self._thread.change(lambda directory: directory.touch(names, store.clock))

    def close(self) -> None:
        """Let another one write."""
        self._thread.close()

    def _hand_over(self, segment: Segment, tokens: Tokens, release: Callable[[], None]) -> None:
        def done(transfer: Transfer) -> None:
            release()
            self._in_flight -= 1
            if transfer.error is not None:
                return
            if self.catalogue.add(segment, tokens):
                self._say(f"+{segment.name}")
            else:
                self._delete(segment)

        self._in_flight += 1
        data = memoryview(content(segment))
        self._thread.write(
            Transfer([(segment, [data])], done), self.catalogue.store.clock, is_pinned=False
        )

    def _delete(self, segment: Segment) -> None:
        self._say(f"-{segment.name}")
        self._thread.change(lambda directory: directory.delete(segment))


def conversations(seed: int) -> Any:
    """Prompts without end: some go on where an earlier one stopped, some branch off."""
    drawn = random.Random(seed)
    known: list[Tokens] = []
    while True:
        if known and drawn.random() < 0.5:
            before = drawn.choice(known[-6:])
        else:
            family = np.random.default_rng(drawn.randrange(FAMILIES))
            before = family.integers(0, 1000, 700).astype(np.int32)
        before = before[: drawn.randrange(1, len(before))]
        tail = np.random.default_rng(drawn.getrandbits(64)).integers(
            0, 1000, drawn.randrange(1, 500)
        )
        tokens = np.concatenate([before, tail.astype(np.int32)])
        if len(tokens) <= 2_000:  # more would not fit
            known.append(tokens)
        yield tokens


def work(order: Order, say: Callable[[str], None]) -> None:
    """What a writer does until it is killed."""
    if order.at_operation:
        _end_at(order.at_operation)
    writer = Writer(Path(order.root), order.budget_bytes, say)
    for tokens in itertools.islice(conversations(order.seed), order.most_checkpoints):
        writer.write(tokens)
    writer.close()
    say("finished")


def _end_at(operation: int) -> None:
    """Kill this process at its so manieth file operation."""
    count, real_write = itertools.count(1), os.write

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            if next(count) == operation:
                if real is real_write:
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return counted

    for name in FILE_OPERATIONS:
        setattr(os, name, counting(getattr(os, name)))


def _start(order: Order, out: int) -> int:
    """A writer process, which tells what it did through `out`; its number."""
    process = os.fork()
    if process:
        return process
    write, status = os.write, 1
    try:
        work(order, lambda line: void(write(out, f"{line}\n".encode())))
        status = 0
    finally:
        os._exit(status)


def void(_: object) -> None:
    """Take a value and do nothing with it."""


def _carry_out(order: Order, out: int) -> None:
    root = os.open(order.root, os.O_RDONLY) if order.cut else None
    process = _start(order, out)
    until = time.monotonic() + order.seconds
    ended = 0
    while not ended and time.monotonic() < until:
        time.sleep(0.0005)
        ended, _ = os.waitpid(process, os.WNOHANG)
    if root is not None:
        fcntl.ioctl(root, SHUTDOWN, WITHOUT_LOG)
        os.close(root)
    if not ended:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    os.write(out, b"end\n")


def main() -> None:
    """Take orders from stdin until it is closed."""
    out = sys.stdout.fileno()
    for line in sys.stdin:
        _carry_out(Order(**json.loads(line)), out)


def as_line(order: Order) -> str:
    """An order as the process takes it."""
    return json.dumps(asdict(order)) + "\n"


if __name__ == "__main__":
    main()
