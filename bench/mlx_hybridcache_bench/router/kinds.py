"""Eight kinds of text that every Python carries or can print, in one alphabet of 64 characters."""

from __future__ import annotations

import hashlib
import html.entities
import importlib.util
import itertools
import json
import math
import pydoc_data.topics
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlx_hybridcache.demo.functions import FUNCTIONS

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;!?\"'()[]{}<>&#=+-*/%_@"
"""A token is a character of it; capitals count as small letters, and other characters are left out."""

LENGTH = 120_000
"""Characters of a kind that are used, at most."""

BLOCK, EVERY = 1_500, 5
"""Every fifth block of so many characters is held out: it is never counted."""

SOURCES = ("argparse", "ast", "configparser", "statistics", "tarfile", "typing")

Tokens = NDArray[np.int64]


@cache
def kinds() -> dict[str, tuple[Tokens, Tokens]]:
    """Name -> (counted, held out), token ids below `len(ALPHABET)`."""
    place = {character: index for index, character in enumerate(ALPHABET)}
    split: dict[str, tuple[Tokens, Tokens]] = {}
    for name, write in _WRITERS.items():
        text = write()[: 2 * LENGTH].lower()
        ids = np.array([place[c] for c in text if c in place][:LENGTH])
        is_held_out = np.arange(len(ids)) // BLOCK % EVERY == EVERY - 1
        split[name] = ids[~is_held_out], ids[is_held_out]
    return split


def _reference() -> str:
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def _sources() -> str:
    found = [importlib.util.find_spec(name) for name in SOURCES]
    paths = [Path(spec.origin) for spec in found if spec is not None and spec.origin]
    return "\n\n".join(path.read_text(encoding="utf-8") for path in paths)


def _names() -> str:
    named = (unicodedata.name(chr(code), "") for code in range(0x20, 0x3000))
    return "\n".join(filter(None, named))


def _numbers() -> str:
    rows = (f"{n:6d} {math.sin(n):+.6f} {math.sqrt(n):10.5f}\n" for n in range(LENGTH // 28))
    return "".join(rows)


def _digests() -> str:
    lines = (hashlib.sha256(str(n).encode()).hexdigest() + "\n" for n in range(LENGTH // 64))
    return "".join(lines)


def _log() -> str:
    began = datetime(2026, 1, 1, tzinfo=UTC)
    words = itertools.cycle(("opened", "closed", "waiting", "refused"))
    times = (began + timedelta(seconds=37 * n) for n in range(LENGTH // 32))
    return "".join(f"[{when:%Y-%m-%d %H:%M:%S}] {next(words)}\n" for when in times)


def _markup() -> str:
    entities = sorted(name for name in html.entities.html5 if name.endswith(";"))
    rows = (f"<li>&amp;{name}</li>\n" for name in entities)
    return "".join(rows)


def _calls() -> str:
    declared = [json.dumps(each.declaration()) for each in FUNCTIONS]
    cities = itertools.cycle(("Oslo", "Lima", "Rome", "Quito", "Hanoi"))
    asked = (
        json.dumps({"name": each.name, "arguments": {"city": next(cities), "day": n % 28}})
        for n in range(1, LENGTH // 400)
        for each in FUNCTIONS
    )
    lines = itertools.chain.from_iterable(zip(itertools.cycle(declared), asked, strict=False))
    return "\n".join(lines)


_WRITERS: dict[str, Callable[[], str]] = {
    "reference": _reference,
    "source": _sources,
    "names": _names,
    "numbers": _numbers,
    "digests": _digests,
    "log": _log,
    "markup": _markup,
    "calls": _calls,
}
