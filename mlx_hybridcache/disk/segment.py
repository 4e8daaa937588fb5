"""One segment of a cache in one file: written whole or not at all, and read back checked.

A file is valid safetensors. Its metadata tells what it holds; the tensor `tokens` comes first, then the
data in the order in which it was handed over. Every byte lies under one of two checksums.

Headers are read here by hand. The `safetensors` package gives names, shapes and values, in a third of the
time, but neither the header's own bytes, which a checksum covers (it takes a header that was changed), nor
where a tensor begins; and it opens a path, where a file that was opened and looked at is to be read.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from ..errors import HybridCacheError
from ..tokens import Namespace, Tokens, as_tokens
from .files import pieces, read_all, reading, replacing, scrap, write_all

SEGMENTS = "segments"
"""The folder of a cache directory in which the files lie."""

FORMAT = "mlx_hybridcache segment"
VERSION = 1

LONGEST_RUN = 1 << 20
"""Tokens in one segment at most, so that a garbled header cannot ask for all the memory."""

_LARGEST_HEAD = 16 << 20
_LARGEST_TENSOR = 1 << 53
_LAST_POSITION = (1 << 31) - 1
_NO_CHECKSUM = "0" * 32
_SEAL = b'"header_xxh3":"%s"'
_CHECKSUM = re.compile(rb'"data_xxh3":"([0-9a-f]{32})"')
"""Found but once, both: within a JSON string their quotes would be escaped."""

_KEY = re.compile(r"[0-9a-f]{32}")
_NAMESPACE = re.compile(r"[0-9a-f]{1,128}")

_WIDTHS = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
"""Bytes of one number, by the name that safetensors gives its type."""


class SegmentError(HybridCacheError):
    """A file is not the segment that it should be. Whoever reads it takes it for a miss."""


class NewerSegmentError(SegmentError):
    """A file of a later version of this format: a miss too, but not ours to replace or to delete."""


class NameTakenError(SegmentError):
    """What has a segment's name is not ours to replace, so that one cannot be written."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A name, a dtype as safetensors spells it ("F32", "BF16"), and a shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        known = self.dtype in _WIDTHS and len(self.shape) <= 64
        sane = all(type(n) is int and 0 <= n < _LARGEST_TENSOR for n in self.shape)
        if not known or not sane or self.nbytes >= _LARGEST_TENSOR:
            raise SegmentError(
                f"Tensor {self.name!r} has the dtype {self.dtype!r} and the shape {self.shape}; "
                f"a segment holds {', '.join(_WIDTHS)} below {_LARGEST_TENSOR} bytes."
            )

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _WIDTHS[self.dtype]


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """What a file says of itself: everything but the data. Positions are absolute, `[start, end)`.

    `rows` hold every layer's keys and values of the range; a `state` is one checkpoint at `end`, and
    its range is empty. `key` is `prefix_key` of all tokens up to `end`; `parent` is the key of the
    rows that hold position `start - 1`, "" at the beginning. Raises `SegmentError` for what no
    segment can be.
    """

    kind: Literal["rows", "state"]
    namespace: str  # hexadecimal: a digest of the model, its settings and the salt
    key: str
    parent: str
    start: int
    end: int
    tokens: Tokens  # (end - start,), int32
    tensors: tuple[Tensor, ...]  # in file order
    model: str = ""  # for people
    _file_nbytes: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", as_tokens(self.tokens))
        if (fault := self._fault()) is not None:
            raise SegmentError(f"A {self.kind} segment {fault}.")

    def _fault(self) -> str | None:
        if self.kind not in {"rows", "state"}:
            return "must be one of rows or of a state"
        if not _KEY.fullmatch(self.key) or not _NAMESPACE.fullmatch(self.namespace):
            return f"has the key {self.key!r} in {self.namespace!r}; both must be hexadecimal"
        if not 0 <= self.start <= self.end <= _LAST_POSITION or self.end == 0:
            return f"covers [{self.start}, {self.end}), which is no range of positions"
        if (self.start == self.end) != (self.kind == "state"):
            return (
                f"covers [{self.start}, {self.end}): a state stands at one position, rows at more"
            )
        if self.tokens.shape != (self.end - self.start,) or len(self.tokens) > LONGEST_RUN:
            return f"covers [{self.start}, {self.end}) with tokens of shape {self.tokens.shape}"
        if not (_KEY.fullmatch(self.parent) if self.start else self.parent == ""):
            return f"begins at {self.start} with the parent {self.parent!r}"
        names = [tensor.name for tensor in self.tensors]
        if len({*names, "tokens", "__metadata__"}) != len(names) + 2:
            return "holds tensors whose names are taken"
        try:
            "".join([self.model, *names]).encode()
        except UnicodeEncodeError:
            return "has names that are not text"
        return None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segment):
            return NotImplemented
        return self._identity == other._identity and np.array_equal(self.tokens, other.tokens)

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[object, ...]:
        where = (self.kind, self.namespace, self.key, self.parent, self.start, self.end)
        return (*where, self.tensors, self.model)

    @property
    def name(self) -> str:
        """Where the file lies below the folder of segments."""
        return f"{self.key[:2]}/{self.key}.{self.kind}.safetensors"

    @property
    def data_nbytes(self) -> int:
        """Bytes of all tensors, without the tokens."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def file_nbytes(self) -> int:
        """Bytes of the whole file, known before it is written."""
        if not self._file_nbytes:  # asked for again and again while files are weighed
            nbytes = len(_head(self, _NO_CHECKSUM)) + self.data_nbytes
            object.__setattr__(self, "_file_nbytes", nbytes)
        return self._file_nbytes


def prefix_key(namespace: str, tokens: Tokens) -> str:
    """The key of what holds `[0, len(tokens))`: it says what the tokens were."""
    return prefix_keys(namespace, tokens, [len(tokens)])[0]


def digest(namespace: Namespace) -> str:
    """The namespace as files name it: neither the model's settings nor the salt can be read from it."""
    text = "\0".join(namespace)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class PrefixDigest:
    """The key of a prefix that grows: of tokens `[0, end)` in a namespace."""

    def __init__(self, namespace: str):
        self._digest = hashlib.blake2b(namespace.encode(), digest_size=16)

    @property
    def key(self) -> str:
        """32 hexadecimal digits."""
        return self._digest.copy().hexdigest()

    def read(self, tokens: Tokens) -> PrefixDigest:
        """The digest of what `tokens` make the prefix; this one stays what it is."""
        longer = copy.copy(self)
        longer._digest = self._digest.copy()
        longer._digest.update(_token_bytes(tokens))
        return longer


