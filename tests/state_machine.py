"""Both tiers under ten thousand operations in any order, checked after each: structure, bytes, replies.

Run by its name, `pytest -n0 tests/state_machine.py`; it takes minutes and is not among the tests that
run by themselves until it has been through once.
"""

import functools
import gc
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import tiny
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from mlx_lm.models import qwen3_5
from test_outline import seen, there

from mlx_hybridcache import BudgetError
from mlx_hybridcache.disk.catalogue import FileRows, FileState
from mlx_hybridcache.errors import NotStoredError, PinnedError
from mlx_hybridcache.store import Store

OPERATIONS = 10_000
STEPS = 100
"""Operations on one directory; each example begins with an empty one."""

MEMORY_BUDGET = 4_000_000
DISK_BUDGET = 4_000_000
"""Bytes: room for a dozen of the hundred prompts that may be asked for."""

UNREPORTED = MEMORY_BUDGET // 100
"""Bytes that MLX may hold beyond or short of what is reported: 1 % of the budget."""

SALTS = ("", "other")


@functools.cache
def model() -> nn.Module:
    """One gated-delta layer under one of attention, quick on the CPU: a checkpoint weighs 36 KiB, as
    much as 72 tokens' rows, and either is large beside what MLX rounds an array up to.
    """
    mx.random.seed(tiny.SEED)
    text = {
        "model_type": "qwen3_5_text",
        **tiny.COMMON,
        **tiny.GATED_DELTA,
        "num_hidden_layers": 2,
        "full_attention_interval": 2,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "head_dim": 32,
    }
    made = qwen3_5.Model(qwen3_5.ModelArgs(model_type="qwen3_5", text_config=text))
    made.eval()
    mx.eval(made.parameters())
    return made


def prompt(family: int, length: int, fork: tuple[int, int] | None) -> tuple[int, ...]:
    """Tokens of one of a few families; a fork `(at, variant)` leaves the family's own text there."""
    tokens = oracle.prompt(600, seed=family, openers=[40, 90])
    if fork is not None:
        at, variant = fork
        tokens = [*tokens[:at], *oracle.prompt(600 - at, seed=100 + 10 * at + variant)]
    return tuple(tokens[:length])


forks = st.none() | st.tuples(st.sampled_from([30, 64, 101, 128, 150, 200]), st.integers(0, 2))
prompts = st.builds(
    prompt, st.integers(0, 2), st.sampled_from([64, 65, 80, 100, 128, 129, 160, 200, 257]), forks
)
salts = st.sampled_from(SALTS)
places = st.integers(0, 1000)


def logits(caches: list[Any], rest: Sequence[int]) -> np.ndarray:
    """Logits `(3, VOCAB)` of reading `rest` and of two greedy tokens behind it."""
    feed, steps = list(rest), []
    for _ in range(3):
        found = model()(mx.array([feed]), cache=caches)[:, -1]
        mx.eval(found, [cache.state for cache in caches])
        steps.append(np.array(found[0]))
        feed = [int(found.argmax().item())]
    return np.stack(steps)


@functools.cache
def cold(tokens: tuple[int, ...]) -> np.ndarray:
    return logits(tiny.cold_caches(model(), tokens[:-1], oracle.STEP), tokens[-1:])


