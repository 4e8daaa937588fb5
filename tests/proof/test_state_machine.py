"""Both tiers under thousands of operations in any order, checked after each: structure, bytes, replies.

Two thousand always, ten thousand by `pytest -m long`. The same every time that the same tests are collected:
hypothesis tries the numbers that it reads in them. `STATE_MACHINE_SEED=7` runs others,
`STATE_MACHINE_OPERATIONS=100000` has more in the long form.
"""

import gc
import itertools
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import bounds
import cases
import mlx.core as mx
import oracle
import pytest
import tiny
from full_scan import check_values
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from long import forms
from outlines import seen, there

from mlx_hybridcache import BudgetError, CacheMismatchError
from mlx_hybridcache.caches.room import request_rows
from mlx_hybridcache.errors import NotStoredError, PinnedError
from mlx_hybridcache.store.tree import PrefixTree
from mlx_hybridcache.tokens import as_tokens

SHORT = 2000
OPERATIONS = forms(SHORT, int(os.environ.get("STATE_MACHINE_OPERATIONS", "10000")))
"""Of all cases together."""

SEED = int(os.environ.get("STATE_MACHINE_SEED", "0"))

STEPS = 125
"""Operations on one directory; each example begins with an empty one."""

BUDGET = 3_000_000
"""Bytes of memory: room for a dozen of the hundred prompts that may be asked for."""

DISK_BUDGET = BUDGET // 2
"""Bytes of files, fewer, because all that is cleared and lost goes without an eviction."""

UNREPORTED = BUDGET // 100
"""Bytes that MLX may hold beyond or short of what is reported: 1 % of the budget."""

LIVE_TAPS = 20_000
"""Bytes beside those for each live cache: mlx-lm leaves the last taps in the buffer that they were cut
from where it is at most 16 KiB larger, and here that is much beside a state of 36 KiB."""

ACTIVATIONS = 400_000
"""Bytes that a forward of 64 tokens may hold for itself at most; no budget counts them."""

SMALL_FILES = 1500
"""Bytes that a file may have while the disk fails: enough for a few tokens' rows."""

SALTS = ("", "other")


forks = st.none() | st.tuples(st.sampled_from([30, 64, 101, 128, 150, 200]), st.integers(0, 2))
prompts = st.builds(
    cases.prompt,
    st.integers(0, 2),
    st.sampled_from([64, 65, 80, 100, 128, 129, 160, 200, 257]),
    forks,
)
salts = st.sampled_from(SALTS)
places = st.integers(0, 1000)


