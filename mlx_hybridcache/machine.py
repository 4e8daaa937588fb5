"""How much memory the system has left, and how much of the store should go so that some stays free.

A budget is set once; what other programs take changes by the minute. On Linux a container's own
limit counts like the machine's memory: a process that reaches it is killed, not refused.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from .errors import SettingError
from .sizes import format_bytes

NORMAL, WARNING, CRITICAL = 1, 2, 4
"""macOS's own levels of memory pressure."""

SHARES = {WARNING: 1 / 16, CRITICAL: 1 / 4}
"""What part of the store goes at each reading while macOS says so. It compresses and swaps long
before nothing is left, so the bytes left alone do not tell."""

SECONDS_BETWEEN = 1.0
"""Between two readings. What was let go has come back to the system by the next one."""

AMPLE = 8
"""What is about to be allocated needs no reading of its own while the last one had so many times as much to spare."""

LARGEST_DEFAULT = 10**9
SMALLEST_PART = 16
"""The default reserve is 1 GB, and on small machines a sixteenth of their memory."""

UNLIMITED = 2**60
"""Version 1 of control groups writes no limit as almost 2**63 bytes."""

MEMBERSHIPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryLeft:
    """What the system said at one moment: bytes that this process can still take, macOS's level."""

    left_bytes: int
    level: int = NORMAL


def excess(left: MemoryLeft, *, reserve_bytes: int, held_bytes: int, coming_bytes: int = 0) -> int:
    """Of `held_bytes`, how many must go so that `reserve_bytes` are left beside `coming_bytes`.

    `coming_bytes` are about to be allocated.
    """
    missing = reserve_bytes + coming_bytes - left.left_bytes
    share = int(held_bytes * SHARES.get(left.level, 0))
    return min(held_bytes, max(0, missing, share))


class Pressure:
    """Watches over `reserve_bytes` of the system's memory; 0 watches over nothing.

    Raises `SettingError` for a reserve that the system does not have.
    """

    def __init__(
        self,
        reserve_bytes: int,
        *,
        read: Callable[[], MemoryLeft] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        has = memory_bytes()
        if reserve_bytes >= has:
            raise SettingError(
                f"memory_reserve is {format_bytes(reserve_bytes)}, and the system has "
                f"{format_bytes(has)} in all: nothing could be kept. Name less, or 0 for no reserve."
            )
        self.reserve_bytes = reserve_bytes
        self._read = read or memory_left
        self._clock = clock
        self._due = clock()
        self._spare = 0

    def excess(self, held_bytes: int, coming_bytes: int = 0) -> int:
        """How many of `held_bytes` should go now.

        Without `coming_bytes` at most one call a second reads, and the others say 0; a request that
        is about to allocate them reads anew, unless many times as much was to spare within that second.
        """
        now = self._clock()
        if not self.reserve_bytes:
            return 0
        if now < self._due and AMPLE * coming_bytes <= self._spare:
            self._spare -= coming_bytes
            return 0
        self._due = now + SECONDS_BETWEEN
        left = self._read()
        spare = left.left_bytes - self.reserve_bytes - coming_bytes
        self._spare = 0 if left.level in SHARES else max(0, spare)
        return excess(
            left,
            reserve_bytes=self.reserve_bytes,
            held_bytes=held_bytes,
            coming_bytes=coming_bytes,
        )


def memory_left() -> MemoryLeft:
    """What the system says now."""
    left = psutil.virtual_memory().available
    left = min([left, *(limit - used for limit, used in cgroup_limits())])
    return MemoryLeft(max(0, left), _level())


def memory_bytes() -> int:
    """What this process could have if it were alone: the machine's memory, or its container's."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in cgroup_limits())])


def default_reserve() -> int:
    """Bytes of the system's memory to leave free when the user names none."""
    return min(LARGEST_DEFAULT, memory_bytes() // SMALLEST_PART)


def give_back() -> None:
    """Return freed memory to the system, where the C library would keep it for later.

    glibc keeps freed pieces below 32 MB: of a store of 962 MB that was let go, 935 MB stayed. Takes
    a tenth of a second after that much, and next to nothing when there is nothing to return.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and needs none
        if trim is not None:
            trim(ctypes.c_size_t(0))


def cgroup_limits(
    memberships: Path = MEMBERSHIPS, mounted_at: Path = CGROUPS
) -> Iterator[tuple[int, int]]:
    """The limit and use, in bytes, of each control group that this process counts against.

    Files that were read lately count as unused, as the kernel drops them first. Nothing on systems
    without control groups.
    """
    try:
        lines = memberships.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            yield from _limits(mounted_at, group, _VERSION_2)
        elif "memory" in controllers.split(","):
            yield from _limits(mounted_at / "memory", group, _VERSION_1)


@dataclass(frozen=True, slots=True)
class _Names:
    """A version's names: files with limits, the file with the use, the line of files read lately."""

    limits: tuple[str, ...]
    used: str
    files: str


_VERSION_2 = _Names(("memory.max", "memory.high"), "memory.current", "inactive_file")
_VERSION_1 = _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def _limits(mounted_at: Path, group: str, names: _Names) -> Iterator[tuple[int, int]]:
    """Those of `group` and of every group above it. Inside a container its own is the topmost."""
    own = PurePosixPath(group.lstrip("/"))
    for folder in (mounted_at / each for each in (own, *own.parents)):
        limits = [number for name in names.limits if (number := _number(folder / name)) is not None]
        if min(limits, default=UNLIMITED) >= UNLIMITED:
            continue
        used = _number(folder / names.used)
        if used is not None:
            yield min(limits), max(0, used - _statistic(folder / "memory.stat", names.files))


def _number(file: Path) -> int | None:
    """None for a file that is not there, and for `max`."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _statistic(file: Path, name: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def _level() -> int:
    """What macOS says of its memory; normal elsewhere, and if it does not tell."""
    level = ctypes.c_int(NORMAL)
    if sys.platform == "darwin":
        size = ctypes.c_size_t(ctypes.sizeof(level))
        ctypes.CDLL(None).sysctlbyname(
            b"kern.memorystatus_vm_pressure_level",
            ctypes.byref(level),
            ctypes.byref(size),
            None,
            ctypes.c_size_t(0),
        )
    return level.value
