"""Archives that are not what they should be: cut, damaged, hostile."""

import io
import json
import os
import tarfile
from dataclasses import replace

import pytest
from directories import segment_files
from directories.cache_directories import (
    content,
)

from mlx_hybridcache.cli.main import main
from mlx_hybridcache.disk.archive import ArchiveError, Manifest, check

# Archives that are not what they should be


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Nine tokens in two files of rows and two states: an archive of some 6 KB."""
    root = tmp_path_factory.mktemp("small") / "cache"
    for segment in (
        segment_files.rows(0, 4),
        segment_files.rows(4, 9),
        segment_files.state(4),
        segment_files.state(9),
    ):
        segment_files.stored(root, replace(segment, model="tiny"))
    to = root.parent / "small.tar"
    main(["cache", "export", segment_files.state(9).key, "--to", str(to), "--cache-dir", str(root)])
    assert len(check(to).segments) == 4
    return to.read_bytes()


def test_an_archive_that_was_cut_short_is_refused(small, tmp_path, archive, root, cache):
    """At every length of a small one, and at 40 of a real one, where nothing changes in the directory."""
    path = tmp_path / "cut.tar"
    path.write_bytes(small)
    for length in reversed(range(len(small))):
        os.truncate(path, length)
        with pytest.raises(ArchiveError):
            check(path)
    whole, before = archive.read_bytes(), content(root)
    for length in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:length])
        shown = cache("import", path)
        assert (shown.status, shown.out) == (2, "")
        assert "cannot be imported" in shown.err
    assert content(root) == before


def test_every_byte_of_an_archive_counts(small, tmp_path):
    """A bit of each fifth byte flipped in turn, and every bit of the first block: none is believed."""
    path = tmp_path / "flipped.tar"
    path.write_bytes(small)
    bits = {(at, at % 8) for at in range(0, len(small), 5)}
    bits |= {(at, bit) for at in range(512) for bit in range(8)}
    with path.open("r+b", buffering=0) as file:
        for at, bit in sorted(bits):
            os.pwrite(file.fileno(), bytes([small[at] ^ 1 << bit]), at)
            with pytest.raises(ArchiveError):
                check(path)
            os.pwrite(file.fileno(), small[at : at + 1], at)
    assert len(check(path).segments) == 4


def test_a_flipped_bit_in_an_archive_changes_no_directory(archive, tmp_path, root, cache):
    """Twenty places in a real one; into a directory that holds something, and into none."""
    whole, before, path = archive.read_bytes(), content(root), tmp_path / "flipped.tar"
    for at in range(100, len(whole), len(whole) // 20):
        held = bytearray(whole)
        held[at] ^= 4
        path.write_bytes(held)
        assert cache("import", path).status == 2
        assert cache("import", path, at=tmp_path / "none").status == 2
    assert content(root) == before
    assert not (tmp_path / "none").exists()


def unpacked(archive):
    """Members of a small archive as (TarInfo, bytes)."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar.getmembers()]


def packed(members, form=tarfile.GNU_FORMAT):
    """The bytes of an archive of these, ended as ours are."""
    made = b"".join(
        info.tobuf(form, "utf-8", "surrogateescape") + held + bytes(-len(held) % 512)
        for info, held in members
    )
    return made + bytes(1024)