class CacheMachine(RuleBasedStateMachine):
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

    # What can happen

    @rule(tokens=prompts, salt=salts)
    def read(self, tokens: tuple[int, ...], salt: str) -> None:
        self.attempt(lambda: self.prefill(tokens, salt).release())

    @rule(tokens=prompts, salt=salts, count=st.integers(1, 6))
    def generate(self, tokens: tuple[int, ...], salt: str, count: int) -> None:
        self.ask(tokens, salt)

        def answer() -> None:
            stream = self.cache.stream_generate(tokens, count, cache_salt=salt)
            reply = [each.token for each in stream]
            self.count(stream.report.tier)
            self.said = (*tokens, *reply), salt

        self.attempt(answer)

    @rule(more=st.integers(0, 12), count=st.integers(1, 6))
    def talk_on(self, more: int, count: int) -> None:
        """The next turn of the conversation that was answered last; sometimes it comes again."""
        if self.said is not None and len(self.said[0]) < 700:
            history, salt = self.said
            tokens = (*history, *oracle.prompt(more, seed=count)) if more else history
            for _ in range(1 + more % 2):
                self.generate(tokens, salt, count)
            if more > 9:
                self.attempt(lambda: self.compare(tokens, salt))

    @rule(tokens=prompts, salt=salts)
    def answer(self, tokens: tuple[int, ...], salt: str) -> None:
        self.attempt(lambda: self.compare(tokens, salt))

    @rule(tokens=prompts, salt=salts)
    def restore(self, tokens: tuple[int, ...], salt: str) -> None:
        """Nothing is computed, so that MLX must not hold more for a moment than was claimed."""
        self.ask(tokens, salt)
        mx.clear_cache()
        self.memory.highest = before = self.memory.used_bytes
        with bounds.peak_of_mlx() as peak:
            self.attempt(
                lambda: self.cache.restore(tokens, max_tokens=8, cache_salt=salt).release()
            )
        most = self.memory.highest - before
        assert peak[0] <= most + UNREPORTED, f"MLX held {peak[0]:,} bytes more, not {most:,}"

    @rule(tokens=prompts, salt=salts)
    def look_up(self, tokens: tuple[int, ...], salt: str) -> None:
        before = self.shape()
        found = self.cache.lookup(tokens, cache_salt=salt)
        assert self.shape() == before
        assert 0 <= found.restored_tokens < len(tokens)
        assert self.cache.lookup(tokens, cache_salt="nobody's").restored_tokens == 0

    @rule(tokens=prompts, salt=salts)
    def save_own(self, tokens: tuple[int, ...], salt: str) -> None:
        def save() -> None:
            fresh = self.engine.layout.fresh_caches(self.case.model())
            caches = tiny.cold_caches(self.case.model(), tokens[:80], oracle.STEP, fresh)
            self.not_its_own = max(0, mx.get_active_memory() - before)
            self.cache.save(tokens[:80], caches, cache_salt=salt)

        before = mx.get_active_memory()
        self.attempt(save)
        self.not_its_own = 0

    @rule(which=st.integers(1, 6))
    def pin(self, which: int) -> None:
        def pin() -> None:
            position = self.cache.pin(tokens, cache_salt=salt)
            self.pins[(tokens[:position], salt)] = position
            self.count("pinned")

        if self.asked:
            tokens, salt = self.asked[-which:][0]
            self.attempt(pin)

    @rule(which=st.integers(1, 12))
    def unpin(self, which: int) -> None:
        def unpin() -> None:
            position = self.cache.unpin(tokens, cache_salt=salt)
            known = [
                at
                for prefix, of in self.pins
                if of == salt and tokens[: (at := len(prefix))] == prefix
            ]
            assert not known or position == max(known)
            self.pins.pop((tokens[:position], salt), None)

        if self.asked:
            tokens, salt = self.asked[-which:][0]
            self.attempt(unpin)

    @rule(which=st.integers(1, 60))
    def drop(self, which: int) -> None:
        """Now and then forget one of the last prompts, but what others share, or what is pinned."""
        if self.asked and which <= 12:
            tokens, salt = self.asked[-which:][0]
            with suppress(NotStoredError, PinnedError):
                start = self.cache.drop(tokens, cache_salt=salt)
                assert self.cache.lookup(tokens, cache_salt=salt).restored_tokens <= start
                self.count("dropped")

    @rule(tokens=prompts, salt=salts, turns=st.integers(0, 4))
    def cancel(self, tokens: tuple[int, ...], salt: str, turns: int) -> None:
        """End a stream after so many progress callbacks, or before it has begun."""
        self.ask(tokens, salt)
        left = [turns]

        def stop(read: int, total: int) -> None:
            left[0] -= 1
            if left[0] == 0:
                stream.cancel()

        began = threading.Event()
        self.cache.worker.post(lambda: began.wait(60) and None)
        stream = self.cache.stream_generate(
            tokens, 4, cache_salt=salt, prompt_progress_callback=stop
        )
        if turns == 0:
            stream.cancel()
        began.set()
        self.attempt(lambda: all(True for _ in stream))
        self.count("cancelled")

    @rule(tokens=prompts, salt=salts)
    def leave_promotion(self, tokens: tuple[int, ...], salt: str) -> None:
        """A client goes while its files are still to be read; the disk thread writes into its buffers."""
        if self.cache.lookup(tokens, cache_salt=salt).tier != "disk":
            return
        self.stall()
        stream = self.cache.stream_generate(tokens, 4, cache_salt=salt)
        self.cache.worker.call(lambda: None)  # one turn later the files have been asked for
        self.attempt(stream.close)
        self.count("left", times=self.cache.stats().lingering_bytes > 0)

    @rule(tokens=prompts, salt=salts)
    def hold(self, tokens: tuple[int, ...], salt: str) -> None:
        """A caller keeps its caches for a while."""
        if len(self.held) < 2:
            self.attempt(lambda: self.held.append(self.prefill(tokens, salt)))

    @rule()
    def let_go(self) -> None:
        self.held.clear()

    @rule(length=st.sampled_from([1000, 2000, 4000]))
    def crowd(self, length: int) -> None:
        """A large request takes the room of much of what is stored."""
        tokens = oracle.prompt(20, seed=length)
        need = self.engine.layout.running_bytes(length + 256)
        self.attempt(
            lambda: self.cache.restore(tokens, max_tokens=length).release(), may=need > BUDGET
        )

    @rule(part=st.sampled_from([2, 1]))
    def press(self, part: int) -> None:
        """The system lacks memory: half of what is stored goes, or all of it."""
        store = self.engine.tiers.memory
        self.cache.worker.call(lambda: store.shrink(store.budget.stored_bytes // part))
        assert part > 1 or self.pins or store.budget.stored_bytes == 0

    @rule()
    def stall(self) -> None:
        """The disk stands still until something must be read from it."""
        if self.go_on.is_set():
            self.go_on.clear()
            self.disk.thread.change(lambda directory: self.go_on.wait())

    @rule()
    def flush(self) -> None:
        self.go_on.set()
        is_written = self.cache.flush(30)
        assert is_written or self.obstacles

    @rule(tokens=prompts, salt=salts)
    def fail(self, tokens: tuple[int, ...], salt: str) -> None:
        """While a prompt is read, the system lets nobody write but the smallest files."""
        self.until_idle()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILES, hard))
        try:
            self.read(tokens, salt)
            self.until_idle()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        self.disk.write_behind._rest_until = 0.0

    @rule(
        which=places,
        how=st.sampled_from(["flip", "truncate", "delete", "folder", "newer", "index", "all"]),
    )
    def damage(self, which: int, how: str) -> None:
        self.until_idle()
        files = [
            path
            for path in bounds.files_of(self.root)
            if bounds.name_of(path) not in self.obstacles
        ]
        if how == "index":
            (self.root / "index.sqlite").unlink(missing_ok=True)
        elif how == "all":
            shutil.rmtree(self.root)
            self.damaged.clear()
            self.obstacles.clear()
            self.until_idle()  # the disk thread notices
        elif files:
            path = files[which % len(files)]
            self.damaged.add(name := bounds.name_of(path))
            data = bytearray(path.read_bytes())
            if how in {"flip", "truncate"}:
                at = which * 7919 % len(data) if data else 0
                data[at : at + 1] = [byte ^ 1 << which % 8 for byte in data[at : at + 1]]
                path.write_bytes(data[:at] if how == "truncate" else data)
            elif how == "newer" and b'"version":"1"' in data:
                path.write_bytes(data.replace(b'"version":"1"', b'"version":"2"', 1) + b"more")
                self.obstacles[name] = path.stat().st_size
            elif how in {"delete", "folder"}:
                path.unlink()
                if how == "folder":
                    path.mkdir()
                    self.obstacles[name] = 0
        self.tally.recount()

    @rule(how=st.sampled_from(["at once", "written", "dropped"]), which=st.integers(0, 6))
    def restart(self, how: str, which: int) -> None:
        """And one of the conversations from before comes back, or none."""
        self.end({"at once": 0, "written": 5, "dropped": None}[how])
        self.open()
        self.count("restarted")
        if which and self.asked:
            self.read(*self.asked[-which:][0])

    @rule(tokens=prompts, salt=salts, how=st.sampled_from(["no", "no", "at rest", "in haste"]))
    def clear(self, tokens: tuple[int, ...], salt: str, how: str) -> None:
        if how == "in haste":  # while it is written
            self.read(tokens, salt)
            self.stall()
            self.read(tokens[1:], salt)
        if how != "no":
            self.cache.clear()
            self.pins.clear()
            assert self.cache.stats().nodes == 0 == self.disk.catalogue.store.stats().nodes
            for asked, of in self.asked[-3:]:
                assert self.cache.lookup(asked, cache_salt=of).restored_tokens == 0

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
        assert -UNREPORTED - ahead <= off <= UNREPORTED + LIVE_TAPS * len(self.held), (
            f"{off:,} bytes off: {store.stats()}"
        )
        self.check_pins()

    def not_held_yet(self, ready: Any) -> int:
        """Bytes that are claimed for caches that were handed over, and come once these have read more."""
        layout, ahead = self.engine.layout, 0
        if not ready.position:
            ahead += layout.snapshot_bytes
        if (
            ready.position <= layout.quantized_start > 0
        ):  # where rows become quantized beside the full ones
            rows = request_rows(ready.position + len(ready.rest), 8)
            ahead += layout.growth_bytes(layout.quantized_start, rows - layout.quantized_start)
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
        assert not self.memory.over
        assert not self.files.over
        assert self.tally.take_most() - sum(self.obstacles.values()) <= DISK_BUDGET

    # How it is done

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
        expected = self.case.cold(tokens)
        ready = self.prefill(tokens, salt)
        self.not_its_own = ACTIVATIONS  # of this thread
        hot = cases.logits(self.case.model(), ready.prompt_cache, ready.rest)
        self.not_its_own = 0
        ready.release()
        assert oracle.agree(hot, expected)
        self.count("compared")

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


