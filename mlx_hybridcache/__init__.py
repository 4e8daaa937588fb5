"""A prompt cache for hybrid language models on MLX: restore the nearest checkpoint, replay the rest."""

from typing import TYPE_CHECKING

from .backend import loader
from .errors import (
    AdapterError,
    ArgumentError,
    BackendError,
    BudgetError,
    CacheMismatchError,
    ClosedError,
    GroupError,
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
    from .disk.tier.tier import DiskStats
    from .group.group import Group
    from .request.generation import Generation, Ready
    from .store.budget import StoreStats

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "ArgumentError",
    "BackendError",
    "BudgetError",
    "CacheMismatchError",
    "CacheReport",
    "ClosedError",
    "DiskStats",
    "Generation",
    "Group",
    "GroupError",
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
    "DiskStats": "disk.tier.tier",
    "Generation": "request.generation",
    "Group": "group.group",
    "HybridPromptCache": "cache",
    "Ready": "request.generation",
    "StoreStats": "store.budget",
}
"""What needs MLX, with its module."""

__getattr__ = loader(__name__, _LOADED_WHEN_ASKED_FOR)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
