"""Files that are damaged, foreign, cut short or not what they say: each is refused, and none is read."""

import os
import struct
import tracemalloc

import pytest
import xxhash
from directories.segment_files import left_in, place, read, rows, state, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_hybridcache.disk.segment import (
    SegmentError,
    Tensor,
    check_file,
    read_data,
    read_header,
    write,
)


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
