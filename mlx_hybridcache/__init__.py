"""A prompt cache for hybrid language models on MLX: restore the nearest checkpoint, replay the rest."""

from importlib import import_module
from typing import TYPE_CHECKING

from .backend import explaining, say_if_several
from .errors import (
    ArgumentError,
    BackendError,
    BudgetError,
    CacheMismatchError,
    ClosedError,
    HybridCacheError,
    ModelError,
    NotStoredError,
    PinnedError,
    PromptError,
    RouterError,
    SettingError,
)
from .report import CacheReport, Reason

if TYPE_CHECKING:
    from .cache import HybridPromptCache
    from .disk.tier import DiskStats
    from .request.generation import Generation, Ready
    from .store.budget import StoreStats

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BackendError",
    "BudgetError",
    "CacheMismatchError",
    "CacheReport",
    "ClosedError",
    "DiskStats",
    "Generation",
    "HybridCacheError",
    "HybridPromptCache",
    "ModelError",
    "NotStoredError",
    "PinnedError",
    "PromptError",
    "Ready",
    "Reason",
    "RouterError",
    "SettingError",
    "StoreStats",
    "__version__",
]

_LOADED_WHEN_ASKED_FOR = {
    "DiskStats": "disk.tier",
    "Generation": "request.generation",
    "HybridPromptCache": "cache",
    "Ready": "request.generation",
    "StoreStats": "store.budget",
}
"""What needs MLX, with its module: importing MLX and mlx-lm takes seconds, which `--help` has not."""


def __getattr__(name: str) -> object:
    if name not in _LOADED_WHEN_ASKED_FOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with explaining():
        found: object = getattr(import_module(f".{_LOADED_WHEN_ASKED_FOR[name]}", __name__), name)
    say_if_several()
    globals()[name] = found  # the next time Python finds it without asking here
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
