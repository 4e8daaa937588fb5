"""Plain reads of files: into new memory, into one buffer, and with the page cache told to forget them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def header_of(path: Path) -> str:
    """The header of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(length).decode()


def read_into(room: memoryview, path: Path) -> int:
    """Read a file, which fits, into memory that is there already; returns its bytes."""
    with path.open("rb", buffering=0) as file:
        return file.readinto(room) or 0


def forget(files: Sequence[Path]) -> None:
    """Ask the system to drop the files from its page cache."""
    advise = getattr(os, "posix_fadvise", None)  # macOS has none
    if advise is None:
        return
    for path in files:
        with path.open("rb") as file:
            advise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def can_be_forgotten(files: Sequence[Path]) -> bool:
    """Whether that makes the next read fetch them from the medium."""
    before = _fetched_bytes()
    if before is None:
        return False
    forget(files)
    read = sum(len(path.read_bytes()) for path in files)
    after = _fetched_bytes()
    return after is not None and after - before >= read // 2


def _fetched_bytes() -> int | None:
    """Bytes that this process made the system fetch from storage; None where nothing says."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), None)
