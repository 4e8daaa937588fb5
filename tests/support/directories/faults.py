"""Faults of a disk, made for real: damaged files, small disks, disks that turn read-only."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import oracle
import pytest
import tiny

from mlx_hybridcache import HybridPromptCache

PATIENCE_SECONDS = 30


def segments(root: Path, kind: str = "*") -> list[Path]:
    """The files of a cache directory, `rows` or `state`, the largest position last."""
    return sorted(root.glob(f"segments/??/*.{kind}.safetensors"), key=_end_of)


def _end_of(path: Path) -> int:
    with path.open("rb") as file:
        header = file.read(4096).decode(errors="replace")
    return int(header.partition('"end":"')[2].partition('"')[0])


def written(root: Path, model: object, *prompts: list[int]) -> None:
    """Let a cache read prompts into the directory `root`, and end."""
    with oracle.new_cache(model, cache_dir=root) as cache:
        for prompt in prompts:
            oracle.read(cache, prompt)
        assert cache.flush(PATIENCE_SECONDS)


_colds: dict[tuple[int, tuple[int, ...]], tuple[object, oracle.Array]] = {}
"""By the model's id, which is its own as long as the model is kept here."""


def cold_reply(model: object, prompt: list[int]) -> oracle.Array:
    """What `oracle.reply_logits` must give: the same from mlx-lm's own caches."""
    key = id(model), tuple(prompt)
    if key not in _colds:
        _colds[key] = model, _read_cold(model, prompt)
    return _colds[key][1]


def _read_cold(model: object, prompt: list[int], count: int = 6) -> oracle.Array:
    caches = tiny.cold_caches(model, prompt[:-1], oracle.STEP)
    steps, feed = [], prompt[-1:]
    for _ in range(count):
        logits = model(mx.array([feed]), cache=caches)[:, -1]
        mx.eval(logits, [cache.state for cache in caches])
        steps.append(np.array(logits[0]))
        feed = [int(logits.argmax().item())]
    return np.stack(steps)


def served(cache: HybridPromptCache, prompt: list[int]) -> tuple[str, int]:
    """Serve a prompt, hold it against cold bit for bit; the tier it came from and how far."""
    logits = oracle.reply_logits(cache, prompt)
    assert oracle.agree(logits, cold_reply(cache.engine.model, prompt)), "hot is not cold"
    assert cache.last_report is not None
    return cache.last_report.tier, cache.last_report.restored_tokens


class Said:
    """The warnings that were logged since they were last taken."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def take(self) -> list[str]:
        """Those of the library, and what is worse."""
        lines = [
            record.getMessage()
            for record in self._caplog.records
            if record.name.startswith("mlx_hybridcache") and record.levelname != "INFO"
        ]
        self._caplog.clear()
        return lines

    def take_one(self) -> str:
        """The one and only."""
        lines = self.take()
        assert len(lines) == 1, lines
        return lines[0]


def flip(path: Path, at: int) -> None:
    """Turn one bit of a file; negative places count from its end."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def cut(path: Path, nbytes: int) -> None:
    """Leave the first so many bytes; negative: take so many away."""
    os.truncate(path, nbytes if nbytes >= 0 else path.stat().st_size + nbytes)


def _other(path: Path) -> None:
    """Put another whole segment of the same kind in its place."""
    kind = path.name.split(".")[1]
    root = path.parent.parent.parent
    shutil.copyfile(next(one for one in segments(root, kind) if one != path), path)


def _noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(1).bytes(path.stat().st_size))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: cut(path, 0),
    "half of it": lambda path: cut(path, path.stat().st_size // 2),
    "a byte short": lambda path: cut(path, -1),
    "a byte long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a bit of its length": lambda path: flip(path, 1),
    "a bit of its header": lambda path: flip(path, 100),
    "a bit of its data": lambda path: flip(path, -1000),
    "its last bit": lambda path: flip(path, -1),
    "noise": _noise,
    "another's bytes": _other,
}
"""What can happen to a file."""


def run(*command: str) -> None:
    """Run a command that must do its work."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@contextmanager
def tmpfs(root: Path, nbytes: int) -> Iterator[None]:
    """A disk of so many bytes at `root`, which exists; skips the test where nobody may mount one."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    size = f"size={nbytes}"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "none", str(root)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"this system lets nobody mount: {done.stderr!r}")
    try:
        yield
    finally:
        run("umount", str(root))


@contextmanager
def read_only(root: Path) -> Iterator[None]:
    """`root` cannot be written meanwhile, not even by root: it is mounted over itself."""
    run("mount", "--bind", str(root), str(root))
    try:
        run("mount", "-o", "remount,bind,ro", str(root))
        yield
    finally:
        run("umount", "--lazy", str(root))  # the disk thread may have a file open at this moment


def changed_weight(name: str, path: str, at: int) -> object:
    """A model of family `name`, but for one number of one parameter, which is a bit larger."""
    from mlx.utils import tree_flatten, tree_unflatten

    model = tiny.fresh(name)
    weights = dict(tree_flatten(model.parameters()))
    flat = np.array(weights[path])
    flat.reshape(-1)[at] = np.nextafter(flat.reshape(-1)[at], np.float32(np.inf))
    model.update(tree_unflatten([(path, mx.array(flat))]))
    mx.eval(model.parameters())
    return model