def member(name, held=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(held)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, held


def described(manifest, **changes):
    """The manifest's member, with some of its fields changed."""
    fields = {**json.loads(manifest), **changes}
    return member("manifest.json", json.dumps(fields, indent=1).encode())


def hostile(small):
    """Name -> an archive that nobody should believe."""
    (_, manifest), *segments = unpacked(small)
    fields = json.loads(manifest)
    (first, rows), *others = segments
    named = [{**x} for x in fields["members"]]

    def renamed(name):
        return packed(
            [
                described(manifest, members=[{**named[0], "name": name}, *named[1:]]),
                member(name, rows),
                *others,
            ]
        )

    def first_is(info, held=b""):
        return packed([member("manifest.json", manifest), (info, held), *others])

    link = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
    yield "a name above", renamed("../../" + first.name)
    yield "an absolute name", renamed("/tmp/" + first.name)
    yield "a name of its own", renamed("evil.sh")
    yield "another segment's name", renamed("00/" + "0" * 32 + ".rows.safetensors")
    yield "a symlink", first_is(*member(first.name, **link))
    yield "a symlink of the right size", first_is(*member(first.name, rows, **link))
    yield "a hard link", first_is(*member(first.name, rows, type=tarfile.LNKTYPE, linkname="x"))
    yield "a device", first_is(*member(first.name, rows, type=tarfile.CHRTYPE))
    yield "a directory", first_is(*member(first.name, type=tarfile.DIRTYPE))
    yield "a sparse file", first_is(*member(first.name, rows, type=tarfile.GNUTYPE_SPARSE))
    yield "a long name", first_is(*member("x" * 300, rows))
    yield "pax headers", first_is(*member(first.name, rows, type=tarfile.XHDTYPE))
    for name, size in (("giant", 1 << 60), ("negative", -1), ("one more", len(rows) + 1)):
        info, _ = member(first.name)
        info.size = size
        yield f"a {name} size", first_is(info, rows)
        listed = [{**named[0], "bytes": size}, *named[1:]]
        told = described(manifest, members=listed)
        yield f"a {name} size in the manifest", packed([told, *segments])
        yield f"a {name} size in both", packed([told, (info, rows), *others])
        info, _ = member("manifest.json")
        info.size = size
        yield f"a {name} size of the manifest", packed([(info, manifest), *segments])
    for name, value in (
        ("format", "something else"),
        ("version", 2),
        ("namespace", "00" * 16),
        ("model", "another"),
        ("model", {}),
        ("key", "0" * 32),
        ("position", 8),
        ("position", "9"),
        ("position", 9.0),
        ("position", 1 << 80),
        ("members", []),
        ("members", "all"),
        ("members", named[:-1]),
        ("members", named[1:]),
        ("members", named * 2),
        ("more", 1),
    ):
        yield f"{name}={value!r:.20}", packed([described(manifest, **{name: value}), *segments])
    for name, text in (
        ("no JSON", b"{"),
        ("a list", b"[]"),
        ("deep JSON", b"[" * 100_000),
        ("no text", b"\xff\xfe"),
        ("other spelling", json.dumps(fields).encode()),
    ):
        yield name, packed([member("manifest.json", text), *segments])
    yield "no manifest", packed(segments)
    yield "the manifest last", packed([*segments, member("manifest.json", manifest)])
    yield "no end", packed(unpacked(small))[:-1024]
    yield "something behind the end", small + b"x"
    yield "more zeros", small + bytes(512)
    told = described(manifest, members=[*named[1:3], named[0], named[3]])
    yield "out of order", packed([told, segments[1], segments[2], segments[0], segments[3]])
    told = described(manifest, members=[named[0], named[2]])
    yield "the end is missing", packed([told, segments[0], segments[2]])
    told = described(manifest, members=named[:3])
    yield "the state of the end is missing", packed([told, *segments[:3]])
    told = described(manifest, members=[named[0], *named[2:]])
    yield "rows are missing", packed([told, segments[0], *segments[2:]])


def test_a_hostile_archive_is_refused(small, tmp_path, root, cache):
    """Links, devices, names, sizes, manifests: status 2 in one line, the directory as it was."""
    before, path = content(root), tmp_path / "hostile.tar"
    for name, held in hostile(small):
        path.write_bytes(held)
        shown = cache("import", path)
        assert (shown.status, shown.out) == (2, ""), name
        assert shown.err.count("\n") == 1, name
        assert str(path) in shown.err, name
    path.write_bytes(packed(unpacked(small)))
    assert cache("import", path).status == 0
    assert before.items() < content(root).items()


def test_a_prefix_whose_keys_are_not_those_of_its_tokens_is_refused(tmp_path):
    """Rows of other tokens under the same keys, in whole files."""
    first, second = segment_files.rows(0, 4), segment_files.rows(4, 9)
    other = replace(first, tokens=first.tokens + 1)
    held = [
        (segment.name, segment_files.stored(tmp_path, segment).read_bytes())
        for segment in (other, second)
    ]
    sizes = tuple((name, len(data)) for name, data in held)
    manifest = Manifest(segment_files.SPACE, "tiny", second.key, 9, sizes)
    path = tmp_path / "a.tar"
    members = [("manifest.json", manifest.encoded()), *held]
    path.write_bytes(packed([member(name, data) for name, data in members]))
    with pytest.raises(ArchiveError, match="keys are not those"):
        check(path)


def test_what_is_no_file_is_refused(cache, tmp_path):
    """A pipe that nobody writes to, a directory, nothing: no waiting."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none"):
        assert cache("import", path).status == 2