def prefix_keys(namespace: str, tokens: Tokens, ends: Sequence[int]) -> list[str]:
    """The keys of `[0, end)` for ascending ends, in one pass over the tokens."""
    digest = PrefixDigest(namespace)
    keys, done = [], 0
    for end in ends:
        assert done <= end <= len(tokens), "ends ascend and lie within the tokens"
        digest = digest.read(tokens[done:end])
        keys.append(digest.key)
        done = end
    return keys


def write(root: Path, segment: Segment, data: Iterable[memoryview | bytes]) -> int:
    """Write a segment into the cache directory `root`, flushed. Returns the bytes written.

    `data` are views in file order, `segment.data_nbytes` in all, passed over once. A file that is
    there already with an equal header stays, and nothing is written; any other is replaced in one
    step. Raises `NameTakenError` for a folder and for a file of a later version, `SegmentError` when
    the data has another length, and `OSError`; then nothing is left behind.
    """
    path = root / SEGMENTS / segment.name
    if (taken := taken_by(path)) is not None:
        raise NameTakenError(f"{taken} It is left alone, and what belongs there is not kept.")
    with suppress(SegmentError, FileNotFoundError, NotADirectoryError):
        if read_header(path) == segment:
            return 0
    head = _head(segment, _NO_CHECKSUM)
    if len(head) > _LARGEST_HEAD:
        raise SegmentError(f"{path.name} would have a header of {len(head)} bytes.")
    with replacing(path) as fd:
        write_all(fd, head)

        def put(piece: memoryview) -> None:
            write_all(fd, piece)

        checksum = _transfer(segment, data, put)
        os.lseek(fd, 0, os.SEEK_SET)
        write_all(fd, _head(segment, checksum))
    return len(head) + segment.data_nbytes


