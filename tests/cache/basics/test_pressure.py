"""Memory pressure: when some of the store should go, how much, and what the system is asked for it."""

import math
import mmap
import sys

import psutil
import pytest

from mlx_hybridcache import machine as pressure
from mlx_hybridcache.errors import SettingError
from mlx_hybridcache.machine import (
    CRITICAL,
    WARNING,
    MemoryLeft,
    Pressure,
    excess,
)

GB = 10**9


@pytest.mark.parametrize(
    ("left", "held", "coming", "goes"),
    [
        (3 * GB, 8 * GB, 0, 0),
        (GB, 8 * GB, 0, 0),  # the reserve itself, and no byte less
        (GB - 1, 8 * GB, 0, 1),
        (GB // 4, 8 * GB, 0, GB * 3 // 4),
        (0, GB // 2, 0, GB // 2),  # no more than is held
        (3 * GB, 8 * GB, 2 * GB, 0),
        (3 * GB, 8 * GB, 5 * GB, 3 * GB),
        (3 * GB, GB, 5 * GB, GB),
        (0, 0, 0, 0),
    ],
)
def test_so_much_goes_that_the_reserve_is_left(left, held, coming, goes):
    """With 1 GB to leave free."""
    assert excess(MemoryLeft(left), reserve_bytes=GB, held_bytes=held, coming_bytes=coming) == goes


def test_a_share_goes_while_macos_speaks_of_pressure():
    """Of 8 GB held and enough left: half a GB at a warning, 2 GB when it is critical."""
    for level, goes in [(WARNING, GB // 2), (CRITICAL, 2 * GB)]:
        assert excess(MemoryLeft(9 * GB, level), reserve_bytes=GB, held_bytes=8 * GB) == goes
        assert excess(MemoryLeft(0, level), reserve_bytes=4 * GB, held_bytes=8 * GB) == 4 * GB


class System:
    """A clock that stands still until it is moved, and readings that are counted."""

    def __init__(self):
        self.now, self.readings, self.left = 100.0, 0, MemoryLeft(0)

    def read(self):
        self.readings += 1
        return self.left

    def watched(self, reserve_bytes):
        return Pressure(reserve_bytes, read=self.read, clock=lambda: self.now)


def test_the_system_is_asked_once_a_second_however_often_a_turn_ends():
    """1,000 turns within a second: the first one reads, the others let nothing go."""
    system = System()
    watch = system.watched(GB)
    assert [watch.excess(5 * GB) for _ in range(1000)] == [GB] + [0] * 999
    assert system.readings == 1
    system.now += 1
    assert watch.excess(5 * GB) == GB
    assert system.readings == 2


def test_a_request_that_is_about_to_allocate_is_told_what_is_left_now():
    """2 GB are coming in the same second: read again."""
    system = System()
    watch = system.watched(GB)
    assert watch.excess(5 * GB) == GB
    assert watch.excess(5 * GB, coming_bytes=2 * GB) == 3 * GB
    assert system.readings == 2


def test_a_request_that_takes_little_of_what_is_to_spare_reads_nothing():
    """10 GB to spare; requests that take 1 GB, until so many have that an eighth is less than another one takes."""
    system = System()
    system.left = MemoryLeft(11 * GB)
    watch = system.watched(GB)
    assert [watch.excess(5 * GB, coming_bytes=GB) for _ in range(3)] == [0, 0, 0]
    assert system.readings == 1  # 9 GB are left behind the first, 8 behind the second
    system.left = MemoryLeft(GB)
    assert watch.excess(5 * GB, coming_bytes=GB) == GB
    assert system.readings == 2
    system.left = MemoryLeft(11 * GB)
    system.now += 1
    assert watch.excess(5 * GB, coming_bytes=1) == 0
    assert system.readings == 3  # a second later even a byte is a reason


@pytest.mark.parametrize("level", [WARNING, CRITICAL])
def test_under_macos_pressure_whatever_is_about_to_be_allocated_reads(level):
    """However much was to spare."""
    system = System()
    system.left = MemoryLeft(100 * GB, level)
    watch = system.watched(GB)
    watch.excess(5 * GB)
    assert watch.excess(5 * GB, coming_bytes=1) > 0
    assert system.readings == 2


def test_without_a_reserve_nothing_goes_and_nothing_is_read():
    """0 bytes to leave free, whatever is left, and whatever comes."""
    system = System()
    watch = system.watched(0)
    assert watch.excess(5 * GB, coming_bytes=GB) == 0
    assert system.readings == 0


def test_a_reserve_of_all_memory_is_refused():
    """One that no system could leave free; one byte less than all may be."""
    has = pressure.memory_bytes()
    with pytest.raises(SettingError, match="memory_reserve"):
        Pressure(has)
    assert Pressure(has - 1).excess(1) == 1  # this very process holds more than a byte


def test_the_default_reserve_is_a_gigabyte_and_a_sixteenth_where_that_is_less(monkeypatch):
    """64 GB of memory; 2 GB."""
    for has, reserve in [(64 * GB, GB), (2 * GB, GB // 8)]:
        monkeypatch.setattr(pressure, "memory_bytes", lambda has=has: has)
        assert pressure.default_reserve() == reserve


def test_what_is_taken_is_not_left_any_more():
    """400 MB written to: so much less is left, give or take what others do meanwhile; so try again."""
    size = 400_000_000
    for _ in range(50):
        before, free = pressure.memory_left().left_bytes, psutil.virtual_memory().free
        with mmap.mmap(-1, size) as taken:  # the C library may have as much left from other tests
            taken[::4096] = b"x" * math.ceil(size / 4096)
            fell = before - pressure.memory_left().left_bytes
            counted = free - psutil.virtual_memory().free
        if abs(fell - size) < size / 2:
            break
    else:
        if counted < size / 2:
            pytest.skip(f"this kernel counts {counted:,} bytes less as free, of {size:,} in use")
        pytest.fail(f"{fell:,} bytes less are left")
    assert 0 < pressure.memory_left().left_bytes <= pressure.memory_bytes()
    assert pressure.memory_bytes() <= psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform != "darwin", reason="other kernels have no such level")
def test_macos_tells_one_of_its_levels():
    """1, 2 or 4."""
    assert pressure.memory_left().level in (1, 2, 4)


def group(folder, **files):
    """A control group as the kernel shows it; `_` stands for the dot of a file's name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")


def limits(tmp_path, membership):
    """What a process with these memberships reads below `tmp_path`."""
    (tmp_path / "memberships").write_text(membership)
    return list(pressure.cgroup_limits(tmp_path / "memberships", tmp_path))


def test_a_containers_limit_counts_and_files_read_lately_do_not(tmp_path):
    """Version 2, 4 GB of which 3 are used, 1 of them by files: 2 GB are used."""
    stat = f"anon {2 * GB}\nfile {GB}\nactive_file 5\ninactive_file {GB}"
    group(tmp_path, memory_max=4 * GB, memory_current=3 * GB, memory_stat=stat)
    assert limits(tmp_path, "0::/\n") == [(4 * GB, 2 * GB)]


def test_every_group_above_has_its_say_and_the_softer_limit_is_the_limit(tmp_path):
    """Version 2: a service of at most 4 GB, slowed down from 3 GB on, in a slice of 10 GB."""
    group(tmp_path / "a.slice", memory_max=10 * GB, memory_high="max", memory_current=5)
    service = tmp_path / "a.slice" / "b.service"
    group(service, memory_max=4 * GB, memory_high=3 * GB, memory_current=GB)
    assert limits(tmp_path, "0::/a.slice/b.service\n") == [(3 * GB, GB), (10 * GB, 5)]


def test_version_1_has_names_of_its_own(tmp_path):
    """A container whose path leads nowhere inside it: the topmost group is its own."""
    group(
        tmp_path / "memory",
        memory_limit_in_bytes=2 * GB,
        memory_usage_in_bytes=GB,
        memory_stat=f"inactive_file 7\ntotal_inactive_file {GB // 2}",
    )
    membership = "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/docker/1\n"
    assert limits(tmp_path, membership) == [(2 * GB, GB // 2)]


def test_no_limit_is_none(tmp_path):
    """`max`, version 1's own word for it, other controllers, and no control groups at all."""
    group(tmp_path, memory_max="max", memory_high="max", memory_current=GB)
    assert limits(tmp_path, "0::/\n2:cpu:/\n1:name=systemd:/\n") == []
    no_limit = 2**63 - 4096
    group(tmp_path / "memory", memory_limit_in_bytes=no_limit, memory_usage_in_bytes=GB)
    assert limits(tmp_path, "4:memory:/\n") == []
    assert list(pressure.cgroup_limits(tmp_path / "missing", tmp_path)) == []