class CacheMachine(RuleBasedStateMachine):
    """One cache in one directory; what it holds is looked into on its own worker thread."""

    operations: ClassVar[int] = 0
    seen: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.is_new = True
        shared = Path("/dev/shm")  # writing is flushed to the medium, so let it be a quick one
        self.root = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
        self.asked: list[tuple[tuple[int, ...], str]] = []
        self.open()

    def open(self) -> None:
        gc.collect()
        mx.clear_cache()
        self.held: list[Any] = []
        self.damaged = False
        self.go_on = threading.Event()
        self.go_on.set()
        self.over: list[int] = []
        self.on_disk: list[int] = []
        self.cache = oracle.new_cache(
            model(),
            tokenizer=oracle.word_tokenizer(),
            memory_budget=MEMORY_BUDGET,
            disk_budget=DISK_BUDGET,
            cache_dir=self.root / "cache",
        )
        gc.collect()
        mx.clear_cache()
        self.baseline = mx.get_active_memory()

    def teardown(self) -> None:
        self.held.clear()
        self.go_on.set()
        self.count_evictions()
        self.cache.close(0)
        shutil.rmtree(self.root)

    # What can happen

    @rule(tokens=prompts, salt=salts)
    def read(self, tokens: tuple[int, ...], salt: str) -> None:
        self.prefill(tokens, salt).release()

    @rule(tokens=prompts, salt=salts, count=st.integers(1, 6))
    def generate(self, tokens: tuple[int, ...], salt: str, count: int) -> None:
        self.ask(tokens, salt)
        stream = self.cache.stream_generate(
            tokens, count, cache_salt=salt, prompt_progress_callback=self.sample
        )
        for _ in stream:
            pass
        self.count(stream.report.tier)

    @rule(tokens=prompts, salt=salts)
    def answer(self, tokens: tuple[int, ...], salt: str) -> None:
        self.compare(tokens, salt)

    @rule(tokens=prompts, salt=salts)
    def restore(self, tokens: tuple[int, ...], salt: str) -> None:
        self.ask(tokens, salt)
        self.cache.restore(tokens, max_tokens=8, cache_salt=salt).release()

    @rule(tokens=prompts, salt=salts)
    def look_up(self, tokens: tuple[int, ...], salt: str) -> None:
        before = self.shape()
        found = self.cache.lookup(tokens, cache_salt=salt)
        assert self.shape() == before
        assert 0 <= found.restored_tokens < len(tokens)

    @rule(tokens=prompts, salt=salts)
    def save_own(self, tokens: tuple[int, ...], salt: str) -> None:
        caches = tiny.cold_caches(model(), tokens[:80], oracle.STEP)
        self.try_to(lambda: self.cache.save(tokens[:80], caches, cache_salt=salt))

    @rule(which=places)
    def pin(self, which: int) -> None:
        if self.asked:
            tokens, salt = self.asked[which % len(self.asked)]
            self.try_to(lambda: self.cache.pin(tokens, cache_salt=salt))

    @rule(which=places)
    def unpin(self, which: int) -> None:
        if self.asked:
            tokens, salt = self.asked[which % len(self.asked)]
            self.try_to(lambda: self.cache.unpin(tokens, cache_salt=salt))

    @rule(which=places)
    def drop(self, which: int) -> None:
        if self.asked:
            tokens, salt = self.asked[which % len(self.asked)]
            with suppress(NotStoredError, PinnedError):
                start = self.cache.drop(tokens, cache_salt=salt)
                found = self.cache.lookup(tokens, cache_salt=salt)
                assert found.restored_tokens <= start

    @rule(tokens=prompts, salt=salts, turns=st.integers(0, 4))
    def cancel(self, tokens: tuple[int, ...], salt: str, turns: int) -> None:
        """Close a stream after so many progress callbacks, or before any."""
        self.ask(tokens, salt)
        left = [turns]

        def stop(read: int, total: int) -> None:
            self.sample(read, total)
            left[0] -= 1
            if left[0] == 0:
                stream.cancel()

        began = threading.Event()
        self.cache._worker.post(lambda: began.wait(60) and None)
        stream = self.cache.stream_generate(
            tokens, 4, cache_salt=salt, prompt_progress_callback=stop
        )
        began.set()
        if turns == 0:
            stream.close()
        for _ in stream:
            pass

    @rule(tokens=prompts, salt=salts)
    def hold(self, tokens: tuple[int, ...], salt: str) -> None:
        """A caller keeps its caches for a while."""
        if len(self.held) < 2:
            self.held.append(self.prefill(tokens, salt))

    @rule()
    def let_go(self) -> None:
        self.held.clear()

    @rule(length=st.sampled_from([1000, 2000, 4000]))
    def crowd(self, length: int) -> None:
        """A large request takes the room of much of what is stored."""
        tokens = oracle.prompt(20, seed=length)
        self.try_to(lambda: self.cache.restore(tokens, max_tokens=length).release())

    @rule()
    def stall(self) -> None:
        """The disk stands still until something must be read from it."""
        if self.go_on.is_set():
            self.go_on.clear()
            self.cache.engine.disk.thread.change(lambda directory: self.go_on.wait())

    @rule()
    def flush(self) -> None:
        self.go_on.set()
        assert self.cache.flush(30)

    @rule(which=places, how=st.sampled_from(["flip", "truncate", "delete", "index"]))
    def damage(self, which: int, how: str) -> None:
        self.until_idle()
        files = sorted(self.root.rglob("*.safetensors"))
        if how == "index":
            (self.root / "cache" / "index.sqlite").unlink(missing_ok=True)
        elif files:
            path = files[which % len(files)]
            self.damaged = True
            if how == "delete" or not path.stat().st_size:
                path.unlink()
            else:
                data = bytearray(path.read_bytes())
                at = which * 7919 % len(data)
                data[at] ^= 1 << which % 8
                path.write_bytes(data[:at] if how == "truncate" else data)

    @rule(how=st.sampled_from(["at once", "written", "dropped"]))
    def restart(self, how: str) -> None:
        self.go_on.set()
        self.check_samples()
        self.count_evictions()
        self.held.clear()
        if how != "dropped":
            self.cache.close(5 if how == "written" else 0)
        del self.cache
        self.open()

    @rule(really=st.integers(0, 3))
    def clear(self, really: int) -> None:
        if really == 3:
            self.cache.clear()
            assert self.cache.stats().nodes == 0
            for tokens, salt in self.asked[-3:]:
                assert self.cache.lookup(tokens, cache_salt=salt).restored_tokens == 0

    # What holds after each

    @invariant()
    def holds(self) -> None:
        CacheMachine.operations += not self.is_new  # it is asked before the first one too
        self.is_new = False
        if self.go_on.is_set():
            self.until_idle()
            if CacheMachine.operations % 5 == 0:
                self.check_idle()
        self.cache._worker.call(self.check)
        self.check_samples()
        self.cache.engine.disk.thread.change(self.weigh)
        if CacheMachine.operations % 100 == 0 and self.asked:
            chosen = random.Random(CacheMachine.operations).choice(self.asked)
            self.compare(*chosen)
            self.cache._worker.call(self.check)

    def check(self) -> None:
        """On the worker thread."""
        engine = self.cache.engine
        store, disk = engine.store, engine.disk
        check_tree(store, self.check_rows)
        dead = [n for n in store.nodes() if not n.children and n.checkpoint is None]
        assert len(dead) <= 1, [(node.start, node.end, node.pinned, node.is_end) for node in dead]
        assert store.used_bytes() <= store.budget_bytes == MEMORY_BUDGET
        if not self.held:
            assert store.running_bytes == 0
        if not disk._in_flight:
            assert store.lingering_bytes == 0
        off = mx.get_active_memory() - self.baseline - store.used_bytes()
        ahead = sum(engine.layout.snapshot_bytes for ready in self.held if ready.position == 0)
        assert -UNREPORTED - ahead <= off <= UNREPORTED, f"{off:,} bytes off"
        self.check_catalogue()
        for tier in (store, disk.catalogue.store):
            outlined = {name: seen(one) for name, one in tier.outlines(None).items()}
            trees = {name: each for name, each in tier._trees.items() if each.root.children}
            assert outlined == {name: there(each.root) for name, each in trees.items()}

    def check_rows(self, node: Any) -> None:
        for block in node.rows:
            for array in (array for arrays in block.layers for array in arrays):
                assert array.shape[2] == block.end - block.start
        if node.checkpoint is not None:
            assert node.checkpoint.position == node.end

    def check_catalogue(self) -> None:
        disk = self.cache.engine.disk
        store, used = disk.catalogue.store, disk.catalogue._files.used
        check_tree(store, lambda node: None)
        parts: dict[str, int] = {}
        files = {segment.name: segment.file_nbytes for segment in disk.catalogue.segments()}
        for node in store.nodes():
            for part in (*node.rows, node.checkpoint):
                if isinstance(part, FileRows | FileState):
                    assert part.nbytes > 0
                    parts[part.segment.name] = parts.get(part.segment.name, 0) + part.nbytes
        assert parts == used
        assert store.lingering_bytes == sum(files.values()) - sum(used.values())
        writing = sum(segment.file_nbytes for segment, _ in disk._in_flight.values())
        assert store.running_bytes == writing
        assert store.used_bytes() <= store.budget_bytes == DISK_BUDGET

    def check_idle(self) -> None:
        """Nothing is being written or deleted any more: files are what the catalogue says."""
        stats = self.cache.disk_stats()
        assert stats.queued_bytes == 0
        assert self.cache.stats().lingering_bytes == 0
        if not self.damaged:
            segments = self.cache._worker.call(self.cache.engine.disk.catalogue.segments)
            found = {
                f"{path.parent.name}/{path.name}": path.stat().st_size
                for path in self.root.rglob("*.safetensors*")
            }
            needed = {each.name: each.file_nbytes for each in segments}
            assert found == needed, found.items() ^ needed.items()
            assert sum(found.values()) == stats.held_bytes <= DISK_BUDGET

    def check_samples(self) -> None:
        """What was met on the way, between two slices and between two files."""
        assert not self.over, f"{max(self.over):,} bytes were held"
        assert all(nbytes <= DISK_BUDGET for nbytes in self.on_disk)
        self.on_disk.clear()

    # How it is done

    def sample(self, read: int, total: int) -> None:
        held = self.cache.engine.store.used_bytes()
        if held > MEMORY_BUDGET:
            self.over.append(held)

    def weigh(self, directory: Any) -> None:
        files = self.root.rglob("*.safetensors*")
        self.on_disk.append(sum(path.stat().st_size for path in files))

    def ask(self, tokens: tuple[int, ...], salt: str) -> None:
        """A request is coming, which would wait for ever for files that cannot be read."""
        self.asked.append((tokens, salt))
        if self.cache.lookup(tokens, cache_salt=salt).tier == "disk":
            self.go_on.set()

    def prefill(self, tokens: tuple[int, ...], salt: str) -> Any:
        self.ask(tokens, salt)
        ready = self.cache.prefill(
            tokens, max_tokens=8, cache_salt=salt, prompt_progress_callback=self.sample
        )
        self.count(ready.report.tier)
        return ready

    def compare(self, tokens: tuple[int, ...], salt: str) -> None:
        ready = self.prefill(tokens, salt)
        hot = logits(ready.prompt_cache, ready.rest)
        ready.release()
        assert oracle.agree(hot, cold(tokens))

    def try_to(self, do: Callable[[], object]) -> None:
        try:
            do()
        except (BudgetError, NotStoredError) as error:
            self.count(type(error).__name__)

    def count(self, what: str, times: int = 1) -> None:
        CacheMachine.seen[what] = CacheMachine.seen.get(what, 0) + times

    def count_evictions(self) -> None:
        engine = self.cache.engine
        self.count("evicted", self.cache.stats().evictions)
        self.count("files evicted", engine.disk.catalogue.store.stats().evictions)
        self.count("rejected", self.cache.disk_stats().rejected)

    def until_idle(self) -> None:
        """Wait without `flush`, which looks every ten milliseconds only."""
        self.go_on.set()
        disk = self.cache.engine.disk
        is_writing = was_writing = True
        while is_writing or was_writing:  # once more: what was written last may have made room
            done = threading.Event()
            disk.thread.change(lambda directory, done=done: done.set())
            assert done.wait(60)
            was_writing, is_writing = is_writing, self.cache._worker.call(disk.is_writing)

    def shape(self) -> list[Any]:
        engine = self.cache.engine

        def look() -> list[Any]:
            return [
                (node.start, node.end, node.checkpoint is not None, node.last_used, node.pinned)
                for node in engine.store.nodes()
            ]

        return self.cache._worker.call(look)


