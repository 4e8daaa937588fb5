"""Files that are private to their owner, and that are on the medium whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"
"""Ends the name of a file that is still being written."""

_PIECE = 1 << 20
"""Bytes copied and summed in one go: what fits into a processor's cache is fetched once."""


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """The descriptor of a new file, mode 0600, which takes the place of `path` when all went well.

    Flushed before it gets its name, so that no name ever stands for half a file. When anything is
    raised, nothing is left behind; a killed process leaves a name that ends with `PARTIAL`.
    """
    make_directory(path.parent)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.fchmod(fd, 0o600)
            yield fd
            full_fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


@contextmanager
def reading(path: Path) -> Iterator[int | None]:
    """The descriptor of a file to read, None when something else has its name."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not hold us up
    try:
        yield fd if stat.S_ISREG(os.fstat(fd).st_mode) else None
    finally:
        os.close(fd)


def pieces(views: Iterable[memoryview | bytes]) -> Iterator[memoryview]:
    """The bytes of all views, at most 1 MiB at a time."""
    for view in views:
        whole = memoryview(view)
        if whole.nbytes:  # a shape with a zero in it has no plain view
            whole = whole.cast("B")
            for at in range(0, len(whole), _PIECE):
                yield whole[at : at + _PIECE]


def scrap(nbytes: int) -> Iterator[memoryview]:
    """Room for so many bytes that nobody wants, in 1 MiB of memory."""
    room = memoryview(bytearray(min(nbytes, _PIECE)))
    for at in range(0, nbytes, _PIECE):
        yield room[: nbytes - at]


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write to the last byte: one call may write less."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def read_all(fd: int, into: memoryview) -> bool:
    """Fill a view from where the file stands. False when the file ends before."""
    while into:
        count = os.readv(fd, [into])
        if count == 0:
            return False
        into = into[count:]
    return True


def make_directory(path: Path) -> None:
    """Make a directory, and those missing above it, with mode 0700 whatever the umask."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
        path.chmod(0o700)
        fsync_directory(path.parent)


def full_fsync(fd: int) -> None:
    """Flush a file to the medium itself: on macOS `fsync` stops at the drive's own cache."""
    if sys.platform == "darwin":
        import fcntl

        with suppress(OSError):  # network file systems know no F_FULLFSYNC
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def fsync_directory(path: Path) -> None:
    """Flush the names in a directory: until then a rename may be lost with the power."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        full_fsync(fd)
    except OSError as error:  # some file systems flush files only
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(fd)
