"""What `stream_generate` takes beside the prompt: which options go round the cache, and which are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..caches.layout import Layout
from ..errors import ArgumentError, HybridCacheError, SettingError
from .arguments import check_counts, check_functions, check_model, check_processors, check_seed
from .info import CacheInfo

UNCACHED_OPTIONS = ("kv_bits", "max_kv_size", "input_embeddings", "prompt_cache")
"""Options of `mlx_lm.stream_generate` whose requests are served without the cache, and say so."""

WITHOUT_EFFECT = ("num_draft_tokens", "kv_group_size", "quantized_kv_start", "prefill_step_size")
"""Options that qualify one of those, or that the constructor has decided."""

WITHOUT_THE_CACHE = (*UNCACHED_OPTIONS, *WITHOUT_EFFECT)

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
    *("best_effort", "through", "draft_from_cache", "draft_model", "draft_mtp", "sampler"),
    "logits_processors",
    *WITHOUT_THE_CACHE,
)
"""What `stream_generate` takes: its own, and those of mlx-lm's."""


FROM_CACHE, COMPUTED = 8, 2
"""Drafted tokens of one forward where a request does not say: as many as pay for themselves, and mlx-lm's default."""


@dataclass(frozen=True, slots=True)
class Drafts:
    """How a reply is drafted: at most so many tokens for one forward from what is stored, and by computing them.

    That is by a `model` or by the model's own head, out of the checkpoint that `head` names.
    """

    from_cache: int = 0
    computed: int = 0
    model: Any = None
    head: str | None = None


NO_DRAFTS = Drafts()


def take_drafts(options: dict[str, Any]) -> Drafts:
    """What these options say of drafts, and no longer do.

    `num_draft_tokens` is the draft model's or the head's where there is one.
    """
    from_cache = options.pop("draft_from_cache", False)
    model, head = options.pop("draft_model", None), options.pop("draft_mtp", None)
    most = options.pop("num_draft_tokens", None)
    if most == 0:
        return NO_DRAFTS
    if model is None and head is None:
        return Drafts(from_cache=(most or FROM_CACHE) if from_cache else 0)
    named = None if head is None else str(head)
    return Drafts(FROM_CACHE if from_cache else 0, most or COMPUTED, model, named)


def for_the_cache(options: dict[str, Any]) -> dict[str, Any]:
    """These options with what they say of drafts in one place, without those that mlx-lm alone would look at."""
    drafts = take_drafts(options)
    others = {name: options[name] for name in options if name not in WITHOUT_THE_CACHE}
    return {**others, "drafts": drafts}


def check_generating(
    max_tokens: object,
    options: Mapping[str, Any],
    around: Sequence[str],
    tokenizer: object,
    layout: Layout,
    info: CacheInfo,
) -> None:
    """Raises for what a cache with these cannot do, before any work. `around`: why it goes round the cache."""
    if tokenizer is None:
        raise HybridCacheError("stream_generate needs a tokenizer; give one to the constructor.")
    if not isinstance(max_tokens, int):
        raise ArgumentError(f"max_tokens is {max_tokens!r}; a whole number is needed.")
    if max_tokens == 0:
        raise SettingError("max_tokens must not be zero (use -1 for no limit).")
    _check_kinds(options)
    alone = bool(around or layout.unsupported)  # by mlx-lm, on caches of its own
    if options.get("draft_model") is not None and alone and not layout.goes_back:
        raise SettingError(
            "draft_model cannot be used without the cache: drafted tokens that are refused must be "
            "taken back, which this model's recurrent or sliding-window layers cannot do in mlx-lm, so that "
            "the reply would be another one. Leave it out."
        )
    _check_drafters(options)
    for name in ("draft_from_cache", "draft_model", "draft_mtp"):
        if options.get(name) and not (alone and name == "draft_model"):
            _check_drafting(name, options, info)


def _check_kinds(options: Mapping[str, Any]) -> None:
    check_functions(sampler=options.get("sampler"), through=options.get("through"))
    check_processors(options.get("logits_processors"))
    check_seed(options.get("seed"))
    if options.get("draft_model") is not None:
        check_model(options["draft_model"], None, "draft_model")


def _check_drafters(options: Mapping[str, Any]) -> None:
    head = options.get("draft_mtp")
    if head is not None and not isinstance(head, str | Path):
        raise ArgumentError(
            f"draft_mtp is {head!r}; what the model was loaded from is needed, a directory or a repository."
        )
    if head is not None and options.get("draft_model") is not None:
        raise SettingError(
            "draft_mtp and draft_model both draft what is stored nowhere. Leave one of them out."
        )


def _check_drafting(name: str, options: Mapping[str, Any], info: CacheInfo) -> None:
    if info.ranks > 1:
        raise SettingError(f"{name} cannot be used with several ranks yet. Leave it out.")
    if info.exact:
        raise SettingError(
            f"{name} cannot be used with exact: tokens that are verified together may have "
            "other last bits than single ones on this device. Leave one of them out."
        )
    if options.get("num_draft_tokens"):
        check_counts(num_draft_tokens=options["num_draft_tokens"])


def uncached(options: Mapping[str, Any], *, use_cache: bool) -> list[str]:
    """The options because of which a request is served by mlx-lm alone."""
    found = [name for name in UNCACHED_OPTIONS if options.get(name) is not None]
    return found if use_cache else [*found, "use_cache=False"]
