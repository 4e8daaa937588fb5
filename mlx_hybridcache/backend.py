"""How MLX is loaded: when it is needed, and on Linux with `mlx-cpu`, `mlx-cuda-12` or `mlx-cuda-13`.

Exactly one of them, with which the package `mlx` is the same. On macOS it brings its own. And how
transformers is, which mlx-lm needs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from .errors import BackendError

EXTRAS = {"mlx-cpu": "cpu", "mlx-cuda-12": "cuda12", "mlx-cuda-13": "cuda13"}
"""Each with the extra of this project that installs it."""


def installed() -> list[str]:
    """Names of the backends in this environment."""
    from importlib.metadata import PackageNotFoundError, distribution

    found = []
    for name in EXTRAS:
        try:
            distribution(name)
        except PackageNotFoundError:
            continue
        found.append(name)
    return found


@contextmanager
def explaining() -> Iterator[None]:
    """Raise `BackendError`, which says what to install, where MLX cannot be imported inside."""
    try:
        yield
    except ImportError as error:
        said = None if isinstance(error, BackendError) else _explanation(error)
        if said is None:
            raise
        raise BackendError(said) from error


def _explanation(error: ImportError) -> str | None:
    """None where it is not MLX's own library, or what that needs, which could not be loaded."""
    text, found = str(error), installed()
    if "libcuda.so" in text:
        name = next((each for each in found if "cuda" in each), "mlx-cuda-13")
        return (
            f"{name} computes on a GPU of NVIDIA's, whose driver is not here ({text}). Install the "
            f'driver, or compute on the CPU: pip uninstall {name}, then pip install "mlx-hybridcache[cpu]".'
        )
    if found and ("libmlx" in text or Path(error.path or "").parent.name == "mlx"):
        return (
            f"MLX cannot be loaded ({text}), and {' and '.join(found)} {_are(found)} installed. Install it "
            f"anew: {_pip(found)}."
        )
    if "libmlx" in text:
        return (
            'MLX has no backend here. Install one: pip install "mlx-hybridcache[cpu]", or for a GPU of '
            'NVIDIA\'s "mlx-hybridcache[cuda13]", or with a driver older than 580 "mlx-hybridcache[cuda12]".'
        )
    return None


def _are(found: list[str]) -> str:
    return "are" if len(found) > 1 else "is"


def _pip(found: list[str]) -> str:
    """Both steps, as taking one of several away takes the library of the others with it."""
    return (
        f"pip uninstall {' '.join(found)}, then, say, "
        f'pip install "mlx-hybridcache[{EXTRAS[found[-1]]}]"'
    )


@cache
def say_if_several() -> None:
    """Warn, once, where several backends are installed."""
    import logging

    found = installed()
    if len(found) > 1:
        logging.getLogger(__name__).warning(
            "%s are installed, and each writes the same mlx/lib/libmlx.so: the one that came last computes. "
            "Keep one: %s.",
            " and ".join(found),
            _pip(found),
        )


def import_transformers() -> None:
    """Import transformers with one short look into the files of its models, instead of two long ones.

    To know which names its models define, the package `transformers` reads all of their files, some 1,700, and
    `transformers.models` reads them again, as it names the folder by a file in it. By transformers' own words the
    two mean the same, and what was found once is remembered. It splits each file, 21,000 characters, into lines
    for those from the last `__all__` on: it is given these alone. Where another version has no such functions,
    or transformers cannot be imported, nothing is done: mlx-lm's own import says what is missing.
    """
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # as mlx-lm does before its import
    if "transformers" in sys.modules:
        return
    looks = _ShorterLooks()
    sys.meta_path.insert(0, looks)
    try:
        import_module("transformers.models")
    except ImportError:
        return
    finally:
        sys.meta_path.remove(looks)
        looks.end()


class _ShorterLooks(MetaPathFinder):
    """Finds transformers' module that looks, and changes it before the package uses it."""

    def __init__(self) -> None:
        self._module: ModuleType | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As everybody else finds it, and changed as soon as it has run."""
        if fullname != "transformers.utils.import_utils":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_change(module: ModuleType) -> None:
                run(module)
                self._change(module)

            spec.loader.exec_module = run_and_change  # type: ignore[method-assign]  # this module's own loader
        return spec

    def _change(self, module: ModuleType) -> None:
        if not hasattr(module, "define_import_structure") or not hasattr(module, "fetch__all__"):
            return
        self._module = module
        self._read, self._names_in = module.define_import_structure, module.fetch__all__
        module.define_import_structure = self._read_once  # type: ignore[attr-defined]
        module.fetch__all__ = self._names_at_the_end  # type: ignore[attr-defined]

    def _read_once(self, path: str | Path, prefix: str | None = None) -> object:
        named = Path(path)
        return self._read(named.parent if named.name == "__init__.py" else named, prefix)

    def _names_at_the_end(self, text: str) -> object:
        return self._names_in(text[text.rfind("\n__all__") + 1 :])

    def end(self) -> None:
        """The module is as it was."""
        if self._module is not None:
            self._module.define_import_structure = self._read  # type: ignore[attr-defined]
            self._module.fetch__all__ = self._names_in  # type: ignore[attr-defined]


def loader(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of `package`, which finds each name in its module of `modules`, once (PEP 562).

    MLX and mlx-lm take seconds, which `--help` has not. Raises `BackendError` where MLX cannot be loaded.
    """

    def load(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with explaining():
            found: object = getattr(import_module(f".{modules[name]}", package), name)
        say_if_several()
        setattr(sys.modules[package], name, found)  # the next time Python finds it without asking
        return found

    return load
