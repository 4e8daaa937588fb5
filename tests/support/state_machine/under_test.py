"""One cache under operations in any order: how it is opened, asked and ended, and what holds after each."""

from __future__ import annotations

import gc
import random
import shutil
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import oracle
from hypothesis.stateful import RuleBasedStateMachine, invariant
from mlx_lm.sample_utils import make_sampler
from stores.full_scan import check_values
from stores.outlines import seen, there

from mlx_hybridcache import BudgetError, CacheMismatchError, Ready
from mlx_hybridcache.caches.room import request_rows
from mlx_hybridcache.errors import NotStoredError
from mlx_hybridcache.tokens import as_tokens
from mlx_hybridcache.worker.turns import Job, Pause
from state_machine import bounds, cases

Settled = Callable[[Job], Iterator[Pause]]

BUDGET = 3_000_000
"""Bytes of memory: room for a dozen of the hundred prompts that may be asked for."""

DISK_BUDGET = BUDGET // 2
"""Bytes of files, fewer, because all that is cleared and lost goes without an eviction."""

UNREPORTED = BUDGET // 100
"""Bytes that MLX may hold beyond or short of what is reported: 1 % of the budget."""

LIVE_TAPS = 20_000
"""Bytes beside those for each live cache: mlx-lm leaves the last taps in the buffer that they were cut
from where it is at most 16 KiB larger, and here that is much beside a state of 36 KiB."""

CAPTURED = 1_000
"""Bytes beside those for each checkpoint: a state that was captured inside a slice lies where the forward put it, in a
buffer that MLX recycles where it is up to two pages larger. A third of the smallest array that could be left over."""

ACTIVATIONS = 400_000
"""Bytes that a forward of 64 tokens may hold for itself at most; no budget counts them."""

RECYCLED = 80_000
"""Bytes that a reply's buffers, ten or so, are larger than was asked for: MLX hands out recycled ones of up
to two pages more. The states that a block may go back to weigh four times as much."""

WRITTEN = 12
"""Tokens of a reply that is drafted."""

SAMPLER = make_sampler(temp=1.0)


def release(ready: Ready) -> None:
    """The caches go before their claim does, which the worker may give back while they are still held here."""
    ready.prompt_cache.clear()
    ready.release()


