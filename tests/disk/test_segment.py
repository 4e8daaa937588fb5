"""Segments in files: written whole or not at all, read back checked, valid safetensors."""

import dataclasses
import errno
import os
import signal
import struct
import subprocess
import sys
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from places import SUPPORT
from safetensors import safe_open

from mlx_hybridcache.disk.segment import (
    Segment,
    SegmentError,
    Tensor,
    check_file,
    prefix_key,
    prefix_keys,
    read_data,
    read_header,
    write,
)

SPACE = "0f" * 16


FLOATS = (Tensor("0.0", "F32", (1, 2, 4, 3)),)
"""96 bytes."""

WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
WIDTHS |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}


def rows(start=0, end=4, tensors=FLOATS, model="tiny"):
    """Rows of tokens 10, 11, ... behind a parent of the same history."""
    tokens = np.arange(10, 10 + end, dtype=np.int32)
    parent, key = prefix_keys(SPACE, tokens, [start, end])
    return Segment(
        "rows", SPACE, key, parent if start else "", start, end, tokens[start:], tensors, model
    )


def state(at=4, tensors=FLOATS):
    key = prefix_key(SPACE, np.arange(10, 10 + at, dtype=np.int32))
    return Segment("state", SPACE, key, key, at, at, np.empty(0, np.int32), tensors)


def content(segment):
    """Bytes that differ from each other and between segments."""
    return np.random.default_rng(segment.end).bytes(segment.data_nbytes)


def stored(root, segment):
    """A segment in its file."""
    write(root, segment, [content(segment)])
    return place(root, segment)


def read(root, segment):
    room = bytearray(segment.data_nbytes)
    read_data(root, segment, [memoryview(room)])
    return bytes(room)


def place(root, segment):
    return root / "segments" / segment.name


def left_in(root):
    return [path for path in root.rglob("*") if path.is_file()]


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


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


def test_every_truncation_is_noticed(tmp_path):
    """A file of some 600 bytes, cut at every length, and one byte too long."""
    path = stored(tmp_path, rows(tensors=(Tensor("a", "U8", (9,)),)))
    raw = path.read_bytes()
    for shorter in (*(raw[:n] for n in range(len(raw))), raw + b"\0"):
        path.write_bytes(shorter)
        for check in (check_file, read_header):
            with pytest.raises(SegmentError):
                check(path)


@pytest.mark.parametrize("make", [rows, state])
def test_every_flipped_bit_is_noticed(tmp_path, make):
    """Each of some 5,000 bits of a file in turn; before the data, by its header alone."""
    segment = make(tensors=(Tensor("a", "U8", (9,)),))
    path = stored(tmp_path, segment)
    raw = bytearray(path.read_bytes())
    head = len(raw) - segment.data_nbytes
    for at in range(len(raw)):
        for bit in range(8):
            raw[at] ^= 1 << bit
            path.write_bytes(raw)
            with pytest.raises(SegmentError):
                (read_header if at < head else check_file)(path)
            raw[at] ^= 1 << bit


def test_damaged_data_is_not_read_as_sound(tmp_path):
    """The last bit of the file."""
    segment = rows()
    path = stored(tmp_path, segment)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(SegmentError, match="checksum"):
        read(tmp_path, segment)


FOREIGN = [
    b"",
    b"\xff" * 8,
    struct.pack("<Q", 2**40) + b"{}",
    *(
        struct.pack("<Q", len(text)) + text
        for text in (
            b"[]",
            b"{}",
            b'"a"',
            b"1" * 5000,
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"__metadata__":[]}',
            b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        )
    ),
]


@pytest.mark.parametrize("raw", FOREIGN, ids=range(len(FOREIGN)))
def test_foreign_files_are_refused(tmp_path, raw):
    """Nothing, garbage, JSON of other kinds, 100,000 brackets, another program's safetensors."""
    path = place(tmp_path, rows())
    path.parent.mkdir(parents=True)
    path.write_bytes(raw)
    with pytest.raises(SegmentError):
        read_header(path)


