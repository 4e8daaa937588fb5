"""Segments in files: written whole or not at all, read back, valid safetensors."""

import dataclasses
import errno
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
import xxhash
from directories.segment_files import (
    SPACE,
    content,
    left_in,
    place,
    read,
    rows,
    state,
    stored,
    umask,
)
from places import SUPPORT
from safetensors import safe_open

from mlx_hybridcache.disk.segment import (
    SegmentError,
    Tensor,
    check_file,
    prefix_key,
    prefix_keys,
    read_data,
    read_header,
    write,
)

WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
WIDTHS |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}


@pytest.mark.parametrize(("dtype", "width"), WIDTHS.items())
def test_what_is_written_is_read(tmp_path, dtype, width):
    """A (3, 5) tensor of each dtype, beside one of 7 bytes that leaves it unaligned."""
    segment = rows(tensors=(Tensor("a", "U8", (7,)), Tensor("b", dtype, (3, 5))))
    assert segment.data_nbytes == 7 + 15 * width
    path = stored(tmp_path, segment)
    assert check_file(path) == read_header(path) == segment
    assert read(tmp_path, segment) == content(segment)


def test_data_comes_from_gathered_views_and_goes_into_others(tmp_path):
    """A float32 matrix, nothing, and bytes are written; views of 1, 0 and 95 bytes are filled."""
    segment = rows()
    floats = np.arange(12, dtype=np.float32).reshape(3, 4)
    write(tmp_path, segment, iter([memoryview(floats), b"", memoryview(floats[:0]), bytes(48)]))
    room = memoryview(bytearray(96))
    read_data(tmp_path, segment, iter([room[:1], room[:0], room[1:]]))
    assert bytes(room) == floats.tobytes() + bytes(48)


def test_data_larger_than_one_piece_is_whole(tmp_path):
    """3 MiB and 5 bytes, in views that end beside every boundary."""
    segment = rows(tensors=(Tensor("a", "U8", (3 * 2**20 + 5,)),))
    data = content(segment)
    cut = 2**20 + 1
    write(tmp_path, segment, [data[:cut], data[cut:]])
    assert read(tmp_path, segment) == data
    assert check_file(place(tmp_path, segment)) == segment


def test_the_size_of_a_file_is_known_before_it_is_written(tmp_path):
    """Rows, a state, and a model named in three bytes a letter: what write returns, what the disk says."""
    for segment in (rows(), rows(2, 7, model="模型"), state(), rows(tensors=())):
        written = write(tmp_path, segment, [content(segment)])
        assert written == segment.file_nbytes == (place(tmp_path, segment)).stat().st_size


def test_a_file_is_valid_safetensors(tmp_path):
    """safe_open finds the metadata, the tokens 12 to 15, and both tensors as they were."""
    tensors = (Tensor("0.0", "F32", (2, 3)), Tensor("", "BOOL", (0,)), Tensor("0.1", "I32", (5,)))
    segment = rows(2, 6, tensors)
    floats, ints = (
        np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
        np.arange(5, dtype=np.int32),
    )
    write(tmp_path, segment, [memoryview(floats), memoryview(ints)])
    with safe_open(place(tmp_path, segment), "np") as file:
        metadata = file.metadata()
        assert np.array_equal(file.get_tensor("tokens"), [12, 13, 14, 15])
        assert np.array_equal(file.get_tensor("0.0"), floats)
        assert np.array_equal(file.get_tensor("0.1"), ints)
    said = {name: metadata[name] for name in ("kind", "namespace", "key", "parent", "model")}
    assert said == {name: getattr(segment, name) for name in said}
    assert (metadata["format"], metadata["version"]) == ("mlx_hybridcache segment", "1")
    assert (metadata["start"], metadata["end"]) == ("2", "6")
    data = floats.tobytes() + ints.tobytes()
    assert metadata["data_xxh3"] == xxhash.xxh3_128_hexdigest(data)


def test_the_tokens_come_first(tmp_path):
    """Behind a header padded to 8 bytes stand 10, 11, 12, 13 and then the data."""
    segment = rows()
    raw = stored(tmp_path, segment).read_bytes()
    (header,) = struct.unpack("<Q", raw[:8])
    assert header % 8 == 0
    tokens, data = raw[8 + header : 24 + header], raw[24 + header :]
    assert np.frombuffer(tokens, "<i4").tolist() == [10, 11, 12, 13]
    assert data == content(segment)


def test_keys_of_many_ends_are_the_keys_of_each():
    """Ends 0, 3, 3 and 8 of one history; another namespace or token has other keys."""
    tokens = np.arange(8, dtype=np.int32)
    ends = [0, 3, 3, 8]
    keys = prefix_keys(SPACE, tokens, ends)
    assert keys == [prefix_key(SPACE, tokens[:end]) for end in ends]
    others = {prefix_key("aa", tokens), prefix_key(SPACE, tokens[::-1]), *keys}
    assert len(others) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "row"},
        {"key": "AA" * 16},
        {"namespace": ""},
        {"parent": "x"},
        {"start": 4},
        {"end": 0},
        {"end": 2**31},
        {"tokens": np.zeros(3, np.int32)},
        {"tensors": (Tensor("a", "U8", ()), Tensor("a", "U8", ()))},
        {"tensors": (Tensor("tokens", "U8", ()),)},
        {"model": "\ud800"},
    ],
)
def test_what_no_segment_can_be_is_refused(change):
    """Keys that are not hexadecimal, a range without tokens, two tensors of one name."""
    with pytest.raises(SegmentError):
        dataclasses.replace(rows(), **change)


