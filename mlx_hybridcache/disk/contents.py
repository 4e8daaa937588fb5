"""A cache directory seen from outside, without a model: what lies in it, and who may change it.

Looking changes nothing, and a server may be writing there meanwhile. Changing takes the writer's lock.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import HybridCacheError, NotStoredError, SettingError
from ..store.conversations import Branches, Run, Start, walk
from ..store.outline import outlined
from ..tokens import Namespace, Tokens
from .catalogue import Catalogue
from .directory import Directory
from .index import Entry, scan
from .parts import FileNode, FileRows, FileState
from .segment import (
    SEGMENTS,
    NewerSegmentError,
    PrefixDigest,
    Segment,
    SegmentError,
    check_file,
    prefix_key,
)

LOCK = "writer.lock"
SHORT = 12
"""Hexadecimal digits of a key that are shown."""

_ID = re.compile(r"[0-9a-f]{4,32}")


class InUseError(HybridCacheError):
    """Another process writes in the directory, and only one may."""


def must_be_one(root: Path) -> None:
    """Raise `SettingError` unless `root` is a cache directory."""
    if not root.is_dir():
        raise SettingError(f"{root} is no directory; --cache-dir names that of a server.")
    if not (root / SEGMENTS).is_dir() and not (root / LOCK).is_file():
        raise SettingError(
            f"{root} is no cache directory: it has neither {SEGMENTS}/ nor {LOCK}. "
            "Name the one that a server was given as --cache-dir."
        )


def is_being_written(root: Path) -> bool:
    """Whether a process has the directory open to write at this moment."""
    if not (root / LOCK).is_file():
        return False
    from filelock import FileLock, Timeout  # as in `Directory`

    lock = FileLock(root / LOCK, mode=0o600, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # it is not ours, or on a medium that nobody can write
        return False
    lock.release()
    return False


def must_be_free(root: Path) -> None:
    """Raise `InUseError` when another process writes there."""
    if is_being_written(root):
        raise _in_use(root)


@contextmanager
def writing(root: Path) -> Iterator[tuple[Directory, list[Entry]]]:
    """The directory, made if need be, with what is in it, while nobody else may write there.

    Raises `InUseError` when another process does.
    """
    directory = Directory(root)
    entries = directory.open()
    try:
        if not directory.is_writer:
            raise _in_use(root)
        yield directory, entries
    finally:
        directory.close()


def _in_use(root: Path) -> InUseError:
    return InUseError(
        f"Another process writes in {root}. Stop the server that was started with it and try again."
    )


class Collection:
    """All files of one namespace: of one model, run in one way, for one salt.

    `unreachable` are those that nothing leads to, because files before them are missing, or whose
    content others hold. One without states is that of a model that rows alone restore.
    """

    def __init__(self, namespace: str, entries: Sequence[Entry]):
        self.namespace = namespace
        self.entries = entries
        self.has_states = any(entry.segment.kind == "state" for entry in entries)
        self.catalogue, self.unreachable = loaded(entries)

    @property
    def model(self) -> str:
        """What its files call the model."""
        return max((entry.segment.model for entry in self.entries), default="")

    def nbytes(self, kind: str | None = None) -> int:
        """Bytes of all files, or of one kind."""
        return sum(x.file_nbytes for x in self.entries if kind in (None, x.segment.kind))

    def nodes(self) -> Iterator[FileNode]:
        """The tree, parents before children, depth first."""
        return self.catalogue.store.nodes()

    def segments(self, node: FileNode) -> list[Segment]:
        """The files that `node` needs beside those of the nodes above it."""
        return [payload.segment for payload in payloads(node)]

    def pinned_bytes(self) -> int:
        """Bytes that pins keep."""
        pinned = [node for node in self.nodes() if node.pinned]
        kept = {above for node in pinned for above in node.path()}
        states = sum(node.checkpoint.nbytes for node in pinned if node.checkpoint is not None)
        return states + sum(node.rows_nbytes for node in kept)

    def runs(self, times: Mapping[str, float]) -> Iterator[tuple[Start, list[Run]]]:
        """Every run with those that lead to it, parents before children, depth first.

        `times` tells when each file was written, which stands for when it was used.
        """

        def written(node: FileNode) -> float | None:
            names = [payload.segment.name for payload in payloads(node)]
            return max((times.get(name, 0.0) for name in names), default=None)

        top = outlined(self.catalogue.store.root(Namespace(self.namespace)), written)
        return walk(Branches(None, top, 0), PrefixDigest(self.namespace))

    def key(self, node: FileNode) -> str:
        """That of the prefix up to the end of `node`."""
        for payload in payloads(node):
            if payload.segment.end == node.end:
                return payload.segment.key
        return prefix_key(self.namespace, tokens_of(node))


def look(root: Path) -> list[Collection]:
    """What a cache directory holds, as its index and its headers say.

    Raises `SettingError` when it is none.
    """
    must_be_one(root)
    return by_namespace(Directory(root).entries())


def by_namespace(entries: Iterable[Entry]) -> list[Collection]:
    """One for each namespace, the largest first."""
    found: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        found[entry.segment.namespace].append(entry)
    every = [Collection(namespace, own) for namespace, own in found.items()]
    return sorted(every, key=lambda one: (-one.nbytes(), one.namespace))


def loaded(entries: Sequence[Entry]) -> tuple[Catalogue, list[Segment]]:
    """The trees of these files without a bound, and the files that nothing leads to."""
    catalogue = Catalogue(sys.maxsize, needs_checkpoints=True)
    return catalogue, catalogue.load(entries)


def find_checkpoint(found: Iterable[Collection], beginning: str) -> tuple[Collection, FileNode]:
    """The node whose key begins so, if prompts can be resumed there.

    Raises `NotStoredError` when there is none, `SettingError` when there are several.
    """
    if not _ID.fullmatch(beginning):
        raise SettingError(f"{beginning!r} is no id: write 4 to 32 hexadecimal digits of one.")
    fitting = [
        (one, node, key)
        for one in found
        for node in one.nodes()
        if node.checkpoint is not None and (key := one.key(node)).startswith(beginning)
    ]
    if not fitting:
        raise NotStoredError(
            f"No checkpoint has an id that begins with {beginning}; `ls --all` lists them."
        )
    if len(fitting) > 1:
        ids = ", ".join(f"{key} at {node.end:,}" for _, node, key in fitting)
        raise SettingError(f"{len(fitting)} checkpoints begin with {beginning}: {ids}.")
    return fitting[0][:2]


def tokens_of(node: FileNode) -> Tokens:
    """All tokens that lead to the end of `node`."""
    return np.concatenate([part.tokens for part in node.path()])


def payloads(node: FileNode) -> list[FileRows | FileState]:
    """Parts of files that a node consists of."""
    state = node.checkpoint
    return [*node.rows, state] if isinstance(state, FileState) else [*node.rows]


def path_of(root: Path, segment: Segment) -> Path:
    """Where a segment's file lies."""
    return root / SEGMENTS / segment.name


