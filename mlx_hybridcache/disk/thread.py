"""The one thread that touches files: it reads, writes and deletes what it is told to, reads first.

It calls no MLX function. What it is handed are byte views of arrays; they are given back to whoever
asked, who alone may drop them.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from .chains import Chains, TreeUpdate
from .directory import Directory, News
from .index import Entry
from .segment import Segment, SegmentError, read_data

log = logging.getLogger("mlx_hybridcache")

TICK_SECONDS = 5.0
"""How often an idle reader looks whether files came or went, and whether the writer is gone."""

_READ, _CHANGE, _STOP = range(3)
"""Reads go first: a request waits for them. What changes the directory keeps its order."""


class _Jobs:
    """What is to be done, by priority and then in order, for one thread. Any puts in, finalizers too, wherever they
    run: there is no lock that the thread they run on could be holding.
    """

    def __init__(self) -> None:
        self._left: tuple[deque[Callable[[], None]], ...] = (deque(), deque(), deque())
        self._there: queue.SimpleQueue[None] = queue.SimpleQueue()

    def put(self, priority: int, work: Callable[[], None]) -> None:
        self._left[priority].append(work)
        self._there.put(None)

    def get(self, timeout: float) -> tuple[int, Callable[[], None]]:
        """The next; raises `queue.Empty`."""
        self._there.get(timeout=timeout)
        priority = next(each for each, left in enumerate(self._left) if left)
        return priority, self._left[priority].popleft()


@dataclass(eq=False)
class Transfer:
    """Segments on their way, each with the views of its bytes; `failed` is the first that did not come.

    Whoever asked for it holds the arrays behind the views, and clears `parts` when it is done. `finished` says, before
    `done` is called, that nothing is read or written any more. What is not wanted any more ends with the file at hand.
    """

    parts: list[tuple[Segment, list[memoryview]]]
    done: Callable[[Transfer], None]
    failed: Segment | None = None
    error: Exception | None = None
    is_told: bool = False  # the directory itself has said, or will, what is wrong
    finished: threading.Event = field(default_factory=threading.Event)
    is_wanted: bool = True

    def let_go(self) -> None:
        """Hold the views no longer, nor those that an error holds by the frames it passed through."""
        self.parts.clear()
        error: BaseException | None = self.error
        while error is not None:
            error.__traceback__ = None
            error = error.__cause__ or error.__context__


@dataclass(frozen=True, slots=True)
class Change:
    """What became of the directory. `names` are those of all files, where it was looked at as a whole."""

    update: TreeUpdate
    names: frozenset[str] | None = None


@dataclass(eq=False)
class _Watcher:
    """Who hears of changes, and how the files were linked when it last did."""

    chains: Chains
    changed: Callable[[Change], None]

    def put_together(self, news: News) -> Change:
        """What the news come to. Takes its time here rather than on the worker."""
        if not news.is_whole:
            return Change(self.chains.change(news.entries, news.gone))
        self.chains = Chains()
        update = self.chains.change(news.entries)
        names = frozenset(entry.segment.name for entry in news.entries)
        return Change(replace(update, orphans=self.chains.orphans()), names)


class DiskThread:
    """Does what it is asked in its own time and hands the outcome to `post`, in any thread's stead.

    `watch` names who hears when the directory was changed by another process, or when this one has become
    the writer. Closing it, or dropping it, ends the thread after the job at hand.
    """

    def __init__(
        self,
        directory: Directory,
        post: Callable[[Callable[[], None]], None],
    ):
        self.directory = directory
        self._jobs = _Jobs()
        self._post = post
        self._watchers: list[_Watcher] = []
        self._thread = threading.Thread(
            target=_run,
            args=(self._jobs, directory, post, self._watchers),
            name="mlx-hybridcache-disk",
            daemon=True,
        )
        self._thread.start()

    @property
    def ident(self) -> int | None:
        """The thread's own number."""
        return self._thread.ident

    def watch(self, chains: Chains, changed: Callable[[Change], None]) -> None:
        """Post to `changed` what came and went, whenever something did. `chains` are this thread's from now on."""
        self._watchers.append(_Watcher(chains, changed))

    def read(self, transfer: Transfer) -> None:
        """Fill the views of `transfer`; the first segment that is not what it was ends it."""
        root = self.directory.root

        def read() -> None:
            for segment, views in transfer.parts:
                if not transfer.is_wanted:
                    break
                try:
                    read_data(root, segment, views)
                except (SegmentError, OSError) as error:
                    transfer.failed, transfer.error = segment, error
                    transfer.is_told = self.directory.is_lost()
                    break

        self._do(_READ, transfer, read)

    def write(self, transfer: Transfer, used: int, *, is_pinned: bool) -> None:
        """Write the one segment of `transfer`."""

        def write() -> None:
            (segment, views) = transfer.parts[0]
            try:
                self.directory.write(Entry(segment, used, is_pinned, segment.file_nbytes), views)
            except (SegmentError, OSError) as error:
                transfer.failed, transfer.error = segment, error
                transfer.is_told = self.directory.is_lost()

        self._do(_CHANGE, transfer, write)

    def change(self, change: Callable[[Directory], None]) -> None:
        """Delete files or note something, in its turn."""
        self._put(_CHANGE, lambda: change(self.directory))

    def delete(self, segment: Segment) -> None:
        """Nothing needs this file any more; only the writer deletes it."""
        if self.directory.is_writer:
            self.change(lambda directory: directory.delete(segment))

    def later(self, function: Callable[[], None]) -> None:
        """Post `function` once everything that was asked for is done, so that others have their turns."""
        self._put(_CHANGE, lambda: self._post(function))

    def close(self) -> None:
        """End after what is to be changed, and let another process write.

        Returns when that is done, whoever else closes it; on the thread itself, at once.
        """
        self._put(_STOP, lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _do(self, priority: int, transfer: Transfer, work: Callable[[], None]) -> None:
        def job() -> None:
            try:
                work()
            except BaseException as error:  # whoever waits for it must hear of it
                transfer.failed, transfer.error = transfer.parts[0][0], RuntimeError(repr(error))
            transfer.finished.set()
            self._post(lambda: transfer.done(transfer))

        self._put(priority, job)

    def _put(self, priority: int, work: Callable[[], None]) -> None:
        self._jobs.put(priority, work)


def _run(
    jobs: _Jobs,
    directory: Directory,
    post: Callable[[Callable[[], None]], None],
    watchers: list[_Watcher],
) -> None:
    look_at = time.monotonic() + TICK_SECONDS
    while True:
        with suppress(queue.Empty):
            priority, work = jobs.get(timeout=max(0.0, look_at - time.monotonic()))
            if priority == _STOP:
                _guarded(directory.close, directory)
                return
            _guarded(work, directory)
            del work  # what it holds is the worker's to drop
        # A reader that is busy all the time must notice too that the writer is gone.
        if time.monotonic() >= look_at or directory.is_lost():
            _guarded(partial(_look, directory, post, watchers), directory)
            look_at = time.monotonic() + TICK_SECONDS


def _guarded(work: Callable[[], object], directory: Directory) -> None:
    """Whatever one job meets, the thread goes on: requests wait for it."""
    try:
        work()
    except OSError as error:
        directory.complain("files", f"{error}.")
    except Exception:
        log.exception("The disk thread of %s met what it does not know.", directory.root)


def _look(
    directory: Directory,
    post: Callable[[Callable[[], None]], None],
    watchers: list[_Watcher],
) -> None:
    news = directory.news()
    for watcher in watchers if news is not None else ():
        assert news is not None
        post(partial(watcher.changed, watcher.put_together(news)))