def taken_by(path: Path) -> str | None:
    """A sentence about what has a segment's name and is not ours to replace or to delete."""
    if path.is_dir() and not path.is_symlink():
        return f"{path.name} is a folder."
    try:
        read_header(path)
    except NewerSegmentError as error:
        return str(error)
    except (SegmentError, OSError):
        pass  # damaged, or not there
    return None


def read_header(path: Path) -> Segment:
    """The segment that a file claims to be: its header, its size and its name are checked.

    Raises `SegmentError` for anything else, whatever bytes it holds, and `OSError`;
    `NewerSegmentError` for what a later version of this library wrote.
    """
    with reading(path) as fd:
        return _read_head(fd, path)[0]


def read_data(root: Path, segment: Segment, into: Iterable[memoryview]) -> None:
    """Read the data in `root` into writable views of bytes, in file order, `segment.data_nbytes` in all.

    Raises `SegmentError` when the file is not this very segment or was damaged (what was read until
    then stands in the views), and `OSError`.
    """
    path = root / SEGMENTS / segment.name
    with reading(path) as fd:
        checksum = _checksum_behind(fd, segment)
        if checksum is None:  # another look, to say what it is instead
            if fd is not None:
                os.lseek(fd, 0, os.SEEK_SET)
            found, checksum = _read_head(fd, path)
            if found != segment:
                raise SegmentError(f"{path.name} holds another segment than was asked for.")
        _read_data(fd, segment, into, checksum)


def check_file(path: Path) -> Segment:
    """Check a file from its first byte to its last, in little memory.

    Raises `SegmentError` and `OSError`.
    """
    with reading(path) as fd:
        segment, checksum = _read_head(fd, path)
        _read_data(fd, segment, scrap(segment.data_nbytes), checksum)
    return segment


def _head(segment: Segment, data_xxh3: str) -> bytes:
    """All bytes before the data: the header's length, the header, the tokens.

    There is one way to write them, so a reader writes them again and compares.
    """
    tokens = _token_bytes(segment.tokens)
    text = _json(segment, data_xxh3)
    seal = xxhash.xxh3_128_hexdigest(text + tokens)
    text = text.replace(_SEAL % _NO_CHECKSUM.encode(), _SEAL % seal.encode(), 1)
    return struct.pack("<Q", len(text)) + text + tokens


def _json(segment: Segment, data_xxh3: str) -> bytes:
    """The header as its own checksum sees it: without one."""
    table: dict[str, object] = {
        "__metadata__": {
            "format": FORMAT,
            "version": str(VERSION),
            "kind": segment.kind,
            "namespace": segment.namespace,
            "key": segment.key,
            "parent": segment.parent,
            "start": str(segment.start),
            "end": str(segment.end),
            "model": segment.model,
            "header_xxh3": _NO_CHECKSUM,
            "data_xxh3": data_xxh3,
        }
    }
    begin = 0
    for tensor in (Tensor("tokens", "I32", segment.tokens.shape), *segment.tensors):
        end = begin + tensor.nbytes
        where = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
        table[tensor.name] = where
        begin = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _token_bytes(tokens: Tokens) -> bytes:
    return tokens.astype("<i4", copy=False).tobytes()


def _checksum_behind(fd: int | None, segment: Segment) -> str | None:
    """The checksum of a file's data, which comes next; None where its head is not this segment's.

    To compare bytes takes a third of the time of reading a header that nobody knows.
    """
    if fd is None or os.fstat(fd).st_size != segment.file_nbytes:
        return None
    head = bytearray(segment.file_nbytes - segment.data_nbytes)
    if not read_all(fd, memoryview(head)) or (found := _CHECKSUM.search(head)) is None:
        return None
    checksum = found[1].decode()
    return checksum if head == _head(segment, checksum) else None