class CacheUnderTest(RuleBasedStateMachine):
    """One cache in one directory; what it holds is looked into on its own worker thread."""

    case: ClassVar[cases.Case]
    operations: ClassVar[int]
    seen: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.steps = -1
        shared = Path("/dev/shm")  # writing is flushed to the medium, so let it be a quick one
        self.root = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None)) / "cache"
        self.asked: list[tuple[tuple[int, ...], str]] = []
        self.said: tuple[tuple[int, ...], str] | None = None
        self.damaged: set[str] = set()
        self.obstacles: dict[str, int] = {}
        self.open()

    def open(self) -> None:
        gc.collect()
        mx.clear_cache()
        self.held: list[Any] = []
        self.pins: dict[tuple[tuple[int, ...], str], int] = {}
        self.go_on = threading.Event()
        self.go_on.set()
        self.not_its_own = 0
        self.cache = oracle.new_cache(
            self.case.model(),
            tokenizer=oracle.word_tokenizer(),
            memory_budget=BUDGET,
            disk_budget=DISK_BUDGET,
            cache_dir=self.root,
            **self.case.settings,
        )
        self.engine, self.disk = self.cache.engine, self.cache.engine.tiers.disk
        self.disk._settled = self.lets_go_on(self.disk._settled)
        if self.case.drafts:
            self.cache.learn_draft(self.case.draft())
            self.cache.learn_mtp(self.case.head)
        mx.clear_cache()
        self.baseline = mx.get_active_memory()
        self.memory = bounds.WatchedBudget.of(self.engine.tiers.memory.budget, self.really_held)
        self.files = bounds.WatchedBudget.of(self.disk.catalogue.store.budget)
        self.until_idle()  # what nothing leads to is deleted
        self.tally = bounds.Tally(self.disk.thread.directory)
        assert self.disk.thread.directory.is_writer
        newer = sum(self.obstacles.values())
        assert self.files.limit_bytes == max(0, DISK_BUDGET - newer)

    def really_held(self) -> int:
        """What MLX holds of the budget, less what it may hold beyond it."""
        unreported = UNREPORTED + self.not_its_own + LIVE_TAPS * (len(self.held) + 1)
        return mx.get_active_memory() - self.baseline - unreported

    def teardown(self) -> None:
        error = sys.exception()
        if error is not None and not type(error).__module__.startswith("hypothesis"):
            traceback.print_exception(error)  # hypothesis drops what does not happen twice
        self.end(0)
        shutil.rmtree(self.root.parent)

    def end(self, seconds: int | None) -> None:
        self.go_on.set()
        self.count("evicted", self.cache.stats().evictions)
        self.count("taken over", self.cache.stats().taken_over)
        self.count("files evicted", self.disk.catalogue.store.stats().evictions)
        self.count("rejected", self.cache.disk_stats().rejected)
        self.count("failed", self.cache.disk_stats().failures)
        self.held.clear()
        if seconds is not None:
            self.cache.close(seconds)
        self.check_way()
        del self.cache, self.engine, self.disk, self.memory, self.files, self.tally

    # What holds after each

    @invariant()
    def holds(self) -> None:
        self.steps += 1  # it is asked before the first one too
        type(self).operations += self.steps > 0
        if self.go_on.is_set():
            self.until_idle()
        self.cache.worker.call(self.check)
        if self.go_on.is_set() and self.steps % 5 == 0:
            self.check_idle()
        self.check_way()
        if self.steps % 50 == 49 and self.asked:
            chosen = random.Random(self.steps).choice(self.asked)
            self.attempt(lambda: self.compare(*chosen))
            self.until_idle()
            self.cache.worker.call(self.check)

    def check(self) -> None:
        """On the worker thread."""
        store, disk = self.engine.tiers.memory, self.disk
        bounds.check_memory(store)
        bounds.check_catalogue(disk.catalogue, disk)
        for tier in (store, disk.catalogue.store):
            outlined = {name: seen(one) for name, one in tier.outlines(None).items()}
            trees = {name: each for name, each in tier._trees.items() if each.root.children}
            assert outlined == {name: there(each.root) for name, each in trees.items()}
            check_values(tier)
        if not self.held:
            assert store.budget.running_bytes == 0
        if self.go_on.is_set():
            assert store.budget.in_flight_bytes == 0
            assert not disk.write_behind._in_flight
        off = mx.get_active_memory() - self.baseline - store.budget.used_bytes
        ahead = sum(map(self.not_held_yet, self.held))
        beyond = CAPTURED * store.stats().checkpoints + LIVE_TAPS * len(self.held)
        assert -UNREPORTED - ahead <= off <= UNREPORTED + beyond, (
            f"{off:,} bytes off: {store.stats()}"
        )
        self.check_pins()

    def check_claims(self) -> None:
        """On the worker thread, in the middle of a request."""
        budget = self.engine.tiers.memory.budget
        off = self.really_held() - budget.used_bytes
        assert off <= RECYCLED, f"{off:,} bytes more than are counted"

    def not_held_yet(self, ready: Any) -> int:
        """Bytes that are claimed for caches that were handed over, and come once these have read more.

        Full rows before the start that are one stored run are in these caches as they lie, and held once.
        """
        layout, ahead = self.engine.layout, 0
        if self.case.grow:
            claimed = layout.running_bytes(request_rows(ready.position + len(ready.rest), 8))
            return claimed - sum(cache.nbytes for cache in ready.prompt_cache)
        start = layout.quantized_start
        if not ready.position:
            ahead += layout.snapshot_bytes
        if ready.position <= start > 0:  # where rows become quantized beside the full ones
            rows = request_rows(ready.position + len(ready.rest), 8)
            ahead += layout.growth_bytes(start, rows - start)
        elif start:
            ahead += layout.running_bytes(start) - layout.running_bytes(0)
        return ahead

    def check_pins(self) -> None:
        assert sum(node.pinned for node in self.engine.tiers.memory.nodes()) == len(self.pins)
        for (prefix, salt), position in self.pins.items():
            (namespace, *_) = self.engine.sharing.namespaces(self.cache._prompts.salt_of(salt))
            tokens = as_tokens(prefix)
            (*_, node) = self.engine.tiers.memory.match(namespace, tokens).path
            assert node.end == position
            assert node.pinned

    def check_idle(self) -> None:
        """Nothing is being written or deleted any more: files are what the catalogue says."""
        stats = self.cache.disk_stats()
        assert stats.queued_bytes == 0
        segments = self.cache.worker.call(self.disk.catalogue.segments)
        needed = {each.name: each.file_nbytes for each in segments}
        found = {bounds.name_of(path): path.stat().st_size for path in bounds.files_of(self.root)}
        self.tally.forget_unfinished()
        assert found == self.tally.files
        assert found.keys() - self.obstacles.keys() <= needed.keys()
        wrong = {name for name, _ in found.items() ^ needed.items()}
        assert wrong <= self.damaged | self.obstacles.keys()
        assert sum(needed.values()) == stats.held_bytes

    def check_way(self) -> None:
        """What was met on the way, whenever bytes changed and behind every file."""
        assert not self.memory.over, self.memory.over[:3]
        assert not self.files.over, self.files.over[:3]
        assert self.tally.take_most() - sum(self.obstacles.values()) <= DISK_BUDGET

    # How it is done

    def lets_go_on(self, settled: Settled) -> Settled:
        """A request waits for room that the disk thread has, which must not stand still then."""

        def waiting(job: Job) -> Iterator[Pause]:
            self.go_on.set()
            self.count("waited for room")
            return settled(job)

        return waiting

    def ask(self, tokens: tuple[int, ...], salt: str) -> None:
        """A request is coming, which would wait for ever for files that cannot be read."""
        self.asked.append((tokens, salt))
        if self.cache.lookup(tokens, cache_salt=salt).tier == "disk":
            self.go_on.set()

    def prefill(self, tokens: tuple[int, ...], salt: str) -> Any:
        self.ask(tokens, salt)
        with bounds.peak_of_mlx() as peak:
            ready = self.cache.prefill(tokens, max_tokens=8, cache_salt=salt)
        assert peak[0] <= BUDGET + ACTIVATIONS
        self.count(ready.report.tier)
        return ready

    def compare(self, tokens: tuple[int, ...], salt: str) -> None:
        # This thread computes too, while the worker may hear of files that are written.
        self.not_its_own = ACTIVATIONS + 2 * self.engine.layout.running_bytes(len(tokens))
        expected = self.case.cold(tokens)
        mx.synchronize()
        self.not_its_own = 0
        ready = self.prefill(tokens, salt)
        self.not_its_own = ACTIVATIONS  # of this thread
        hot = cases.logits(self.case.model(), ready.prompt_cache, ready.rest)
        self.not_its_own = 0
        release(ready)
        assert oracle.agree(hot, expected, self.case.rounding)
        self.count("compared")

    def written(
        self, tokens: tuple[int, ...], salt: str, **options: Any
    ) -> list[tuple[int, bytes]]:
        """The tokens of a reply, with the log-probabilities in their places.

        Behind each token MLX holds no more than is claimed, what the last ones may go back to included.
        """
        self.ask(tokens, salt)
        stream = self.cache.stream_generate(
            tokens, WRITTEN, cache_salt=salt, sampler=SAMPLER, seed=0, **options
        )
        found = []
        for each in stream:
            found.append((each.token, np.array(each.logprobs).tobytes()))
            self.cache.worker.call(self.check_claims)
        if stream.report is not None:
            report = stream.report
            self.count("accepted", report.accepted_tokens)
            self.count("refused drafts", report.drafted_tokens - report.accepted_tokens)
            if "draft_mtp" in options:
                self.count("heads restored", report.draft_restored_tokens > 0)
        return found

    def attempt(self, do: Callable[[], object], *, may: bool = False) -> None:
        """It may be refused, but for a reason."""
        try:
            do()
        except BudgetError:
            assert may or self.held or self.pins or not self.go_on.is_set()
            self.count("refused")
        except CacheMismatchError:
            assert self.cache.info.exact
        except NotStoredError:
            pass

    def count(self, what: str, times: int = 1) -> None:
        type(self).seen[what] += times

    def until_idle(self) -> None:
        """Wait without `flush`, which looks every ten milliseconds only."""
        self.go_on.set()
        is_writing = was_writing = True
        rounds = 0
        while is_writing or was_writing:  # once more: what was written last may have made room
            rounds += 1
            assert rounds < 2_000, "the same is written and deleted without end"
            done = threading.Event()
            self.disk.thread.change(lambda directory, done=done: done.set())
            assert done.wait(60)  # so the worker has heard what was noticed before that
            was_writing, is_writing = is_writing, self.cache.worker.call(self.disk.is_writing)

    def shape(self) -> list[Any]:
        def look() -> list[Any]:
            return [
                (node.start, node.end, node.checkpoint is not None, node.last_used, node.pinned)
                for node in self.engine.tiers.memory.nodes()
            ]

        return self.cache.worker.call(look)