def written_at(root: Path, segments: Iterable[Segment]) -> dict[str, float]:
    """When each file was written, by name; those that went meanwhile are left out."""
    times: dict[str, float] = {}
    for segment in segments:
        try:
            times[segment.name] = path_of(root, segment).stat().st_mtime
        except FileNotFoundError:
            continue
    return times


def damaged(
    root: Path,
    on_files: Callable[[int], None] = lambda nbytes: None,
    on_read: Callable[[int], None] = lambda nbytes: None,
) -> tuple[list[Entry], dict[Path, str], list[Path]]:
    """Every file read from first byte to last: the whole ones, what is wrong with others, newer ones.

    Those of a later version cannot be judged here. `on_files` hears how many bytes there are, `on_read` of each file's as it was read.
    """
    wrong: dict[Path, str] = {}
    newer: list[Path] = []

    def rejected(path: Path, error: Exception) -> None:
        if isinstance(error, NewerSegmentError):
            newer.append(path)
        else:
            wrong[path] = str(error)

    entries = scan(root, None, adopt=False, on_rejected=rejected)
    on_files(sum(entry.file_nbytes for entry in entries))
    whole: list[Entry] = []
    for entry in entries:
        path = path_of(root, entry.segment)
        try:
            check_file(path)
        except FileNotFoundError:
            pass  # the process that writes there deleted it
        except (SegmentError, OSError) as error:
            rejected(path, error)
        else:
            whole.append(entry)
        on_read(entry.file_nbytes)
    return whole, wrong, newer
