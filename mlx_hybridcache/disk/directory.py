"""A cache directory as one process has it open: who may write, the index, what was found.

One process holds the lock and alone writes, adopts and deletes; others read. When the holder is gone,
however it went, the next one that looks takes its place.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..sizes import format_bytes
from .files import make_directory
from .index import Entry, Index, IndexUnavailableError, scan
from .segment import SEGMENTS, NewerSegmentError, Segment, taken_by, write

if TYPE_CHECKING:
    from filelock import FileLock

log = logging.getLogger("mlx_hybridcache")

_OURS = re.compile(rf"{SEGMENTS}|writer\.lock|index\.sqlite(-wal|-shm|-journal)?")
_FOLDER = re.compile(r"[0-9a-f]{2}")
"""What lies in a directory that is the cache's own, and in its folder of segments."""


@dataclass(frozen=True, slots=True)
class News:
    """Files that came or were noted otherwise, and names of those that went. `is_whole`: no others are there."""

    entries: list[Entry]
    gone: list[str] = field(default_factory=list)
    is_whole: bool = False


@dataclass(eq=False)
class Directory:
    """The directory `root`, whose files only their owner may read. Used on one thread at a time.

    `newer_bytes` are those of files that a later version of this library wrote. They are left alone.
    """

    root: Path
    is_writer: bool = field(default=False, init=False)
    newer_bytes: int = field(default=0, init=False)
    _index: Index | None = field(default=None, init=False)
    _seen: object = field(default=None, init=False)
    _number: int | None = field(default=None, init=False)
    _lock_seen: object = field(default=None, init=False)
    _wrong: set[str] = field(default_factory=set, init=False)

    @cached_property
    def _lock(self) -> FileLock:
        from filelock import FileLock  # listing what is there locks nothing, and is to be quick

        return FileLock(self.root / "writer.lock", mode=0o600, thread_local=False)

    @property
    def segments(self) -> Path:
        """The folder of the files themselves."""
        return self.root / SEGMENTS

    def open(self) -> list[Entry]:
        """Become the writer if nobody is, and find what is there."""
        make_directory(self.root)
        if not os.access(self.root, os.W_OK):  # there is nothing that could be kept there
            is_read_only = os.statvfs(self.root).f_flag & os.ST_RDONLY
            code = errno.EROFS if is_read_only else errno.EACCES
            raise OSError(code, os.strerror(code), str(self.root))
        self._make_private(self.root, _OURS)
        if self.segments.is_dir():
            self._make_private(self.segments, _FOLDER)
        self._try_to_write()
        return self.entries()

    def _make_private(self, folder: Path, ours: re.Pattern[str]) -> None:
        """Let its owner alone look into a folder of the cache's own. One with other things in it stays as it is."""
        status = folder.stat()
        mode = stat.S_IMODE(status.st_mode)
        if mode == 0o700:
            return
        with os.scandir(folder) as found:
            other = next((each.name for each in found if not ours.fullmatch(each.name)), None)
        if other is None and status.st_uid == os.geteuid():
            folder.chmod(0o700)
        elif mode & 0o077:
            why = f"holds {other!r}, which is not this cache's" if other else "is another user's"
            log.warning(
                "%s %s, so its mode stays %04o. What the cache keeps there is for you alone to read, but "
                "others may see that it is there%s. Name an empty directory, or one that is not there yet.",
                folder,
                why,
                mode,
                ", or remove it" if mode & 0o022 else "",
            )

    def complain(self, about: Literal["files", "index"], sentence: str) -> None:
        """One line about what is wrong with the directory, and no other until that went well again.

        Any thread may call it.
        """
        if not self._wrong:
            log.warning("%s: %s", self.root, sentence)
        self._wrong.add(about)

    def entries(self) -> list[Entry]:
        """Everything that can be read. A writer adopts what its index does not know."""
        self._seen = self._signature()
        newer: list[int] = []

        def rejected(path: Path, error: Exception) -> None:
            if isinstance(error, NewerSegmentError):
                with suppress(OSError):
                    newer.append(path.stat().st_size)
            else:
                # Not the error itself: whoever keeps log records would keep a cache by its frames.
                log.warning("Passed over %s: %s", path.name, str(error))

        index = self._index or Index.read_only(self.root / "index.sqlite")
        self._number = index.number() if index is not None else None
        try:
            found = scan(self.root, index, adopt=self.is_writer, on_rejected=rejected)
        finally:
            if index is not None and index is not self._index:
                index.close()
        if index is not None and index.was_new and found:
            log.warning("%s: the index was lost; made anew from %d files.", self.root, len(found))
            index.was_new = False
        if sum(newer) > self.newer_bytes:
            log.warning(
                "%s: %d files (%s) were written by a newer version of this cache. They are left "
                "alone and count as used; empty the directory with that version, or name another.",
                self.root,
                len(newer),
                format_bytes(sum(newer)),
            )
        self.newer_bytes = sum(newer)
        return found

    def news(self) -> News | None:
        """What came and went since the last look; None where nothing did.

        All of it where this process became the writer, or where the index no longer tells. A
        directory that was removed is made anew: its lock went with it, so another process may have
        become the writer of a new one.
        """
        if self.is_writer and not self.is_lost():
            return None
        if self.is_writer:
            self.complain("files", "it was removed while it was in use, and is made anew.")
            self.close()
        is_writer, signature = self._try_to_write(), self._signature()
        if not is_writer and signature == self._seen:
            return None
        noted = None if is_writer else self._noted()
        if noted is None:
            return News(self.entries(), is_whole=True)
        self._seen = signature
        return noted

    def look_at_all(self) -> None:
        """The next news are to be of all files."""
        self._number = None

    def _noted(self) -> News | None:
        """What the index was told since the last look, with a look at those files only."""
        index = Index.read_only(self.root / "index.sqlite")
        if index is None or self._number is None:
            return None
        try:
            changes = index.since(self._number)
        except IndexUnavailableError:
            return None
        finally:
            index.close()
        if changes is None:
            return None
        self._number = changes.number
        entries, gone = [], [*changes.gone]
        for entry in changes.entries:
            try:
                status = (self.segments / entry.segment.name).stat(follow_symlinks=False)
            except OSError:
                gone.append(entry.segment.name)
                continue
            if not stat.S_ISREG(status.st_mode) or status.st_size != entry.file_nbytes:
                return None  # another file than was noted: its own header tells
            entries.append(entry)
        return News(entries, gone)

    def is_lost(self) -> bool:
        """Whether the directory that this process writes is no longer there, or is another one."""
        return self.is_writer and self._lock_identity() != self._lock_seen

    def write(self, entry: Entry, data: Sequence[memoryview]) -> None:
        """Write a segment, and note it in the index, which is a cache and may fail."""
        if self.is_lost():
            raise FileNotFoundError(errno.ENOENT, "it was removed while it was in use")
        if write(self.root, entry.segment, data):  # nothing is written of what is there already
            self._wrong.discard("files")
        self._note(lambda index: index.put([entry]))

    def delete(self, segment: Segment) -> None:
        """Delete a segment, unless what has its name is not ours by now.

        What cannot be deleted is found again at the next start.
        """
        path = self.segments / segment.name
        try:
            if taken_by(path) is None:
                path.unlink(missing_ok=True)
        except OSError as error:
            self.complain("files", f"{segment.name} cannot be deleted: {error}.")
        else:
            self._note(lambda index: index.drop([segment.name]))

    def touch(self, names: Sequence[str], used: int) -> None:
        """These were used."""
        self._note(lambda index: index.touch(names, used))

    def pin(self, names: Sequence[str], *, is_pinned: bool) -> None:
        """These stay whatever comes, or no longer."""
        self._note(lambda index: index.pin(names, is_pinned))

    def close(self) -> None:
        """Let another one write."""
        self._close_index()
        self.is_writer = False
        self._lock.release()

    def _try_to_write(self) -> bool:
        try:
            make_directory(self.root)
            self._lock.acquire(timeout=0)
        except OSError:  # another process has it, or it cannot be had here
            return False
        self._lock_seen = self._lock_identity()
        self.is_writer = True
        try:
            self._index = Index(self.root / "index.sqlite")
        except OSError as error:
            self.complain("index", str(error))
        return True

    def _note(self, change: Callable[[Index], None]) -> None:
        if self._index is None:
            return
        try:
            change(self._index)
        except IndexUnavailableError as error:
            self.complain("index", str(error))
            if error.is_damaged:  # else what could not be noted is found again at the next start
                self._close_index()
        else:
            self._wrong.discard("index")

    def _close_index(self) -> None:
        index, self._index = self._index, None
        if index is not None:
            with suppress(IndexUnavailableError):
                index.close()

    def _lock_identity(self) -> object:
        try:
            status = (self.root / "writer.lock").stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:  # it may be there: not known otherwise
            return self._lock_seen
        return status.st_dev, status.st_ino

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
