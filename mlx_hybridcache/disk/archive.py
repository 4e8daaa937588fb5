"""A prefix with its checkpoints in one file, to be shipped: a system prompt that nobody reads again.

The file is an uncompressed tar of segments behind a manifest. Nothing of what followed the prefix
is archived: rows that reach further are cut. Whoever reads one trusts nothing in it but checksums: names
follow from the segments' own headers, and every byte is accounted for.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np

from ..errors import HybridCacheError
from ..tokens import Tokens, as_tokens
from .contents import Collection, loaded, path_of, payloads, tokens_of, writing
from .files import pieces, reading, replacing, scrap, write_all
from .index import Entry
from .parts import FileNode, FileRows, FileState
from .segment import (
    SEGMENTS,
    Segment,
    SegmentError,
    Tensor,
    check_file,
    prefix_keys,
    read_data,
    write,
)

FORMAT = "mlx_hybridcache prefix"
VERSION = 1
MANIFEST = "manifest.json"

AXIS = 2
"""Rows have the shape (batch, heads, tokens, dim)."""

_LARGEST_MANIFEST = 16 << 20
_BLOCK = 512
_NAME = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{30}\.(rows|state)\.safetensors")
_CHECKSUM = slice(148, 156)

OnBytes = Callable[[int], None]
"""Hears of bytes: how many there will be, or how many more are done."""


def ignore(nbytes: int) -> None:
    """Nobody wants to hear."""


class ArchiveError(HybridCacheError):
    """A file is no whole archive of a prefix. Nothing was imported from it."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an archive says of itself. `key` is that of its `position` tokens, `members` are in order."""

    namespace: str
    model: str
    key: str
    position: int
    members: tuple[tuple[str, int], ...]  # file names below the folder of segments, bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all members."""
        return sum(size for _, size in self.members)

    def encoded(self) -> bytes:
        """Its one spelling, so that a reader can write it again and compare."""
        members = [{"name": name, "bytes": size} for name, size in self.members]
        return json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "namespace": self.namespace,
                "model": self.model,
                "key": self.key,
                "position": self.position,
                "members": members,
            },
            indent=1,
        ).encode()

    @classmethod
    def decoded(cls, text: bytes) -> Manifest:
        """Raises `ArchiveError` for what is no manifest."""
        try:
            table = json.loads(text.decode())
            if (table["format"], table["version"]) != (FORMAT, VERSION):
                raise ArchiveError(
                    f"Its manifest names {table['format']!r:.60}, version {table['version']!r:.20}; "
                    f"{FORMAT!r}, version {VERSION}, can be read here."
                )
            manifest = cls(
                table["namespace"],
                table["model"],
                table["key"],
                table["position"],
                tuple((member["name"], member["bytes"]) for member in table["members"]),
            )
            is_same = manifest.encoded() == text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArchiveError("It has no manifest of a prefix.") from error
        if not is_same:
            raise ArchiveError("Its manifest was changed after it was written.")
        words = (manifest.namespace, manifest.model, manifest.key)
        if type(manifest.position) is not int or not all(isinstance(word, str) for word in words):
            raise ArchiveError("Its manifest names no position of a model.")
        for name, size in manifest.members:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ArchiveError(f"It has a member called {name!r:.80}, which no segment can be.")
            if type(size) is not int or size < 0:
                raise ArchiveError(f"Its member {name} would have {size!r:.40} bytes.")
        if not manifest.members or len(set(manifest.members)) < len(manifest.members):
            raise ArchiveError("It has no members, or one of them twice.")
        return manifest


# Writing


def archived_segments(
    collection: Collection, node: FileNode, *, only_end: bool = False
) -> list[tuple[Segment, Segment]]:
    """The files that restore the end of `node`, each with what is archived of it.

    That is the same segment, or for rows that reach beyond the path, where others parted ways or
    the prefix ends, what is left when they are cut there.
    """
    path = node.path()
    ends: dict[str, tuple[Segment, int]] = {}
    states: list[Segment] = []
    for part in (payload for above in path for payload in payloads(above)):
        if isinstance(part, FileRows):
            ends[part.segment.name] = (part.segment, part.end)
        elif isinstance(part, FileState) and (not only_end or part.segment.end == node.end):
            states.append(part.segment)
    keys = prefix_keys(collection.namespace, tokens_of(node), [end for _, end in ends.values()])
    rows = [
        (whole, whole if end == whole.end else _cut(whole, end, key))
        for (whole, end), key in zip(ends.values(), keys, strict=True)
    ]
    return [*rows, *((state, state) for state in states)]


def _cut(rows: Segment, end: int, key: str) -> Segment:
    """The header of what is left of `rows` before position `end`."""
    length = rows.end - rows.start
    if any(x.shape[AXIS : AXIS + 1] != (length,) for x in rows.tensors):
        raise ArchiveError(
            f"{rows.name} holds tensors that have no axis of {length} tokens to cut."
        )
    kept = end - rows.start
    tensors = tuple(
        replace(x, shape=(*x.shape[:AXIS], kept, *x.shape[AXIS + 1 :])) for x in rows.tensors
    )
    return replace(rows, key=key, end=end, tokens=rows.tokens[:kept], tensors=tensors)


