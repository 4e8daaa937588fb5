"""The index: what the headers of all segments say, kept in SQLite so that a start opens no file.

It is only a cache. Lost, damaged or of another version it is made anew from the files, which lose
nothing by it but their recency and their pins.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import xxhash

from ..errors import HybridCacheError
from .files import PARTIAL, make_directory
from .segment import SEGMENTS, NewerSegmentError, Segment, SegmentError, Tensor, read_header

SCHEMA = 1
"""SQLite's `user_version`; an index with another one is made anew."""

_WORDS = ("name", "kind", "namespace", "key", "parent", "first", "last", "model", "tensors", "size")
_COLUMNS = (*_WORDS, "tokens", "xxh3", "used", "pinned")
_CREATE = f"CREATE TABLE segments ({', '.join(_COLUMNS)}, PRIMARY KEY (name))"
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM segments"
_INSERT = f"INSERT OR REPLACE INTO segments VALUES ({', '.join('?' * len(_COLUMNS))})"

MOST_CHANGES = 10_000
"""Changes that are remembered: who looks again before there were more reads those only."""

_LOG = f"""
BEGIN;
CREATE TABLE changes (number INTEGER PRIMARY KEY, name);
INSERT INTO changes VALUES (random() >> 2 & {(1 << 60) - 1}, '');
CREATE TRIGGER added AFTER INSERT ON segments
    BEGIN INSERT INTO changes (name) VALUES (NEW.name); END;
CREATE TRIGGER noted AFTER UPDATE ON segments
    BEGIN INSERT INTO changes (name) VALUES (NEW.name); END;
CREATE TRIGGER dropped AFTER DELETE ON segments
    BEGIN INSERT INTO changes (name) VALUES (OLD.name); END;
CREATE TRIGGER remembered AFTER INSERT ON changes
    BEGIN DELETE FROM changes WHERE number <= NEW.number - {MOST_CHANGES}; END;
COMMIT;
"""
"""Kept by triggers, so that a release that knows nothing of it keeps it too. Numbers begin anywhere, so
that those of an index made anew are not taken for the old one's."""

_SINCE = f"""
SELECT changes.number, changes.name, {", ".join(f"segments.{column}" for column in _COLUMNS)}
FROM changes LEFT JOIN segments ON segments.name = changes.name
WHERE changes.number >= ? ORDER BY changes.number
"""

_PATIENCE_SECONDS = 10.0
"""How long one process waits for another's transaction."""

_NOT_ITS_FAULT = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
}
"""What a new index would not mend: the old one, with its pins, would be deleted for nothing."""

_OURS = re.compile(rf"[0-9a-f]{{32}}\.(rows|state)\.safetensors(\.[0-9a-f]+{re.escape(PARTIAL)})?")


class IndexUnavailableError(HybridCacheError, OSError):
    """The index cannot be read or written just now. The files are what counts: go on without it."""

    is_damaged = False
    """Whether it will not be usable again: a new one is made at the next start."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A segment in the directory, and what its file does not tell."""

    segment: Segment
    used: int  # a logical counter: higher is more recent
    pinned: bool
    file_nbytes: int


@dataclass(frozen=True, slots=True)
class Changes:
    """What the index was told meanwhile: rows as they are now, names that have none any more.

    `number` is that of the last change.
    """

    number: int
    entries: list[Entry]
    gone: list[str]


