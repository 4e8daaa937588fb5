"""A prompt cache for hybrid language models on MLX: restore the nearest checkpoint, replay the rest."""

from .budget import StoreStats
from .cache import HybridPromptCache
from .errors import (
    BudgetError,
    CacheMismatchError,
    ClosedError,
    HybridCacheError,
    ModelError,
    NotStoredError,
    PromptError,
    RouterError,
    SettingError,
)
from .report import CacheReport, Reason
from .request import Generation, Ready
from .tiers import DiskStats

__all__ = [
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
    "PromptError",
    "Ready",
    "Reason",
    "RouterError",
    "SettingError",
    "StoreStats",
]