def check_tree(store: Store, check_payload: Callable[[Any], None]) -> None:
    """Runs adjoin, rows cover exactly their run, and the sums are those of the nodes."""
    rows_bytes = snapshot_bytes = 0
    for tree in store._trees.values():
        for node in tree.nodes():
            assert len(node.tokens) > 0
            assert node.parent.children[int(node.tokens[0])] is node
            assert node.start == node.parent.end
            bounds = [node.start, *(rows.end for rows in node.rows)]
            assert [rows.start for rows in node.rows] == bounds[:-1]
            assert bounds[-1] == node.end
            assert not node.pinned or node.checkpoint is not None
            check_payload(node)
            rows_bytes += node.rows_nbytes
            snapshot_bytes += node.checkpoint.nbytes if node.checkpoint is not None else 0
    assert (rows_bytes, snapshot_bytes) == (store.rows_bytes, store.snapshot_bytes)


def test_ten_thousand_operations_in_any_order() -> None:
    """Prompts of three families under two salts, replies, pins, cancelled streams, full budgets,
    damaged files, restarts: nothing is ever out of its bounds, and no reply differs from cold.
    """
    CacheMachine.operations, CacheMachine.seen = 0, {}
    how = settings(
        max_examples=OPERATIONS // STEPS + 10,
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    gc.freeze()  # what other tests have left would be looked through at every restart
    try:
        run_state_machine_as_test(CacheMachine, settings=how)  # type: ignore[no-untyped-call]
    finally:
        gc.unfreeze()
    assert CacheMachine.operations >= OPERATIONS
    for what in ("none", "memory", "disk", "evicted", "files evicted"):
        assert CacheMachine.seen.get(what, 0) > 100, what
    assert CacheMachine.seen.get("rejected", 0) > 10
