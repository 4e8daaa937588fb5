"""What `stream_generate` takes beside the prompt: which options go round the cache, and which are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..caches.layout import Layout
from ..errors import ArgumentError, HybridCacheError, SettingError
from .arguments import check_counts
from .info import CacheInfo

UNCACHED_OPTIONS = ("kv_bits", "max_kv_size", "draft_model", "input_embeddings", "prompt_cache")
"""Options of `mlx_lm.stream_generate` whose requests are served without the cache, and say so."""

WITHOUT_EFFECT = ("num_draft_tokens", "kv_group_size", "quantized_kv_start", "prefill_step_size")
"""Options that qualify one of those, or that the constructor has decided."""

KEYWORDS = (
    *(
        "max_tokens",
        "boundaries",
        "lifetimes",
        "prompt_progress_callback",
        "cache_salt",
        "use_cache",
        "seed",
    ),
    *("best_effort", "through", "draft_from_cache", "sampler", "logits_processors"),
    *(*UNCACHED_OPTIONS, *WITHOUT_EFFECT),
)
"""What `stream_generate` takes: its own, and those of mlx-lm's."""


def check_generating(
    max_tokens: object,
    options: Mapping[str, Any],
    tokenizer: object,
    layout: Layout,
    info: CacheInfo,
) -> None:
    """Raises for what a cache with these cannot do, before any work."""
    if tokenizer is None:
        raise HybridCacheError("stream_generate needs a tokenizer; give one to the constructor.")
    if not isinstance(max_tokens, int):
        raise ArgumentError(f"max_tokens is {max_tokens!r}; a whole number is needed.")
    if max_tokens == 0:
        raise SettingError("max_tokens must not be zero (use -1 for no limit).")
    if options.get("draft_model") is not None and not layout.goes_back:
        raise SettingError(
            "draft_model cannot be used with this model: drafted tokens that are refused must be "
            "taken back, which its recurrent or sliding-window layers cannot do in mlx-lm, so that "
            "the reply would be another one. Leave it out."
        )
    if options.get("draft_from_cache"):
        _check_drafting(options, info)


def _check_drafting(options: Mapping[str, Any], info: CacheInfo) -> None:
    if info.ranks > 1:
        raise SettingError("draft_from_cache cannot be used with several ranks yet. Leave it out.")
    if info.exact:
        raise SettingError(
            "draft_from_cache cannot be used with exact: tokens that are verified together may have "
            "other last bits than single ones on this device. Leave one of them out."
        )
    if "num_draft_tokens" in options:
        check_counts(num_draft_tokens=options["num_draft_tokens"])


def uncached(options: Mapping[str, Any], *, use_cache: bool) -> list[str]:
    """The options because of which a request is served by mlx-lm alone."""
    found = [name for name in UNCACHED_OPTIONS if options.get(name) is not None]
    return found if use_cache else [*found, "use_cache=False"]