def export(
    root: Path,
    collection: Collection,
    node: FileNode,
    to: Path,
    *,
    only_end: bool = False,
    on_size: OnBytes = ignore,
    on_bytes: OnBytes = ignore,
) -> Manifest:
    """Write what restores the end of `node`, with the checkpoints before it, into the file `to`.

    `only_end` leaves those before it out. Mode 0600; there whole or not at all. Raises
    `SegmentError` when a file is damaged.
    """
    archived = archived_segments(collection, node, only_end=only_end)
    members = tuple((sent.name, sent.file_nbytes) for _, sent in archived)
    manifest = Manifest(
        collection.namespace, collection.model, collection.key(node), node.end, members
    )
    on_size(manifest.nbytes)
    with replacing(to) as fd, tempfile.TemporaryDirectory() as scratch:
        _write_member(fd, MANIFEST, [text := manifest.encoded()], len(text))
        for whole, sent in archived:
            if sent is whole:
                check_file(source := path_of(root, whole))
            else:
                source = _written_cut(root, whole, sent, Path(scratch))
            _write_member(fd, sent.name, _content(source, sent.file_nbytes), sent.file_nbytes)
            if sent is not whole:
                source.unlink()
            on_bytes(sent.file_nbytes)
        write_all(fd, bytes(2 * _BLOCK))
    return manifest


def _written_cut(root: Path, whole: Segment, sent: Segment, scratch: Path) -> Path:
    """The file of `sent`, which is the beginning of `whole`."""
    room = memoryview(bytearray(sent.data_nbytes))
    read_data(root, whole, _room_for_the_cut(whole.tensors, sent.end - sent.start, room))
    write(scratch, sent, [room])
    return path_of(scratch, sent)


def _room_for_the_cut(
    tensors: Sequence[Tensor], kept: int, room: memoryview
) -> Iterator[memoryview]:
    """Where the bytes of whole tensors go when `kept` tokens of each head are wanted in `room`."""
    at = 0
    for tensor in tensors:
        heads, length = prod(tensor.shape[:AXIS]), tensor.shape[AXIS]
        row = tensor.nbytes // max(1, heads * length)
        for _ in range(heads):
            yield room[at : at + kept * row]
            at += kept * row
            yield from scrap((length - kept) * row)


def _content(path: Path, nbytes: int) -> Iterator[memoryview]:
    room = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while nbytes:
            count = file.readinto(room[:nbytes])
            if not count:
                raise SegmentError(f"{path.name} was cut short while it was read.")
            yield room[:count]
            nbytes -= count


def _write_member(
    fd: int, name: str, content: Iterator[memoryview] | list[bytes], nbytes: int
) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = nbytes, 0o600
    write_all(fd, info.tobuf(tarfile.GNU_FORMAT, "ascii", "strict"))
    for piece in pieces(content):
        write_all(fd, piece)
    write_all(fd, bytes(-nbytes % _BLOCK))


# Reading


@dataclass(frozen=True, slots=True)
class Prefix:
    """An archive that was read from first byte to last and is what it says. `tokens` are all of them."""

    manifest: Manifest
    segments: tuple[Segment, ...]
    tokens: Tokens


def check(path: Path, on_size: OnBytes = ignore, on_bytes: OnBytes = ignore) -> Prefix:
    """Read all of an archive and believe it. Raises `ArchiveError` when anything is wrong with it."""
    segments: list[Segment] = []
    with _opened(path) as (file, manifest):
        on_size(2 * manifest.nbytes)  # read to be checked, and again to be written
        for segment, _ in _members(file, manifest):
            segments.append(segment)
            on_bytes(segment.file_nbytes)
        return Prefix(manifest, tuple(segments), _history(manifest, segments))


def bring_in(
    path: Path,
    root: Path,
    *,
    is_pinned: bool = True,
    on_size: OnBytes = ignore,
    on_bytes: OnBytes = ignore,
) -> tuple[Prefix, int]:
    """Put what an archive holds and the directory `root` lacks there; returns it, and the bytes that are new.

    All of it is checked before the directory is touched. Raises `ArchiveError`, and `InUseError`
    when another process writes there.
    """
    prefix, written = check(path, on_size, on_bytes), 0
    namespace, tokens = prefix.manifest.namespace, prefix.tokens
    with writing(root) as (directory, entries):
        own = [entry for entry in entries if entry.segment.namespace == namespace]
        has_states = any(x.kind == "state" for x in (*prefix.segments, *(e.segment for e in own)))
        catalogue, _ = loaded(own)
        used = max((entry.used for entry in entries), default=0)
        with _opened(path) as (file, manifest):
            for known, (segment, scratch) in zip(
                prefix.segments, _members(file, manifest), strict=True
            ):
                if segment != known:
                    raise ArchiveError(f"{path} was changed while it was read.")
                if catalogue.add(segment, tokens[: segment.end], restores=not has_states):
                    data = memoryview(bytearray(segment.data_nbytes))
                    read_data(scratch, segment, [data])
                    directory.write(Entry(segment, used, False, segment.file_nbytes), [data])
                    written += segment.file_nbytes
                on_bytes(segment.file_nbytes)
        if is_pinned:
            last = catalogue.find(namespace, tokens).match.nodes()[-1]
            names = [payload.segment.name for payload in payloads(last)]
            directory.pin(names, is_pinned=True)
    return prefix, written


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BufferedReader, Manifest]]:
    """An archive behind its manifest. What is wrong with it is told with its name."""
    with reading(path) as fd:
        if fd is None:
            raise ArchiveError(f"{path} is no file.")
        with os.fdopen(fd, "rb", closefd=False) as file:
            try:
                yield file, _manifest(file)
            except (ArchiveError, SegmentError) as error:
                raise ArchiveError(
                    f"{path} cannot be imported. {error} Export it again."
                ) from error