def _read_head(fd: int | None, path: Path) -> tuple[Segment, str]:
    """A file's segment and the checksum of its data, which comes next."""
    if fd is None:
        raise SegmentError(f"{path.name} is no file.")
    size = os.fstat(fd).st_size
    try:
        segment, checksum = _parsed_head(fd)
    except SegmentError as error:
        raise type(error)(f"{path.name} cannot be used. {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SegmentError(f"{path.name} cannot be used. It has no header of a segment.") from error
    if size != segment.file_nbytes:
        raise SegmentError(f"{path.name} has {size} bytes, its header says {segment.file_nbytes}.")
    if path.absolute().parts[-2:] != Path(segment.name).parts:
        raise SegmentError(f"{path.name} holds what belongs under the name {segment.name}.")
    return segment, checksum


def _parsed_head(fd: int) -> tuple[Segment, str]:
    """Raises `SegmentError`, or whatever comes of taking strangers' JSON for our own."""
    length = _read(fd, 8)
    (text_nbytes,) = struct.unpack("<Q", length)
    if text_nbytes > _LARGEST_HEAD:
        raise SegmentError(f"Its header would have {text_nbytes} bytes.")
    text = _read(fd, text_nbytes)
    table = json.loads(text.decode())
    metadata = table.pop("__metadata__")
    if metadata["format"] != FORMAT:
        raise SegmentError("It is no segment of this cache.")
    version = metadata["version"]
    if version != str(VERSION):
        is_newer = version.isdecimal() and int(version) > VERSION
        raise (NewerSegmentError if is_newer else SegmentError)(
            f"It has version {version!r}; {VERSION} can be read here."
        )
    start, end = int(metadata["start"]), int(metadata["end"])
    if not 0 <= end - start <= LONGEST_RUN:
        raise SegmentError(f"It covers [{start}, {end}).")
    tokens = _read(fd, 4 * (end - start))
    table.pop("tokens")
    segment = Segment(
        metadata["kind"],
        metadata["namespace"],
        metadata["key"],
        metadata["parent"],
        start,
        end,
        np.frombuffer(tokens, dtype="<i4"),
        tuple(Tensor(name, x["dtype"], tuple(x["shape"])) for name, x in table.items()),
        metadata["model"],
    )
    checksum: str = metadata["data_xxh3"]
    head = _head(segment, checksum)
    if head != length + text + tokens:
        raise SegmentError("Its header was changed after it was written.")
    object.__setattr__(segment, "_file_nbytes", len(head) + segment.data_nbytes)
    return segment, checksum


def _read(fd: int, nbytes: int) -> bytes:
    room = bytearray(nbytes)
    if not read_all(fd, memoryview(room)):
        raise SegmentError("It ends within its header.")
    return bytes(room)


def _read_data(fd: int | None, segment: Segment, into: Iterable[memoryview], xxh3: str) -> None:
    def fill(piece: memoryview) -> None:
        if fd is None or not read_all(fd, piece):
            raise SegmentError(f"{segment.name} was cut short while it was read.")

    if _transfer(segment, into, fill) != xxh3:
        raise SegmentError(f"{segment.name} is damaged: the checksum of its data is another.")


def _transfer(
    segment: Segment, views: Iterable[memoryview | bytes], move: Callable[[memoryview], None]
) -> str:
    """Move all data piece by piece. Returns its checksum."""
    checksum, left = xxhash.xxh3_128(), segment.data_nbytes
    for piece in pieces(views):
        left -= len(piece)
        if left < 0:
            break
        move(piece)
        checksum.update(piece)
    if left:
        given = "more" if left < 0 else f"{segment.data_nbytes - left}"
        raise SegmentError(f"{segment.name} has {segment.data_nbytes} bytes of data, not {given}.")
    return checksum.hexdigest()