@pytest.mark.parametrize(("dtype", "shape"), [("F8", (1,)), ("F32", (-1,)), ("F32", (2**60,))])
def test_what_no_tensor_can_be_is_refused(dtype, shape):
    with pytest.raises(SegmentError):
        Tensor("a", dtype, shape)


def test_segments_are_equal_when_all_they_say_is():
    """Another token, another dtype, another parent: another segment."""
    segment = rows(2, 6)
    assert segment == rows(2, 6)
    assert hash(segment) == hash(rows(2, 6))
    for change in (
        {"tokens": np.zeros(4, np.int32)},
        {"tensors": (Tensor("0.0", "I32", (1, 2, 4, 3)),)},
        {"parent": "ab" * 16},
    ):
        assert dataclasses.replace(segment, **change) != segment


def test_a_segment_keeps_its_own_tokens():
    """The caller's array changes afterwards; the segment's cannot."""
    tokens = np.arange(10, 14, dtype=np.int32)
    segment = dataclasses.replace(rows(), tokens=tokens)
    tokens[0] = 99
    assert segment.tokens.tolist() == [10, 11, 12, 13]
    assert not segment.tokens.flags.writeable


def test_a_segment_that_is_there_is_not_written_again(tmp_path):
    """0 bytes the second time, whatever its data; the file stays the same file."""
    segment = rows()
    first = stored(tmp_path, segment).stat()
    assert write(tmp_path, segment, [bytes(96)]) == 0
    assert (place(tmp_path, segment)).stat() == first
    assert read(tmp_path, segment) == content(segment)


def test_another_file_under_the_name_is_replaced(tmp_path):
    """[2, 4) after [0, 4) of the same tokens, then after a damaged file."""
    stored(tmp_path, rows())
    segment = rows(2, 4)
    for _ in range(2):
        assert write(tmp_path, segment, [content(segment)]) == segment.file_nbytes
        assert check_file(place(tmp_path, segment)) == segment
        (place(tmp_path, segment)).write_bytes(b"damage")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing_behind(tmp_path, error):
    """The disk is full after half the data: the error is passed on, an older file is untouched."""

    def half():
        yield bytes(48)
        raise error

    with pytest.raises(type(error)):
        write(tmp_path, rows(), half())
    assert left_in(tmp_path) == []
    older = stored(tmp_path, rows()).read_bytes()
    with pytest.raises(type(error)):
        write(tmp_path, rows(2, 4), half())
    assert [path.read_bytes() for path in left_in(tmp_path)] == [older]


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """The system refuses to let a file grow past 64 KiB, while 1 MiB is written."""
    script = f"""
import errno, resource, signal, sys
sys.path.insert(0, {str(SUPPORT)!r})
from pathlib import Path
from directories.segment_files import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    stored(Path({str(tmp_path)!r}), rows(tensors=(Tensor("a", "U8", (2**20,)),)))
except OSError as error:
    print(errno.errorcode[error.errno])
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["EFBIG"]
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("mask", [0, 0o022, 0o777])
def test_files_and_folders_are_private_whatever_the_umask(tmp_path, mask):
    """Prompts are private: 0600 and 0700, also for folders above that were missing."""
    root = tmp_path / "above" / "cache"
    with umask(mask):
        path = stored(root, rows())
    assert path.stat().st_mode & 0o777 == 0o600
    for folder in (path.parent, path.parent.parent, root, root.parent):
        assert folder.stat().st_mode & 0o777 == 0o700


WRITER = f"""
import sys, time
sys.path.insert(0, {str(SUPPORT)!r})
from pathlib import Path
from directories.segment_files import *
root, first = Path(sys.argv[1]), int(sys.argv[2])

def slowly(segment):
    data = content(segment)
    yield data[: len(data) // 2]
    print("half", flush=True)
    yield data[len(data) // 2 :]

for end in range(first, first + 10_000):
    segment = rows(0, end, (Tensor("a", "U8", (2**18,)),))
    write(root, segment, slowly(segment))
"""


@pytest.mark.parametrize("halves", [1, 2, 7])
def test_a_killed_writer_leaves_whole_files_or_partial_ones(tmp_path, halves):
    """Killed just after the first half of its first, second and seventh file."""
    command = [sys.executable, "-c", WRITER, str(tmp_path), "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        for _ in range(halves):
            assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    whole = [path for path in left_in(tmp_path) if path.suffix != ".partial"]
    assert len(left_in(tmp_path)) - len(whole) <= 1
    assert len(whole) >= halves - 1
    for path in whole:
        assert check_file(path).data_nbytes == 2**18
