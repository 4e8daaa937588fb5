"""A small disk whose power can be cut: a file that is mounted as a file system of its own."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .killed_writer import Order
from .writer_kills import Account, Writers, lifetime

DISK_BYTES = 48 << 20
"""Enough for a writer's budget and its file system's journal."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system in the file `image`, mounted at `root`."""

    image: Path
    root: Path

    def mount(self) -> None:
        """What was flushed before a cut is there again; the file system repairs itself."""
        _run("mount", "-o", "loop", str(self.image), str(self.root))

    def unmount(self) -> None:
        """Take it away, whether its power was cut or not."""
        _run("umount", str(self.root))


def why_not() -> str | None:
    """Why this process cannot cut the power of a disk; None when it can."""
    if sys.platform != "linux":
        return "cutting a disk's power needs Linux"
    if os.geteuid() != 0:
        return "mounting a disk needs root"
    if shutil.which("mkfs.ext4") is None:
        return "mkfs.ext4 is not installed"
    try:
        with small_disk():
            return None
    except subprocess.CalledProcessError as error:
        return f"this system lets nobody mount a disk: {error.stderr.strip()}"


@contextmanager
def small_disk() -> Iterator[Disk]:
    """A new disk, mounted; it is gone after the block."""
    with tempfile.TemporaryDirectory() as folder:
        disk = Disk(Path(folder, "image"), Path(folder, "disk"))
        disk.root.mkdir()
        with disk.image.open("wb") as image:
            image.truncate(DISK_BYTES)
        _run("mkfs.ext4", "-q", str(disk.image))
        disk.mount()
        try:
            yield disk
        finally:
            disk.unmount()


def cut_power(writers: Writers, disk: Disk, cuts: int, seed: int) -> Account:
    """Cut the power of writers of one directory, one after the other, each after a random time."""
    account, drawn = Account(), random.Random(seed)
    for number in range(cuts):
        order = Order(str(disk.root), drawn.getrandbits(32), lifetime(drawn), cut=True)
        account.hear(writers.run(order))
        disk.unmount()
        disk.mount()
        account.check(disk.root)
        if account.faults:
            account.faults.insert(0, f"after cut {number} of seed {seed}")
            break
    return account


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