@contextmanager
def counted_splits(seen: Counter[str]) -> Iterator[None]:
    """How often a run was cut in two."""
    split = PrefixTree._split

    def counted(self: PrefixTree, *where: Any) -> Any:
        seen["split"] += 1
        return split(self, *where)

    PrefixTree._split = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        PrefixTree._split = split  # type: ignore[method-assign]


FLOORS = Counter(
    {
        "none": 50,
        "memory": 50,
        "disk": 30,
        "evicted": 50,
        "files evicted": 10,
        "split": 100,
        "failed": 20,
        "cancelled": 30,
        "compared": 30,
        "restarted": 20,
        "taken over": 20,
        "pinned": 3,
    }
)
"""How often each of these must happen at least among a case's share of ten thousand operations."""


@pytest.mark.parametrize("operations", OPERATIONS)
@pytest.mark.parametrize("name", cases.CASES)
def test_thousands_of_operations_in_any_order(name: str, operations: int) -> None:
    """As `operate`. The whole form has a process of its own.

    MLX leaves a thread behind with each that used it and has ended, and wakes them all with each
    evaluation: behind some hundred caches of other tests that takes four times as long.
    """
    if operations <= SHORT:
        operate(name, operations)
        return
    ended = subprocess.run(
        [sys.executable, __file__, name, str(operations)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-20_000:]


def operate(name: str, operations: int) -> None:
    """Prompts of three families under two salts, replies, pins, cancelled streams, full budgets, failing
    disks, damaged files, restarts: nothing is ever out of its bounds, and no reply differs from cold.

    Which operations follow each other depends on the numbers in the collected tests, so what has not
    happened often enough in a case's share may still do so in five times as many operations again.
    """
    seen: Counter[str] = Counter()
    floors = Counter(FLOORS)
    if operations < 10_000:
        floors = Counter({what: least // 10 for what, least in FLOORS.items()})
    if cases.CASES[name].quantized:
        del floors["taken over"]
    body = {"case": cases.CASES[name], "operations": 0, "seen": seen}
    machine = type(f"{name.title()}Machine", (CacheMachine,), body)
    share = operations // len(cases.CASES)
    how = settings(
        max_examples=max(1, share // STEPS),
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    gc.freeze()  # what other tests have left would be looked through at every restart
    try:
        with counted_splits(seen):
            for again in itertools.count():  # hypothesis gives up on some examples on the way
                run_state_machine_as_test(seed(1000 * SEED + again)(machine), settings=how)
                rare = floors - seen
                if machine.operations >= (6 * share if rare else share):
                    break
                if machine.operations >= share:
                    how = settings(how, max_examples=4)  # the first is always the simplest one
    finally:
        gc.unfreeze()
    assert not rare, f"{dict(rare)} too few in {machine.operations} operations"


if __name__ == "__main__":
    operate(sys.argv[1], int(sys.argv[2]))
