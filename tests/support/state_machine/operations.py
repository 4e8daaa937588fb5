"""What can happen to a cache: requests, saves, pins, lost patience, damage, restarts."""

from __future__ import annotations

import resource
import shutil
import threading
from contextlib import suppress

import mlx.core as mx
import oracle
import tiny
from hypothesis import strategies as st
from hypothesis.stateful import rule

from mlx_hybridcache.decode.sampling import LogitsProcessor
from mlx_hybridcache.errors import NotStoredError, PinnedError
from state_machine import bounds, cases
from state_machine.under_test import BUDGET, UNREPORTED, WRITTEN, CacheUnderTest, release

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
turns = st.none() | st.integers(1, WRITTEN - 1)
places = st.integers(0, 1000)


def turned(at: int) -> LogitsProcessor:
    """Behind so many tokens, prompt and reply, the unlikeliest ones are the likeliest."""
    return lambda tokens, logits: -logits if tokens.size == at else logits


class CacheMachine(CacheUnderTest):
    """Each rule is one operation; hypothesis draws their order and their arguments."""

    @rule(tokens=prompts, salt=salts)
    def read(self, tokens: tuple[int, ...], salt: str) -> None:
        self.attempt(lambda: release(self.prefill(tokens, salt)))

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

    @rule(tokens=prompts, salt=salts, turn=turns)
    def generate_with_drafts(self, tokens: tuple[int, ...], salt: str, turn: int | None) -> None:
        """A reply is written again, behind itself or behind one that is the same up to a `turn`."""

        def answer() -> None:
            expected = self.written(tokens, salt)
            if turn is not None:
                self.written(tokens, salt, logits_processors=[turned(len(tokens) + turn)])
            assert self.written(tokens, salt, draft_from_cache=True) == expected

        if self.case.drafts:
            self.attempt(answer)

    @rule(tokens=prompts, salt=salts, both=st.booleans())
    def generate_with_a_draft_model(self, tokens: tuple[int, ...], salt: str, both: bool) -> None:
        """It resumes, reads and stores as the model does, and what it drafts changes nothing."""

        def answer() -> None:
            expected, draft = self.written(tokens, salt), self.case.draft()
            self.go_on.set()  # the draft model's own prompt may lie in files alone
            options = {"draft_model": draft, "num_draft_tokens": 8, "draft_from_cache": both}
            assert self.written(tokens, salt, **options) == expected

        if self.case.drafts:
            self.attempt(answer)

    @rule(tokens=prompts, salt=salts, both=st.booleans())
    def generate_with_a_head(self, tokens: tuple[int, ...], salt: str, both: bool) -> None:
        """It goes on from what is stored of it, or where its caches do, and what it drafts changes nothing."""

        def answer() -> None:
            self.go_on.set()  # the head's rows may lie in files alone
            options = {"draft_mtp": self.case.head, "num_draft_tokens": 8, "draft_from_cache": both}
            found = self.written(tokens, salt, **options)
            assert self.written(tokens, salt) == found
            assert self.written(tokens, salt, **options) == found

        if self.case.head is not None:
            self.attempt(answer)

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
            self.attempt(lambda: release(self.cache.restore(tokens, max_tokens=8, cache_salt=salt)))
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
            lambda: release(self.cache.restore(tokens, max_tokens=length)), may=need > BUDGET
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
