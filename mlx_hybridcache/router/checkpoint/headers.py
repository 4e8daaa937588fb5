"""Where a checkpoint's tensors lie in its files: the headers of safetensors, and nothing is loaded.

Read here by hand, as the `safetensors` package gives names, shapes and values but not where in the file a
tensor's bytes lie, and a patch writes some of these bytes anew in a copy of the file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RouterError

_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 100 << 20  # what the format allows

WEIGHTS = "model*.safetensors"
"""What mlx-lm loads from a directory."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a file: `nbytes` bytes from `start` on, row-major."""

    file: Path
    name: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self) -> bytes:
        """Its bytes. Raises `RouterError` when the file ends before."""
        with self.file.open("rb") as opened:
            opened.seek(self.start)
            data = opened.read(self.nbytes)
        if len(data) != self.nbytes:
            raise _damaged(self.file, "it ends within a tensor")
        return data


def stored_tensors(directory: Path) -> list[Stored]:
    """Every tensor that mlx-lm would load from `directory`, in the order of files and names.

    Raises `RouterError` for a directory without weights, and for a file that is not safetensors.
    """
    files = sorted(directory.glob(WEIGHTS))
    if not files:
        raise RouterError(f"{directory} holds no {WEIGHTS}: there is no checkpoint to patch.")
    return [tensor for file in files for tensor in _tensors(file)]


def _tensors(file: Path) -> Iterator[Stored]:
    with file.open("rb") as opened:
        head = opened.read(_LENGTH.size)
        length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else _LARGEST_HEADER + 1
        if length > _LARGEST_HEADER:
            raise _damaged(file, "it has no header")
        text = opened.read(length)
    size = file.stat().st_size
    base = _LENGTH.size + length
    try:
        table: dict[str, Any] = json.loads(text)
        found = [
            Stored(file, name, tuple(map(int, entry["shape"])), base + start, end - start)
            for name, entry in sorted(table.items())
            if name != "__metadata__"
            for start, end in [map(int, entry["data_offsets"])]
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(file, str(error)) from error
    if any(one.start < base or one.nbytes < 0 or one.start + one.nbytes > size for one in found):
        raise _damaged(file, "it ends before its tensors do")
    yield from found


def _damaged(file: Path, why: str) -> RouterError:
    return RouterError(f"{file} is not a whole safetensors file: {why}. Download the model again.")
