"""What the state machine looks at: structure, bytes and files, after each operation and on the way."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_hybridcache.disk.catalogue import Catalogue, FileRows, FileState
from mlx_hybridcache.disk.directory import Directory
from mlx_hybridcache.disk.segment import SEGMENTS
from mlx_hybridcache.disk.tier.tier import DiskTier
from mlx_hybridcache.store.budget import Budget
from mlx_hybridcache.store.store import Store
from mlx_hybridcache.store.tree import Node


class WatchedBudget(Budget):
    """A budget that is looked at every time that its bytes change, also in the middle of a request.

    `highest` is the most that it said it held or made room for, `over` what was more than its limit;
    `held` adds what MLX really holds at those moments.
    """

    highest: int
    over: list[str]
    held: Callable[[], int]

    @classmethod
    def of(cls, budget: Budget, held: Callable[[], int] = lambda: 0) -> WatchedBudget:
        """The same budget, watched from now on."""
        budget.__class__ = cls
        budget.__dict__.update(over=[], highest=0, held=held)
        return budget  # type: ignore[return-value]

    def make_room(self, nbytes: int, *args: Any, **options: Any) -> None:
        """The same, noted."""
        super().make_room(nbytes, *args, **options)
        self.highest = max(self.highest, self.used_bytes + nbytes)

    def _check(self, more: int) -> None:
        super()._check(more)
        used = self.used_bytes
        self.highest = max(self.highest, used)
        worst = max(used, self.held())
        if worst > self.limit_bytes:
            way = " > ".join(frame.name for frame in traceback.extract_stack(limit=8))
            self.over.append(f"{used:,} counted, {worst:,} at worst, in {way}")


class Tally:
    """The files of a directory as the file system weighs them whenever one was written or deleted."""

    def __init__(self, directory: Directory):
        self.folder = directory.root / SEGMENTS
        self.lock = threading.Lock()  # the disk thread weighs what it writes while others recount
        self.files: dict[str, int] = {}
        self.most = 0
        self.recount()
        write, delete = directory.write, directory.delete

        def watched_write(entry: Any, data: Any) -> None:
            try:
                write(entry, data)
            finally:
                self.weigh(entry.segment.name)

        def watched_delete(segment: Any) -> None:
            delete(segment)
            self.weigh(segment.name)

        directory.write, directory.delete = watched_write, watched_delete  # type: ignore[method-assign]

    def weigh(self, name: str) -> None:
        """Look at one file."""
        path = self.folder / name
        with self.lock:
            self.files.pop(name, None)
            if path.is_file():
                self.files[name] = path.stat().st_size
            self.most = max(self.most, sum(self.files.values()))

    def recount(self) -> None:
        """Look at all of them, unfinished ones too."""
        with self.lock:
            self.files = {
                name_of(path): path.stat().st_size
                for path in self.folder.glob("??/*.safetensors*")
                if path.is_file()
            }
            self.most = sum(self.files.values())

    def forget_unfinished(self) -> None:
        """A thread that a dropped cache left behind may still have been writing when it was counted."""
        for name in [name for name in self.files if name.endswith(".partial")]:
            self.weigh(name)

    def take_most(self) -> int:
        """The most that there was since it was last asked."""
        most, self.most = self.most, sum(self.files.values())
        return most


def check_tree(store: Store, check_payload: Callable[[Node], None]) -> None:
    """Runs adjoin, rows cover exactly their run, and the sums are those of the nodes."""
    rows_bytes = snapshot_bytes = 0
    for tree in store._trees.values():
        for node in tree.nodes():
            assert len(node.tokens) > 0
            assert node.parent is not None
            assert node.parent.children is not None
            assert node.parent.children[int(node.tokens[0])] is node
            assert node.start == node.parent.end
            bounds = [node.start, *(rows.end for rows in node.rows)]
            assert [rows.start for rows in node.rows] == bounds[:-1]
            assert bounds[-1] == node.end
            assert not node.pinned or node.checkpoint is not None or not node.needs_checkpoint
            check_payload(node)
            rows_bytes += node.rows_nbytes
            snapshot_bytes += node.checkpoint.nbytes if node.checkpoint is not None else 0
    assert (rows_bytes, snapshot_bytes) == (store.budget.rows_bytes, store.budget.snapshot_bytes)


def check_memory_node(node: Any) -> None:
    """Rows have the shapes of their range, and a checkpoint stands at the node's end."""
    for block in node.rows:
        for leaf, arrays in enumerate(block.layers):
            for which, array in enumerate(arrays):
                first, last = block.within(leaf, which, block.start, block.end)
                assert array.shape[2] == last - first
                assert (first, last) == (0, block.end - block.start) or block.spans
    if node.checkpoint is not None:
        assert node.checkpoint.position == node.end


def check_memory(store: Store) -> None:
    """The memory tier, on the worker thread: no row without use, no byte too many or too few."""
    check_tree(store, check_memory_node)
    bare = [n for n in store.nodes() if not n.children and n.checkpoint is None]
    dead = [node for node in bare if node.needs_checkpoint]
    assert len(dead) <= 1, [(node.start, node.end, node.pinned, node.is_end) for node in dead]
    assert store.budget.used_bytes <= store.budget.limit_bytes


def check_catalogue(catalogue: Catalogue, disk: DiskTier) -> None:
    """The disk tier's trees, on the worker thread: every byte of a file is some node's, or in flight."""
    store, used = catalogue.store, catalogue._files.used
    check_tree(store, lambda node: None)
    parts: dict[str, int] = {}
    for node in store.nodes():
        for part in (*node.rows, node.checkpoint):
            if isinstance(part, FileRows | FileState):
                assert part.nbytes > 0
                parts[part.segment.name] = parts.get(part.segment.name, 0) + part.nbytes
    assert parts == used
    files = sum(segment.file_nbytes for segment in catalogue.segments())
    assert store.budget.in_flight_bytes == files - sum(used.values()), store.stats()
    assert store.budget.running_bytes == disk.write_behind.in_flight_bytes
    assert store.budget.used_bytes <= store.budget.limit_bytes


@contextmanager
def peak_of_mlx() -> Iterator[list[int]]:
    """What MLX held at most meanwhile, beyond what it held before: one number, there at the end."""
    found: list[int] = []
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    yield found
    found.append(mx.get_peak_memory() - before)


def name_of(path: Path) -> str:
    """What the directory calls a file."""
    return f"{path.parent.name}/{path.name}"


def files_of(root: Path) -> list[Path]:
    """Every segment's file, finished or not, in the order of names."""
    return sorted(path for path in root.glob("segments/??/*") if path.is_file())
