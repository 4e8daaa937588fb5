"""A prompt cache for hybrid language models on MLX: restore the nearest checkpoint, replay the rest."""

from .cache import HybridPromptCache
from .disk.tier import DiskStats
from .errors import (
    ArgumentError,
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
from .request.generation import Generation, Ready
from .store.budget import StoreStats

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
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
