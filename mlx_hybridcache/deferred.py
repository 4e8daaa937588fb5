"""A package whose names load when asked for (PEP 562): MLX and mlx-lm take seconds, which `--help` has not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module

from .backend import explaining, say_if_several


def loader(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of `package`, which finds each name in its module of `modules`, once.

    It raises `BackendError` where MLX is missing.
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
