"""A promotion, from a request to caches that stand at its end, beside a plain read of the same files.

The plain read is done three ways, each paired with promotions of its own: into new memory, as the
caches need it; into one buffer again and again, which no cache could be; and into new memory when the
system's page cache has been told to forget the files.
"""

from __future__ import annotations

import random
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache
from rich.console import Console

from mlx_hybridcache import CacheReport, Generation, HybridPromptCache, Ready, models
from mlx_hybridcache.demo import BUNDLED_MODEL

from ..kit.paired import Paired, measure, tidy
from ..kit.standin import SHAPES, VOCABULARY, StandIn
from ..kit.tables import Figure, show
from ..kit.text import prompt_of
from .files import can_be_forgotten, forget, header_of, read_into

MIB = 1024**2
TARGET_READ = 2.0
FLUSH_SECONDS = 300.0
MODEL, STAND_IN = "the model", "stand-in"

REPLY_TOKENS = 256
"""The caches have room for so many tokens behind the prompt."""

NEW, AGAIN, FORGOTTEN = "new memory", "one buffer again", "not in the page cache"


@dataclass(frozen=True, slots=True)
class Promotion:
    """One prompt. `reads` has a plain read (`a`) beside the promotion (`b`) for each way to read.

    `file_bytes` are those of the files that were read, `needed_bytes` those of the rows and the
    checkpoint that the caches got; `wrong` counts promotions that came from elsewhere, stood
    elsewhere or held other bytes than memory gives.
    """

    name: str
    tokens: int
    files: int
    file_bytes: int
    needed_bytes: int
    wrong: int
    peak_bytes: int
    reads: dict[str, Paired]

    @property
    def title(self) -> str:
        return f"{self.name}, {self.tokens:,} tokens"


@dataclass(frozen=True, slots=True)
class Promotions:
    """All prompts."""

    each: tuple[Promotion, ...]

    def figures(self) -> list[Figure]:
        """The promised ones."""
        wrong = sum(promotion.wrong for promotion in self.each)
        found = [Figure("promotions that are wrong", wrong, "", 0, True)]
        for promotion in self.each:
            for way, paired in promotion.reads.items():
                if way != AGAIN:
                    title = f"promotion / plain read\n  {promotion.title}, {way}"
                    found.append(Figure(title, paired.ratio, "x", TARGET_READ, False))
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"promotions": [_plain(promotion) for promotion in self.each]}

    def show(self, console: Console) -> None:
        """Print it."""
        rows = []
        for promotion in self.each:
            for way, paired in promotion.reads.items():
                rows.append(
                    (
                        f"{promotion.title}\n  {way}",
                        str(promotion.files),
                        f"{promotion.file_bytes / MIB:.0f}",
                        f"{1000 * paired.a_seconds:.0f}",
                        f"{1000 * paired.b_seconds:.0f}",
                        f"{paired.ratio:.2f}",
                        f"{min(paired.ratios):.1f}-{max(paired.ratios):.1f}",
                        f"{paired.cpu_ratio:.2f}",
                    )
                )
        show(
            console,
            f"Promotion beside a plain read, {len(paired.a)} pairs",
            (
                "",
                "files",
                "MiB",
                "read\nms",
                "promotion\nms",
                "ratio",
                "of pairs",
                "processor\ntime",
            ),
            rows,
        )
        for promotion in self.each:
            console.print(
                f"{promotion.title}: {promotion.file_bytes / promotion.needed_bytes:.3f} bytes read "
                f"per byte needed; memory peaks at "
                f"{promotion.peak_bytes / promotion.needed_bytes:.2f} x them",
                highlight=False,
            )


def _plain(promotion: Promotion) -> dict[str, Any]:
    plain = {name: getattr(promotion, name) for name in promotion.__dataclass_fields__}
    return {**plain, "reads": {way: each.as_json() for way, each in promotion.reads.items()}}


def measure_bundled(model: Any, tokenizer: Any, tokens: int, *, pairs: int) -> Promotion:
    """With a real model and real text."""
    return _measured(MODEL, model, tokenizer, prompt_of(tokenizer, tokens + 1), pairs)


def measure_stand_in(shapes: str, tokens: int, *, pairs: int, seed: int = 1162) -> Promotion:
    """With the caches of a large model: here bytes count, not files."""
    generator = random.Random(seed)
    prompt = [generator.randrange(VOCABULARY) for _ in range(tokens + 1)]
    _, tokenizer = models.load(str(BUNDLED_MODEL))  # any one: nothing of the reply is looked at
    return _measured(f"{STAND_IN} {shapes}", StandIn(SHAPES[shapes]), tokenizer, prompt, pairs)


def _measured(name: str, model: Any, tokenizer: Any, prompt: list[int], pairs: int) -> Promotion:
    with tempfile.TemporaryDirectory() as directory:
        with _opened(model, tokenizer, directory) as cache:
            cache.prefill(prompt).release()
            assert cache.flush(FLUSH_SECONDS), "the disk is too slow for this measurement"
            ready = cache.restore(prompt, max_tokens=REPLY_TOKENS)
            expected = _bytes_of(ready.prompt_cache, ready.position)
            ready.release()
        tidy()
        bench = _Bench(model, tokenizer, prompt, directory, expected, len(prompt) - 1)
        try:
            return bench.run(name, pairs)
        finally:
            bench.close()
            tidy()