def _manifest(file: BufferedReader) -> Manifest:
    """The manifest, whose sizes must add up to the file's before anything is read that they ask for."""
    size = _header(file, MANIFEST)
    if not 0 <= size <= _LARGEST_MANIFEST:
        raise ArchiveError(f"Its manifest would have {size:,} bytes.")
    manifest = Manifest.decoded(_read(file, size))
    _must_be_zero(file, -size % _BLOCK)
    sizes = [size + -size % _BLOCK + _BLOCK for _, size in manifest.members]
    needed = file.tell() + sum(sizes) + 2 * _BLOCK
    found = os.fstat(file.fileno()).st_size
    if needed != found:
        raise ArchiveError(f"It has {found:,} bytes, its manifest says {needed:,}.")
    return manifest


def _members(file: BufferedReader, manifest: Manifest) -> Iterator[tuple[Segment, Path]]:
    """Every segment, verified, with a directory in which its file lies until the next one is asked for."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, size in manifest.members:
            if (found := _header(file, name)) != size:
                raise ArchiveError(f"Its member {name} has {found:,} bytes, not {size:,}.")
            path = Path(scratch, SEGMENTS, name)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with path.open("xb") as copy:
                for piece in scrap(size):
                    if file.readinto(piece) != len(piece):
                        raise ArchiveError("It ends too early.")
                    copy.write(piece)
            _must_be_zero(file, -size % _BLOCK)
            segment = check_file(path)
            if (segment.namespace, segment.model) != (manifest.namespace, manifest.model):
                raise ArchiveError(f"Its member {name} belongs to another model or salt.")
            yield segment, Path(scratch)
            path.unlink()
    _must_be_zero(file, 2 * _BLOCK)
    if file.read(1):
        raise ArchiveError("Something follows its end.")


def _history(manifest: Manifest, segments: Sequence[Segment]) -> Tokens:
    """All tokens of a prefix; every key must be that of the tokens before it, and none lead elsewhere."""
    rows = [segment for segment in segments if segment.kind == "rows"]
    states = [segment for segment in segments if segment.kind == "state"]
    tokens = as_tokens([])
    for segment in rows:
        known = tokens[segment.start :]
        if not segment.start <= len(tokens) < segment.end or not np.array_equal(
            known, segment.tokens[: len(known)]
        ):
            raise ArchiveError(f"Its member {segment.name} does not go on where others end.")
        tokens = as_tokens(np.concatenate([tokens, segment.tokens[len(known) :]]))
    claimed = {(x.end, x.key) for x in segments} | {(x.start, x.parent) for x in rows if x.start}
    claimed.add((manifest.position, manifest.key))
    in_order = sorted(claimed)
    ends = [end for end, _ in in_order]
    if ends[-1] != len(tokens) or any(a == b for a, b in pairwise(ends)):
        raise ArchiveError("Its members do not lead to one position.")
    if prefix_keys(manifest.namespace, tokens, ends) != [key for _, key in in_order]:
        raise ArchiveError("Its keys are not those of its tokens.")
    if states and states[-1].end != manifest.position:
        raise ArchiveError("It has no checkpoint at its end.")
    return tokens


def _header(file: BufferedReader, name: str) -> int:
    """The size of the member that comes next, which must be a plain file of that name."""
    block = _read(file, _BLOCK)
    try:
        info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.TarError, ValueError) as error:
        raise ArchiveError(f"No member begins where {name} should.") from error
    is_plain = info.type == tarfile.REGTYPE and not info.linkname
    # The checksum tells of every bit but its own, some of which mean nothing to whoever parses it.
    if not is_plain or info.name != name or not re.fullmatch(rb"[0-7]{6}\0 ", block[_CHECKSUM]):
        raise ArchiveError(f"It has a member {info.name!r:.80} where the file {name} should be.")
    return info.size


def _read(file: BufferedReader, nbytes: int) -> bytes:
    found = file.read(nbytes)
    if len(found) != nbytes:
        raise ArchiveError("It ends too early.")
    return found


def _must_be_zero(file: BufferedReader, nbytes: int) -> None:
    if any(_read(file, nbytes)):
        raise ArchiveError("It has content where there should be none.")
