"""Programs of this checkout and of an older one beside it: how they are started, and what they take."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import mlx_hybridcache
from mlx_hybridcache.errors import SettingError

from .paired import Spent

HERE, THERE = "this one", "the other one"
FOLDERS = ("", "server", "bench")
"""Of a checkout, where its packages lie."""

LAST_WORDS = 800
"""Characters of a failed program's output that an error quotes."""


@dataclass(frozen=True, slots=True)
class Checkout:
    """A folder whose packages come first on the path, whatever is installed."""

    name: str
    root: Path

    @classmethod
    def here(cls) -> Self:
        """The one that this program is part of."""
        return cls(HERE, Path(mlx_hybridcache.__file__).parents[1])

    @classmethod
    def at(cls, root: Path) -> Self:
        """Another one. Raises `SettingError` when there is none."""
        if not (root / "mlx_hybridcache").is_dir():
            raise SettingError(
                f"{root} is no checkout of mlx-hybridcache. `git worktree add DIR COMMIT` makes one."
            )
        return cls(THERE, root.resolve())

    @property
    def variables(self) -> Mapping[str, str]:
        """Of the environment, for a process whose packages are this checkout's."""
        given = os.environ.get("PYTHONPATH")
        folders = [str(self.root / each) for each in FOLDERS if (self.root / each).is_dir()]
        return {
            "PYTHONPATH": os.pathsep.join([*folders, *([given] if given else [])]),
            # Else `python -m` looks into the current folder first, which may be another checkout.
            "PYTHONSAFEPATH": "1",
            # Installed, a package is compiled once; where that is off, each start would compile it.
            "PYTHONDONTWRITEBYTECODE": "",
        }

    def run(self, arguments: Sequence[str], *, statuses: Sequence[int] = (0,)) -> Spent:
        """`mlx-hybridcache ARGUMENTS`, its output left unread; raises `SettingError` when it fails.

        What it took is its own processor time and that of the processes which it waited for.
        """
        command = [sys.executable, "-m", "mlx_hybridcache.cli", *arguments]
        before, began = _children_seconds(), time.perf_counter()
        ended = subprocess.run(
            command,
            env={**os.environ, **self.variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        spent = Spent(time.perf_counter() - began, _children_seconds() - before)
        if ended.returncode not in statuses:
            said = ended.stdout.decode("utf-8", "replace")[-LAST_WORDS:].strip()
            raise SettingError(
                f"mlx-hybridcache {' '.join(arguments)} of {self.root} ended with status "
                f"{ended.returncode}. Its last words:\n{said}"
            )
        return spent


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