def _opened(model: Any, tokenizer: Any, directory: str) -> HybridPromptCache:
    return HybridPromptCache(model, tokenizer, memory_budget="1TiB", cache_dir=directory)


@dataclass(eq=False)
class _Bench:
    model: Any
    tokenizer: Any
    prompt: list[int]
    directory: str
    expected: list[bytes]
    position: int
    wrong: int = 0
    _cache: HybridPromptCache | None = field(default=None, init=False)
    _stream: Generation[Any] | None = field(default=None, init=False)
    _go_on: threading.Event = field(default_factory=threading.Event, init=False)

    def run(self, name: str, pairs: int) -> Promotion:
        self.open_anew()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        ready = self.promoted()
        peak = mx.get_peak_memory() - before
        self.check(ready)
        read_bytes, files = self.read_bytes(), self.files()
        assert sum(path.stat().st_size for path in files) == read_bytes, "these are other files"
        ready.release()
        del ready
        needed = sum(len(each) for each in self.expected)

        room = memoryview(bytearray(max(path.stat().st_size for path in files)))
        ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            NEW: (lambda: [path.read_bytes() for path in files], lambda: None),
            AGAIN: (lambda: [read_into(room, path) for path in files], lambda: None),
        }
        if can_be_forgotten(files):
            ways[FORGOTTEN] = (ways[NEW][0], lambda: forget(files))
        reads = {
            way: self.measured(read, before_each, pairs)
            for way, (read, before_each) in ways.items()
        }
        return Promotion(
            name=name,
            tokens=self.position,
            files=len(files),
            file_bytes=read_bytes,
            needed_bytes=needed,
            wrong=self.wrong,
            peak_bytes=peak,
            reads=reads,
        )

    def measured(
        self, read: Callable[[], object], before_each: Callable[[], object], pairs: int
    ) -> Paired:
        def prepare_read() -> None:
            self.close()
            tidy()
            before_each()

        def prepare_promotion() -> None:
            self.open_anew()
            before_each()

        return measure(
            read, self.begin, pairs=pairs, prepare_a=prepare_read, prepare_b=prepare_promotion
        )

    def begin(self) -> None:
        """From a request to the moment when its caches stand, as every request of a server goes.

        There the request waits: if it went on computing, this thread would wait for the interpreter.
        """
        assert self._cache is not None
        is_ready, self._go_on = threading.Event(), threading.Event()

        def stands(read: int, total: int, go_on: threading.Event = self._go_on) -> None:
            is_ready.set()
            go_on.wait(FLUSH_SECONDS)

        self._stream = self._cache.stream_generate(
            self.prompt, REPLY_TOKENS, prompt_progress_callback=stands
        )
        assert is_ready.wait(FLUSH_SECONDS)

    def end(self) -> None:
        """Leave what was begun, and count it if it did not come from files."""
        stream, self._stream = self._stream, None
        self._go_on.set()
        if stream is not None:
            stream.close()
            report = stream.report
            self.wrong += report is None or self.is_wrong(report)

    def open_anew(self) -> None:
        """A cache with nothing in memory."""
        self.close()
        tidy()
        self._cache = _opened(self.model, self.tokenizer, self.directory)

    def close(self) -> None:
        self.end()
        cache, self._cache = self._cache, None
        if cache is not None:
            cache.close()

    def promoted(self) -> Ready:
        assert self._cache is not None
        return self._cache.restore(self.prompt, max_tokens=REPLY_TOKENS)

    def read_bytes(self) -> int:
        assert self._cache is not None
        stats = self._cache.disk_stats()
        assert stats is not None
        return stats.read_bytes

    def files(self) -> list[Path]:
        """What a promotion reads: all rows, and the checkpoint that stands at the end."""
        every = sorted(Path(self.directory).rglob("*.safetensors"))
        rows = [path for path in every if path.name.endswith(".rows.safetensors")]
        return rows + [path for path in every if f'"start":"{self.position}"' in header_of(path)]

    def check(self, ready: Ready) -> None:
        """Count it if it is not what memory gives."""
        self.wrong += (
            self.is_wrong(ready.report)
            or _bytes_of(ready.prompt_cache, self.position) != self.expected
        )

    def is_wrong(self, report: CacheReport) -> bool:
        return report.tier != "disk" or report.restored_tokens != self.position


def _bytes_of(caches: list[Any], position: int) -> list[bytes]:
    """Every array of the caches, rows as far as they are filled."""
    arrays = []
    for layer in caches:
        if isinstance(layer, KVCache):
            rows: Any = layer
            arrays += [x[:, :, :position] for x in (rows.keys, rows.values)]
        else:
            flat: Any = tree_flatten(layer.state)
            arrays += [leaf for _, leaf in flat if isinstance(leaf, mx.array)]
    return [bytes(memoryview(mx.contiguous(x).view(mx.uint8))) for x in arrays]  # type: ignore[arg-type]