def test_a_pipe_or_a_folder_in_place_of_a_file_is_refused(tmp_path):
    """Neither is waited for."""
    path = place(tmp_path, rows())
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(SegmentError, match="no file"):
        read_header(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(SegmentError, match="no file"):
        read_header(path)


def resealed(raw, old, new):
    """A file whose header was changed by someone who knows how to set its checksum."""
    (length,) = struct.unpack("<Q", raw[:8])
    text, rest = raw[8 : 8 + length], raw[8 + length :]
    at = text.index(b'"header_xxh3":"') + 15
    text = (text[:at] + b"0" * 32 + text[at + 32 :]).replace(old, new, 1)
    text = text.rstrip() + b" " * (-len(text.rstrip()) % 8)
    at = text.index(b'"header_xxh3":"') + 15
    tokens = rest[: len(rest) - 96]
    seal = xxhash.xxh3_128_hexdigest(text + tokens).encode()
    return struct.pack("<Q", len(text)) + text[:at] + seal + text[at + 32 :] + rest


CLAIMS = [
    (b'"version":"1"', b'"version":"2"'),
    (b'"kind":"rows"', b'"kind":"lore"'),
    (b'"kind":"rows"', b'"kind":["rows"]'),
    (b'"start":"0"', b'"start":"-1"'),
    (b'"start":"0"', b'"start":"4"'),
    (b'"start":"0"', b'"start":"x"'),
    (b'"start":"0"', b'"start":" 0"'),
    (b'"start":"0"', b'"start":0'),
    (b'"end":"4"', b'"end":"' + b"9" * 5000 + b'"'),
    (b'"end":"4"', b'"end":"99999999"'),
    (b'"parent":""', b'"parent":"aa"'),
    (b'"model":"tiny"', b'"model":7'),
    (b'"model":"tiny"', b'"model":"\\ud800"'),
    (b'"model":"tiny"', b'"model":"tiny","more":""'),
    (b'"model":"tiny"', b'"model":"tin\\u0079"'),
    (b'"shape":[1,2,4,3]', b'"shape":[1,2,4,-3]'),
    (b'"shape":[1,2,4,3]', b'"shape":[true,2,4,3]'),
    (b'"shape":[1,2,4,3]', b'"shape":[1e0,2,4,3]'),
    (b'"shape":[1,2,4,3]', b'"shape":[4611686018427387904,4]'),
    (b'"shape":[1,2,4,3]', b'"shape":"1243"'),
    (b'"shape":[1,2,4,3]', b'"shape":[' + b"9," * 100 + b"9]"),
    (b'"F32"', b'"F33"'),
    (b'"F32"', b'["F32"]'),
    (b'"data_offsets":[16,112]', b'"data_offsets":[17,113]'),
    (b'{"__meta', b'{"a":{},"__meta'),
    (b'"0.0":{', b'"0.0":{"dtype":"F32","shape":[],"data_offsets":[16,20]},"0.0":{'),
    (b'"0.0":{', b'"0.0":0,"b":{'),
]


@pytest.mark.parametrize(("old", "new"), CLAIMS, ids=range(len(CLAIMS)))
def test_a_header_that_means_nothing_is_refused_though_its_checksum_is_right(tmp_path, old, new):
    """Another version, negative shapes, ranges past 2**31, duplicate names, extra fields."""
    path = stored(tmp_path, rows())
    raw = path.read_bytes()
    path.write_bytes(resealed(raw, b"tiny", b"cute"))
    assert read_header(path).model == "cute"
    path.write_bytes(resealed(raw, old, new))
    with pytest.raises(SegmentError):
        read_header(path)


def test_another_version_is_called_by_its_number(tmp_path):
    """Version 2, in a file that is sound otherwise."""
    path = stored(tmp_path, rows())
    path.write_bytes(resealed(path.read_bytes(), *CLAIMS[0]))
    with pytest.raises(SegmentError, match="version '2'; 1 can be read"):
        read_header(path)


def test_a_garbled_header_cannot_ask_for_the_memory(tmp_path):
    """A header of 2**40 bytes, and 99,999,999 tokens, in files that seem as large: under 4 MiB."""
    path = stored(tmp_path, rows())
    raw = path.read_bytes()
    for claim in (FOREIGN[2], resealed(raw, b'"end":"4"', b'"end":"99999999"')):
        path.write_bytes(claim)
        os.truncate(path, 2**41)
        tracemalloc.start()
        try:
            with pytest.raises(SegmentError):
                read_header(path)
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    """Cut to 8 bytes behind its checked header."""
    segment = rows()
    path = stored(tmp_path, segment)

    def room():
        os.truncate(path, 8)
        yield memoryview(bytearray(96))

    with pytest.raises(SegmentError, match="cut short"):
        read_data(tmp_path, segment, room())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.booleans(), st.integers(0, 100))
def test_no_bytes_raise_anything_else(tmp_path_factory, raw, is_framed, at):
    """Arbitrary bytes, framed as a header, or written over a sound file somewhere."""
    root = tmp_path_factory.mktemp("fuzz")
    path = stored(root, rows())
    sound = path.read_bytes()
    framed = struct.pack("<Q", len(raw)) + raw
    overwritten = sound[: at * 7] + raw + sound[at * 7 + len(raw) :]
    path.write_bytes(framed if is_framed else raw)
    with pytest.raises(SegmentError):
        check_file(path)
    path.write_bytes(overwritten)
    if overwritten != sound:
        with pytest.raises(SegmentError):
            check_file(path)


def test_a_file_under_anothers_name_is_refused(tmp_path):
    """Rows renamed to another key, to a state, and into another folder."""
    segment, other = rows(), rows(0, 5)
    raw = stored(tmp_path, segment).read_bytes()
    elsewhere = f"zz/{segment.key}.rows.safetensors"
    for name in (other.name, segment.name.replace("rows", "state"), elsewhere):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(SegmentError, match="under the name"):
            read_header(tmp_path / name)


def test_another_segment_than_the_one_asked_for_is_not_read(tmp_path):
    """Its file says [0, 4) for one model; [2, 4) of the same tokens is asked, and another dtype."""
    stored(tmp_path, rows())
    for other in (rows(2, 4), rows(tensors=(Tensor("0.0", "I32", (1, 2, 4, 3)),))):
        with pytest.raises(SegmentError, match="another segment"):
            read(tmp_path, other)


@pytest.mark.parametrize("nbytes", [0, 95, 97, 200])
def test_data_of_another_length_is_refused(tmp_path, nbytes):
    """96 bytes are needed: no file is left, and a sound one is not read into other room."""
    segment = rows()
    with pytest.raises(SegmentError, match="96 bytes of data, not"):
        write(tmp_path, segment, [bytes(nbytes)])
    assert left_in(tmp_path) == []
    stored(tmp_path, segment)
    with pytest.raises(SegmentError, match="96 bytes of data, not"):
        read_data(tmp_path, segment, [memoryview(bytearray(nbytes))])


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
sys.path[:0] = {[str(Path(__file__).parent), str(SUPPORT)]!r}
from pathlib import Path
from test_segment import *
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
sys.path[:0] = {[str(Path(__file__).parent), str(SUPPORT)]!r}
from pathlib import Path
from test_segment import *
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
