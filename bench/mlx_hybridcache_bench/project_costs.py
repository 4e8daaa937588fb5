"""What a projection reckons with: how fast a machine reads cold, and what the engine's own work costs."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hybridcache import models
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.errors import SettingError

from .disk_promotion import FORGOTTEN, NEW, STAND_IN, measure_stand_in
from .full_size import measure_full_size
from .machine import machine
from .standin import QWEN3_NEXT_80B, SHAPES
from .text import prompt_of

FULL = next(name for name, shapes in SHAPES.items() if shapes == QWEN3_NEXT_80B)
"""The only shapes at which costs say something of a large model."""

KEYS = ("system", "architecture", "cores", "memory_bytes", "device")
"""What makes two runs one machine's."""

TOKENIZED = 12_000


@dataclass(frozen=True, slots=True)
class Speed:
    """Cold reading: seconds for `n` tokens are `linear n + quadratic n**2`, fitted to `measured`.

    The first part is what every token costs, the second attention's.
    """

    measured: Mapping[int, float]
    linear: float
    quadratic: float

    @classmethod
    def fitted(cls, measured: Mapping[int, float]) -> Speed:
        """The least squares of the relative errors; neither part may be negative.

        Raises `SettingError` for times that are none.
        """
        if not measured or any(n < 1 or not 0 < t < float("inf") for n, t in measured.items()):
            raise SettingError("Cold times must be positive: tokens and seconds, as 12000=12.4.")
        lengths = np.array(list(measured), dtype=float)
        seconds = np.array(list(measured.values()))
        both = np.stack([lengths / seconds, lengths**2 / seconds], axis=1)
        target = np.ones(len(lengths))
        best: tuple[float, float, float] | None = None
        for columns in ([0, 1], [0], [1]):
            if len(columns) > len(lengths):
                continue
            found, *_ = np.linalg.lstsq(both[:, columns], target, rcond=None)
            parts = [0.0, 0.0]
            for column, value in zip(columns, found, strict=True):
                parts[column] = float(value)
            miss = float(np.sum((both @ np.array(parts) - target) ** 2))
            if min(parts) >= 0 and (best is None or miss < best[0]):
                best = (miss, parts[0], parts[1])
        assert best is not None  # one column alone fits with a positive factor
        return cls(dict(measured), best[1], best[2])

    def seconds(self, start: int, end: int) -> float:
        """Reading `[start, end)` behind what is there already."""
        return self.linear * (end - start) + self.quadratic * (end**2 - start**2)

    @property
    def worst_miss(self) -> float:
        """The largest relative error of the fit on what was measured."""
        return max(abs(self.seconds(0, n) / t - 1) for n, t in self.measured.items())

    def is_known(self, tokens: int) -> bool:
        """Whether a length lies within what was measured."""
        return min(self.measured) <= tokens <= max(self.measured)


@dataclass(frozen=True, slots=True)
class Costs:
    """The engine's own work, in seconds per byte, and tokenizing, per token; where they were measured."""

    restore: float
    save: float
    promote: float
    tokenize: float
    machine: Mapping[str, Any]
    sources: tuple[str, ...]


def costs(overhead: Path | None, disk: Path | None, *, tokens: int, pairs: int) -> Costs:
    """From the JSON files of `bench overhead` and `bench disk`; what is not given is measured here.

    A measurement of our own takes a prompt of `tokens` at full shapes. Raises `SettingError` for
    files that are something else, were measured at other shapes, or come from different machines.
    """
    sources, machines = [], []
    if overhead is not None:
        told = _read(overhead, "overhead", "full-size")
        found, part = told["machine"], told["parts"]["full-size"]
        if part["shapes"] != FULL:
            raise SettingError(
                f"{overhead} was measured at {part['shapes']} shapes; {FULL} is needed. "
                "Run `mlx-hybridcache bench overhead --only full-size` without --shapes."
            )
        restore = part["restore"]["b_seconds"] / part["restored_bytes"]
        save = part["save"]["b_seconds"] / part["saved_bytes"]
        sources.append(f"restoring and saving: {overhead.name}, {part['tokens']:,} tokens")
        machines.append(found)
    else:
        full = measure_full_size(tokens, pairs=pairs)
        restore = full.restore.b_seconds / full.restored_bytes
        save = full.save.b_seconds / full.saved_bytes
        sources.append(f"restoring and saving: measured just now, {full.tokens:,} tokens")
        machines.append(machine())
    if disk is not None:
        told = _read(disk, "disk", "promotion")
        promotions = told["parts"]["promotion"]["promotions"]
        stand_in = [each for each in promotions if each["name"] == f"{STAND_IN} {FULL}"]
        if not stand_in:
            raise SettingError(
                f"{disk} has no promotion at {FULL} shapes. "
                "Run `mlx-hybridcache bench disk --only promotion` without --shapes."
            )
        way = FORGOTTEN if FORGOTTEN in stand_in[0]["reads"] else NEW
        promote = stand_in[0]["reads"][way]["b_seconds"] / stand_in[0]["needed_bytes"]
        sources.append(f"promoting from disk: {disk.name}, {way}")
        machines.append(told["machine"])
    else:
        promotion = measure_stand_in(FULL, tokens, pairs=pairs)
        way = FORGOTTEN if FORGOTTEN in promotion.reads else NEW
        promote = promotion.reads[way].b_seconds / promotion.needed_bytes
        sources.append(f"promoting from disk: measured just now, {way}")
        machines.append(machine())
    if len({tuple(each.get(key) for key in KEYS) for each in machines}) > 1:
        raise SettingError(
            "The costs come from different machines: "
            + "; ".join(f"{each['cores']} cores, {each['device']}" for each in machines)
            + ". Give --overhead and --disk of one machine, or run this on it."
        )
    return Costs(restore, save, promote, _tokenizing(), machines[0], tuple(sources))


def _read(file: Path, command: str, part: str) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        is_right = told["command"] == command and part in told["parts"] and "machine" in told
    except (OSError, ValueError, KeyError, TypeError):
        is_right = False
    if not is_right:
        raise SettingError(
            f"{file} is no result of `mlx-hybridcache bench {command} --json {file.name}` with its part "
            f"{part}. Write it anew."
        )
    return told


def _tokenizing() -> float:
    """Seconds per token of real text, with the bundled tokenizer."""
    _, tokenizer = models.load(str(BUNDLED_MODEL))
    text = tokenizer.decode(prompt_of(tokenizer, TOKENIZED))
    spent = []
    for _ in range(3):
        began = time.perf_counter()
        tokenizer.encode(text)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent) / TOKENIZED


def read_cold(given: Sequence[str]) -> dict[int, float]:
    """`TOKENS=SECONDS` of the command line. Raises `SettingError`."""
    found = {}
    for text in given:
        tokens, _, seconds = text.partition("=")
        try:
            found[int(tokens)] = float(seconds)
        except ValueError:
            raise SettingError(
                f"--cold {text} is not TOKENS=SECONDS, as --cold 12000=12.4."
            ) from None
    return found