class Index:
    """The rows of one index. Any thread may use it, but only one at a time.

    The writer opens it by the constructor, which makes a new one (`was_new`) of whatever is no
    index of this version; readers use `read_only`. Every change is one transaction. Raises
    `IndexUnavailableError`, an `OSError`, when SQLite fails.
    """

    def __init__(self, path: Path):
        self.was_new = False
        make_directory(path.parent)
        with _translated():
            if path.exists():
                try:
                    self._db = _opened(path)
                except sqlite3.Error as error:
                    if _is_not_its_fault(error):
                        raise
                else:
                    return
            self.was_new = True
            self._db = _made(path)

    @classmethod
    def read_only(cls, path: Path) -> Index | None:
        """The index as a reader sees it, also while another process writes. None without one."""
        index = cls.__new__(cls)
        index.was_new = False
        # Without a log nobody is writing, and SQLite can do without locks and files of its own.
        mode = "ro" if path.with_name(f"{path.name}-wal").exists() else "ro&immutable=1"
        try:
            index._db = _connected(path, mode)
        except sqlite3.Error:
            return None
        return index

    def load(self) -> list[Entry]:
        """All entries, but those whose row was damaged."""
        layouts: dict[str, tuple[Tensor, ...]] = {}
        with _translated(), closing(self._db.execute(_SELECT)) as rows:
            return [entry for row in rows if (entry := _entry(row, layouts)) is not None]

    def number(self) -> int | None:
        """That of the last change; None where an older release made the index and alone has written to it."""
        try:
            with closing(self._db.execute("SELECT max(number) FROM changes")) as rows:
                (number,) = rows.fetchone()
        except sqlite3.Error:
            return None
        return number if isinstance(number, int) else None

    def since(self, number: int) -> Changes | None:
        """What changed behind change `number`, in as many rows. None where it is no longer remembered."""
        layouts: dict[str, tuple[Tensor, ...]] = {}
        last, found = None, dict[str, Entry | None]()
        with _translated(), closing(self._db.execute(_SINCE, (number,))) as rows:
            for at, name, *row in rows:
                if last is None and at != number:
                    return None
                if last is not None:
                    found[name] = _entry(tuple(row), layouts) if row[0] is not None else None
                    if found[name] is None and row[0] is not None:
                        return None  # a damaged row: its file tells
                last = at
        if last is None:
            return None
        return Changes(
            last,
            [entry for entry in found.values() if entry is not None],
            [name for name, entry in found.items() if entry is None],
        )

    def put(self, entries: Iterable[Entry]) -> None:
        """Add entries. One of the same name is replaced."""
        self._change(_INSERT, map(_row, entries))

    def drop(self, names: Iterable[str]) -> None:
        """Forget segments."""
        self._change("DELETE FROM segments WHERE name = ?", ((name,) for name in names))

    def touch(self, names: Iterable[str], used: int) -> None:
        """Note when segments were used, by the logical counter."""
        rows = ((used, name) for name in names)
        self._change("UPDATE segments SET used = ? WHERE name = ?", rows)

    def pin(self, names: Iterable[str], pinned: bool) -> None:
        """Note that segments are pinned, or no longer are."""
        rows = ((pinned, name) for name in names)
        self._change("UPDATE segments SET pinned = ? WHERE name = ?", rows)

    def close(self) -> None:
        """Let the file go. It may be closed twice."""
        with _translated():
            self._db.close()

    def _change(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        with _translated(), self._db:
            self._db.executemany(statement, rows)


def scan(
    root: Path,
    index: Index | None,
    *,
    adopt: bool,
    on_rejected: Callable[[Path, SegmentError], None] = lambda path, error: None,
) -> list[Entry]:
    """What the cache directory `root` holds, least recently used first.

    A file of the size that the index knows is not opened; any other is read, and is less recent
    than all known ones, in the order of the files' times. What is no segment is told to
    `on_rejected`. With `adopt`, for the writer alone, rejected and unfinished files are deleted, but
    those of a later version, and the index is corrected; otherwise nothing changes on the disk.
    """
    known: dict[str, Entry] = {}
    if index is not None:
        with suppress(IndexUnavailableError):
            known = {entry.segment.name: entry for entry in index.load()}
    entries: dict[str, Entry] = {}
    strangers: list[tuple[int, Segment]] = []
    for path, status in _files(root):
        name = f"{path.parent.name}/{path.name}"
        if path.suffix == PARTIAL:
            if adopt:
                _delete(path)
        elif name in known and known[name].file_nbytes == status.st_size:
            entries[name] = known[name]
        elif segment := _header(path, on_rejected, adopt=adopt):
            strangers.append((status.st_mtime_ns, segment))
    adopted = _adopted(strangers, known)
    entries |= {entry.segment.name: entry for entry in adopted}
    if adopt and index is not None:
        with suppress(IndexUnavailableError):  # what is not noted is found again at the next start
            index.put(adopted)
            index.drop(known.keys() - entries.keys())
    return sorted(entries.values(), key=lambda entry: (entry.used, entry.segment.end))


def _header(
    path: Path, on_rejected: Callable[[Path, SegmentError], None], *, adopt: bool
) -> Segment | None:
    """What a file says of itself, where it is a segment."""
    try:
        return read_header(path)
    except SegmentError as error:
        on_rejected(path, error)
        if adopt and not isinstance(error, NewerSegmentError):
            _delete(path)
    except FileNotFoundError:
        pass  # its writer deleted it meanwhile
    except OSError as error:  # another time it may be read, so it stays
        on_rejected(path, SegmentError(f"{path.name} cannot be read: {error}"))
    return None


def _adopted(strangers: list[tuple[int, Segment]], known: dict[str, Entry]) -> list[Entry]:
    """Entries for files the index does not know, or knows with another size."""
    strangers.sort(key=lambda found: (found[0], found[1].end, found[1].name))
    lowest = min((entry.used for entry in known.values()), default=0)
    entries = [
        Entry(segment, lowest - len(strangers) + at, pinned=False, file_nbytes=segment.file_nbytes)
        for at, (_, segment) in enumerate(strangers)
    ]
    return [
        replace(entry, used=row.used, pinned=row.pinned)
        if (row := known.get(entry.segment.name)) is not None
        else entry
        for entry in entries
    ]


def _files(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All segments in `root`, finished or not. Anything else is left alone."""
    with suppress(FileNotFoundError), os.scandir(root / SEGMENTS) as folders:
        for folder in folders:
            if not re.fullmatch("[0-9a-f]{2}", folder.name) or not folder.is_dir():
                continue
            with suppress(FileNotFoundError), os.scandir(folder) as files:
                for file in files:
                    with suppress(FileNotFoundError):
                        status = file.stat(follow_symlinks=False)
                        if _OURS.fullmatch(file.name) and stat.S_ISREG(status.st_mode):
                            yield Path(file), status


def _delete(path: Path) -> None:
    with suppress(OSError):  # what stays is met again at the next start
        path.unlink()


def _row(entry: Entry) -> tuple[Any, ...]:
    segment = entry.segment
    words = (
        segment.name,
        segment.kind,
        segment.namespace,
        segment.key,
        segment.parent,
        segment.start,
        segment.end,
        segment.model,
        json.dumps([(x.name, x.dtype, x.shape) for x in segment.tensors], separators=(",", ":")),
        entry.file_nbytes,
    )
    tokens = segment.tokens.astype("<i4", copy=False).tobytes()
    return (*words, tokens, _xxh3(words, tokens), entry.used, entry.pinned)


def _xxh3(words: tuple[Any, ...], tokens: bytes) -> str:
    """SQLite does not notice when a bit flips in what it stores."""
    return xxhash.xxh3_64_hexdigest(repr(words).encode() + tokens)


def _entry(row: tuple[Any, ...], layouts: dict[str, tuple[Tensor, ...]]) -> Entry | None:
    """`layouts` are shared by the segments that have the same: there are few, with many tensors."""
    words, (tokens, xxh3, used, pinned) = row[: len(_WORDS)], row[len(_WORDS) :]
    whole = isinstance(tokens, bytes) and isinstance(used, int) and pinned in (0, 1)
    if not whole or _xxh3(words, tokens) != xxh3:
        return None
    _, kind, namespace, key, parent, start, end, model, text, file_nbytes = words
    if text not in layouts:
        layouts[text] = tuple(
            Tensor(name, dtype, (*shape,)) for name, dtype, shape in json.loads(text)
        )
    run = np.frombuffer(tokens, dtype="<i4")
    segment = Segment(kind, namespace, key, parent, start, end, run, layouts[text], model)
    return Entry(segment, used, bool(pinned), file_nbytes)


def _connected(path: Path, mode: str) -> sqlite3.Connection:
    """A connection to an index of this version; raises `sqlite3.Error` without one."""
    db = sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?mode={mode}",
        uri=True,
        timeout=_PATIENCE_SECONDS,
        check_same_thread=False,
    )
    with _closed_on_error(db):
        db.text_factory = lambda raw: raw.decode(errors="replace")  # our checksum judges it
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version != SCHEMA:
            raise sqlite3.DatabaseError(f"it has version {version}, {SCHEMA} is needed")
        db.execute(f"{_SELECT} LIMIT 0").close()
    return db


def _opened(path: Path) -> sqlite3.Connection:
    """The writer's connection, after a look at every page."""
    db = _connected(path, "rw")
    with _closed_on_error(db):
        path.chmod(0o600)
        (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {found}")
        db.execute("PRAGMA synchronous = NORMAL")
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'changes'").fetchall():
            with suppress(sqlite3.OperationalError):  # a full disk: readers read it all each time
                db.executescript(_LOG)
    return db


@contextmanager
def _closed_on_error(db: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        db.close()
        raise


def _made(path: Path) -> sqlite3.Connection:
    """A new index in place of whatever was there."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, 0o600)
    os.close(fd)
    with closing(sqlite3.connect(path)) as db:
        # With a log ahead, readers and the writer do not wait for each other.
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(f"BEGIN; {_CREATE}; PRAGMA user_version = {SCHEMA}; COMMIT")
    return _opened(path)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        told = IndexUnavailableError(f"The index of the disk tier cannot be used: {error}.")
        told.is_damaged = not _is_not_its_fault(error)
        raise told from error


def _is_not_its_fault(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _NOT_ITS_FAULT
