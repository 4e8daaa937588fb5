"""What the cache makes of one family, held against plain mlx-lm: every way that a prompt comes back."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import tiny

from matrix import shapes
from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.verify import MARGIN

STEP = 32
SETTINGS: dict[str, Any] = {
    "memory_budget": "200MB",
    "memory_reserve": 0,
    "prefill_step_size": STEP,
    "checkpoint_every": STEP,
    "checkpoint_min_step": 16,
}
TEXT = oracle.prompt(140, seed=3, openers=[40])
MORE = oracle.prompt(40, seed=5)
OTHER = oracle.prompt(60, seed=6)
REPLY = 6
AT_ONCE = 20
"""Tokens of replies that decode together: the first of five is still there when the last one joins."""

JOURNEYS: dict[str, list[int]] = {
    "cold": TEXT,
    "repeat": TEXT,
    "changed ending": [*TEXT[:110], *OTHER[:25]],
    "extension": [*TEXT, *MORE],
    "branch": [*TEXT[:66], *OTHER],
    "the branch again": [*TEXT[:66], *OTHER[:40], *MORE[:9]],
    "shorter": TEXT[:100],
}
"""Prompts in the order in which one cache reads them. All are longer than three windows."""

FIRST_BRANCHES = {"changed ending": 110, "branch": 66}
"""Where those part ways with what was read before for the first time."""


@dataclass
class Record:
    """What is known of one family. Differences are the largest of a logit.

    `slicing` is what mlx-lm itself makes of the same prompt in other slices, `decoding` of a reply that is
    read one token at a time; `found` and `replied` are what the cache makes of prompts and of the turn
    behind a reply. `batched` is "yes" or why not.
    """

    family: str
    layers: list[str] = field(default_factory=list)
    alignment: int = 1
    restores: str = ""
    slicing_limit: int | None = None
    slicing: float = 0.0
    decoding: float = 0.0
    found: float = 0.0
    replied: float = 0.0
    batched: str = ""
    batch_difference: float = 0.0
    dtypes: dict[str, str] = field(default_factory=dict)
    refused: str = ""

    def told(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


class NotAsColdError(AssertionError):
    """Something that the cache served differs from mlx-lm by more than mlx-lm from itself."""


class Family:
    """One model, what mlx-lm says to each prompt, and how far that depends on slices."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._known: dict[tuple[int, ...], np.ndarray[Any, Any]] = {}

    def cold(self, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
        """Logits `(vocabulary,)` behind `tokens` from plain caches, in slices of the step."""
        key = tuple(tokens)
        if key not in self._known:
            self._known[key] = _numbers(tiny.cold_logits(self.model, tokens, STEP))
        return self._known[key]

    def slicing(self) -> float:
        """The most that other slices change in mlx-lm itself, of two of the prompts."""
        return max(
            apart(_numbers(tiny.cold_logits(self.model, tokens, size)), self.cold(tokens))
            for tokens in (TEXT, JOURNEYS["branch"])
            for size in (7, 16, 37)
        )

    def decoding(self, history: Sequence[int], tail: Sequence[int]) -> float:
        """The most that it changes when mlx-lm reads the end of `history` token by token."""
        caches = tiny.cold_caches(self.model, TEXT[:-1], STEP)
        for token in history[len(TEXT) - 1 :]:
            tiny.next_logits(self.model, caches, token)
        read_on(self.model, caches, tail[:-1])
        found = _numbers(tiny.next_logits(self.model, caches, tail[-1]))
        return apart(found, self.cold([*history, *tail]))


def _numbers(logits: mx.array) -> np.ndarray[Any, Any]:
    return np.array(logits.astype(mx.float32))


def apart(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """The largest difference; tokens that a model rules out, whose logits are -inf, do not differ."""
    ruled_out = np.isneginf(one) & np.isneginf(other)
    return oracle.distance(np.where(ruled_out, 0, one), np.where(ruled_out, 0, other))


def read_on(model: nn.Module, caches: list[Any], tokens: Sequence[int]) -> None:
    """Let plain caches read `tokens` in one slice."""
    if tokens:
        model(mx.array([list(tokens)]), cache=caches)
        mx.eval([cache.state for cache in caches])


def served(cache: HybridPromptCache, family: Family, tokens: Sequence[int]) -> tuple[float, Any]:
    """How far the logits of a prompt that the cache reads are from cold, and its report."""
    ready = cache.prefill(tokens)
    found = _numbers(tiny.next_logits(family.model, list(ready.prompt_cache), tokens[-1]))
    ready.release()
    return apart(found, family.cold(tokens)), ready.report


def answering(cache: HybridPromptCache, tokens: Sequence[int], count: int) -> Iterator[Any]:
    """A greedy reply of `count` tokens."""
    return cache.stream_generate(tokens, count, sampler=oracle.never_ending, seed=0)


@contextmanager
def objections() -> Iterator[list[str]]:
    """What the library's log says meanwhile."""
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    log, listener = logging.getLogger("mlx_hybridcache"), Listener()
    before = log.level
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    try:
        yield told
    finally:
        log.removeHandler(listener)
        log.setLevel(before)


def examine(name: str, folder: Path, dtypes: Sequence[str] = ()) -> Record:
    """Run every journey of one family, and of its `dtypes` ("bfloat16", "4 bits"), and say what came of it."""
    record = Record(name)
    family = _model_of(name, record)
    if family is None:
        return record
    _alone(family, record, folder)
    if not record.refused:
        _exactly(family)
        if record.batched == "yes":
            _together(family, record)
        for dtype in dtypes:
            record.dtypes[dtype] = _in_dtype(name, dtype)
    return record


def _model_of(name: str, record: Record) -> Family | None:
    """The family, unless mlx-lm itself cannot run its model here."""
    try:
        family = Family(shapes.build(name))
        family.cold(TEXT)
    except (RuntimeError, ValueError, TypeError) as error:
        record.refused = f"mlx-lm cannot run it here: {str(error).splitlines()[0]}"
        return None
    return family


def _alone(family: Family, record: Record, folder: Path) -> None:
    """One request after the other, in two processes' worth of caches over one directory."""
    record.slicing = family.slicing()
    with objections() as told, _opened(family, cache_dir=folder) as cache:
        layout = cache.engine.layout
        if layout.unsupported:
            record.refused = f"served without the cache: no kind of layer here is a {', '.join(layout.unsupported)}"
            return
        _describe(record, layout)
        record.batched = "yes" if cache.engine.decoder.batches else _why_not(told)
        record.found = max(_journey(cache, family, name) for name in JOURNEYS)
        reply = [each.token for each in answering(cache, TEXT, REPLY)]
        history = [*TEXT, *reply]
        record.decoding = family.decoding(history, MORE[:9])
        record.replied, _ = served(cache, family, [*history, *MORE[:9]])
    with _opened(family, cache_dir=folder) as cache:
        off, report = served(cache, family, [*TEXT, *MORE[:20]])
        if report.tier != "disk" or cache.disk_stats().rejected:
            raise NotAsColdError(f"after a restart: {report}")
        record.found = max(record.found, off)
    _within(record)


def _opened(family: Family, **settings: Any) -> HybridPromptCache:
    return HybridPromptCache(family.model, oracle.word_tokenizer(), **SETTINGS, **settings)


def _why_not(told: Sequence[str]) -> str:
    """What the log says of batches, without its figures."""
    said = "Replies are decoded one by one: "
    (why,) = [each.removeprefix(said) for each in told if each.startswith(said)]
    return re.sub(" by up to [^ ]+", "", why.rstrip("."))


def _describe(record: Record, layout: Any) -> None:
    kinds = [type(kind).__name__.removesuffix("Kind").lower() for kind in layout.kinds]
    record.layers = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
    record.alignment = layout.alignment
    record.restores = "checkpoints" if layout.needs_snapshots else "any token"
    record.slicing_limit = layout.slicing_limit


def _journey(cache: HybridPromptCache, family: Family, name: str) -> float:
    off, report = served(cache, family, JOURNEYS[name])
    # Grid cuts stand at whole blocks, so a prompt's first branch below one finds its other cuts at most.
    below = cache.engine.layout.alignment > FIRST_BRANCHES.get(name, len(TEXT) * 2)
    if name != "cold" and not report.restored_tokens and not below:
        raise NotAsColdError(f"{name}: nothing was restored, {report}")
    return off


def allowed(own: float, limit: int | None) -> float:
    """What a restore may change: nothing where slices change nothing, or where they are kept for that."""
    assert np.isfinite(own)
    return 0.0 if limit is not None else own * MARGIN


def _within(record: Record) -> None:
    most = allowed(record.slicing, record.slicing_limit)
    if record.found > most:
        raise NotAsColdError(
            f"prompts differ by {record.found:.3g}, and mlx-lm from itself by {record.slicing:.3g}"
        )
    most = allowed(max(record.slicing, record.decoding), record.slicing_limit)
    if record.replied > most:
        raise NotAsColdError(
            f"behind a reply: {record.replied:.3g}, and mlx-lm itself {record.decoding:.3g}"
        )


def _exactly(family: Family) -> None:
    """Exact mode reads in whole slices only, which are those of a cold run: nothing may differ."""
    with _opened(family, exact=True) as cache:
        for name in ("cold", "extension", "branch"):
            off, report = served(cache, family, JOURNEYS[name])
            if off:
                raise NotAsColdError(f"exact mode, {name}: {off:.3g}, {report}")


def _together(family: Family, record: Record) -> None:
    """Replies of unequal lengths at once, of two and three, and of as many as there are key-value heads."""
    with _opened(family) as cache:
        prompts = [TEXT[:60], OTHER[:45], [*TEXT[:50], *MORE], OTHER[:31], MORE[:37]]
        alone = [_logprobs(list(answering(cache, each, AT_ONCE))) for each in prompts]
        sizes = {2, 3, *cache.engine.layout.row_heads} - {1}
        for size in sorted(each for each in sizes if each <= len(prompts)):
            replies = _at_once(cache, prompts[:size])
            off = max(apart(_logprobs(a), b) for a, b in zip(replies, alone, strict=False))
            record.batch_difference = max(record.batch_difference, off)
    if record.batch_difference > allowed(max(record.slicing, record.decoding), None):
        raise NotAsColdError(f"in a batch: {record.batch_difference:.3g}")


def _at_once(cache: HybridPromptCache, prompts: Sequence[Sequence[int]]) -> list[list[Any]]:
    """Their replies, a token each in turn."""
    running = [answering(cache, each, AT_ONCE) for each in prompts]
    with oracle.batch_sizes(cache.engine.model) as sizes:
        turns = [[next(one) for one in running] for _ in range(AT_ONCE)]
    if max(sizes) < len(prompts):
        raise NotAsColdError(f"{len(prompts)} replies were decoded in batches of {max(sizes)}")
    return [list(reply) for reply in zip(*turns, strict=True)]


def _logprobs(reply: Sequence[Any]) -> np.ndarray[Any, Any]:
    return np.stack([_numbers(each.logprobs) for each in reply])


def _as_bfloat16(model: nn.Module) -> None:
    model.set_dtype(mx.bfloat16)


def _as_4_bits(model: nn.Module) -> None:
    def fits(_: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0

    nn.quantize(model, group_size=32, bits=4, class_predicate=fits)


DTYPES: dict[str, Callable[[nn.Module], None]] = {"bfloat16": _as_bfloat16, "4 bits": _as_4_bits}


def _in_dtype(name: str, dtype: str) -> str:
    """The same prompts in another dtype: "equal", the largest difference beside mlx-lm's own, or why not."""
    model = shapes.build(name)
    try:
        DTYPES[dtype](model)
        mx.eval(model.parameters())
        family = Family(model)
        family.cold(TEXT)
        own = family.slicing()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"not on this CPU: {str(error).splitlines()[0]}"
    with _opened(family) as cache:
        limit = cache.engine.layout.slicing_limit
        names = ("cold", "repeat", "changed ending", "branch")
        found = max(_journey(cache, family, each) for each in names)
    if found > allowed(own, limit):
        raise NotAsColdError(f"{dtype}: {found:.3g}, and mlx-lm from itself {own:.3g}")
    return "equal" if not found else f"{found:.1e} ({own:.1e})"
