"""A cache directory as one process has it open: who may write, the index, what was found.

One process holds the lock and alone writes, adopts and deletes; others read. When the holder is gone,
however it went, the next one that looks takes its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from .files import make_directory
from .index import Entry, Index, scan
from .segment import Segment, write

log = logging.getLogger("mlx_hybridcache")


@dataclass(eq=False)
class Directory:
    """The directory `root`, which only its owner may look into. Used on one thread at a time."""

    root: Path
    is_writer: bool = field(default=False, init=False)
    _index: Index | None = field(default=None, init=False)
    _lock: FileLock = field(init=False)
    _seen: object = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._lock = FileLock(self.root / "writer.lock", mode=0o600, thread_local=False)

    @property
    def segments(self) -> Path:
        """The folder of the files themselves."""
        return self.root / "segments"

    def open(self) -> list[Entry]:
        """Become the writer if nobody is, and find what is there."""
        make_directory(self.root)
        self.root.chmod(0o700)
        self._try_to_write()
        return self.entries()

    def entries(self) -> list[Entry]:
        """Everything that can be read. A writer adopts what its index does not know."""
        self._seen = self._signature()
        index = self._index or Index.read_only(self.root / "index.sqlite")
        try:
            return list(
                scan(self.segments, index, adopt=self.is_writer, on_rejected=self._rejected)
            )
        finally:
            if index is not None and index is not self._index:
                index.close()

    def changed(self) -> bool:
        """Whether this process became the writer, or the writer changed something."""
        if self.is_writer:
            return False
        return self._try_to_write() or self._signature() != self._seen

    def write(self, entry: Entry, data: Sequence[memoryview]) -> None:
        """Write a segment, and note it in the index, which is a cache and may fail."""
        write(self.segments, entry.segment, data)
        self._note(lambda index: index.put([entry]))

    def delete(self, segment: Segment) -> None:
        """Delete a segment."""
        (self.segments / segment.name).unlink(missing_ok=True)
        self._note(lambda index: index.drop([segment.name]))

    def touch(self, names: Sequence[str], used: int) -> None:
        """These were used."""
        self._note(lambda index: index.touch(names, used))

    def pin(self, names: Sequence[str], *, is_pinned: bool) -> None:
        """These stay whatever comes, or no longer."""
        self._note(lambda index: index.pin(names, is_pinned))

    def close(self) -> None:
        """Let another one write."""
        if self._index is not None:
            self._index.close()
            self._index = None
        self.is_writer = False
        self._lock.release()

    def _try_to_write(self) -> bool:
        try:
            self._lock.acquire(timeout=0)
        except (Timeout, OSError):
            return False
        self.is_writer = True
        try:
            self._index = Index(self.root / "index.sqlite")
        except OSError as error:
            log.warning("The index of %s cannot be kept: %s", self.root, error)
        return True

    def _note(self, change: Callable[[Index], None]) -> None:
        if self._index is None:
            return
        try:
            change(self._index)
        except OSError as error:
            log.warning("The index of %s is made anew at the next start: %s", self.root, error)
            self._index.close()
            self._index = None

    def _rejected(self, path: Path, error: Exception) -> None:
        log.warning("Passed over %s: %s", path.name, error)

    def _signature(self) -> object:
        """Changes when the writer notes something."""
        found = []
        for name in ("index.sqlite", "index.sqlite-wal"):
            try:
                status = (self.root / name).stat()
            except OSError:
                continue
            found.append((name, status.st_mtime_ns, status.st_size))
        return found
