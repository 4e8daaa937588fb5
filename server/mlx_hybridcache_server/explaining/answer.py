"""What is answered: read what would be sent, render it, compare it, look at what is stored."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from mlx_hybridcache.report import Reason

from ..errors import ApiError, refuse
from ..generation.admission import Admitted
from ..generation.models import Loaded
from ..generation.serving import Serving
from ..responses.kept import Kept, weight_of
from ..schema.explain import ExplainBody
from .asked import Asked, apart, is_in_use, read, tokens_of
from .comparison import Cause, Comparison, compared
from .explanation import of_one, of_two, speed
from .kinds import Kind
from .stored import parting


async def explained(
    body: ExplainBody,
    kept: list[list[Kept]],
    serving: Serving,
    admitted: Admitted,
    weight: int,
) -> dict[str, Any]:
    """The explanation of what was asked, whose earlier turns are `kept`. Raises `ApiError` 400 where there is none."""
    if not serving.settings.uses_cache:
        raise refuse("The cache is turned off (--prompt-cache-size 0).")
    loaded = await serving.slot.any_model(admitted.held)
    weight += sum(weight_of(each, serving.settings.max_body_bytes) for each in kept)
    asked = [
        await serving.rendering.call(partial(read, sent, body.endpoint, before), weight)
        for sent, before in zip(body.requests, kept, strict=True)
    ]
    if len(asked) == 1:
        return await _one(asked[0], loaded, serving, weight)
    return await _two(asked[0], asked[1], loaded, serving, weight)


async def _one(asked: Asked, loaded: Loaded, serving: Serving, weight: int) -> dict[str, Any]:
    if not is_in_use(asked, loaded, serving.settings):
        raise ApiError(
            409,
            "What is stored for another model or adapter than the one in use is not known now. Ask for a reply "
            "with it first, or give the request that came before this one too.",
            code="model_not_in_use",
        )
    tokens = await serving.rendering.steps(tokens_of(asked, loaded.renderer), weight)
    report = await serving.between_turns(loaded.cache.lookup, tokens, cache_salt=asked.cache_salt)
    work = partial(parting, asked, tokens, report, loaded)
    cause, text = await serving.rendering.call(work, weight)
    if asked.cache_prompt is False:
        report = replace(report, restored_tokens=0, reason=Reason.DISABLED, tier="none")
        cause = Cause(Kind.NOT_CACHED)
    if not _shows_stored(asked, serving):
        text["stored"] = None
    return of_one(cause, loaded.id, report, text, _speed(serving))


async def _two(
    one: Asked, other: Asked, loaded: Loaded, serving: Serving, weight: int
) -> dict[str, Any]:
    different = apart(one, other, serving.settings)
    compare = compared(one, other, loaded.renderer, different, weight)
    found = await serving.rendering.steps(compare, weight)
    restored = await _restored(found, other, loaded, serving)
    return of_two(found, loaded.id, restored, _speed(serving))


async def _restored(
    found: Comparison, other: Asked, loaded: Loaded, serving: Serving
) -> int | None:
    """Up to where the second prompt is restored; None if the first one is not stored, or that is not known.

    Where the second is stored itself, up to where the next one would be that parts from the first there.
    """
    if found.cause.kind in (Kind.OTHER_SALT, Kind.OTHER_MODEL, Kind.NOT_CACHED):
        return 0
    if not is_in_use(other, loaded, serving.settings):
        return None
    look = partial(serving.between_turns, loaded.cache.lookup, cache_salt=other.cache_salt)
    report = await look(found.second)
    if report.matched_tokens >= len(found.second) - 1:
        report = await look(found.second[: found.common + 1])
    # Of either prompt the last token is read for its reply only, and may not be stored.
    is_known = report.matched_tokens >= min(
        found.common, *(len(p) - 1 for p in (found.first, found.second))
    )
    return report.restored_tokens if is_known else None


def _shows_stored(asked: Asked, serving: Serving) -> bool:
    """Whether stored letters may be told: those of a salt to who names it, others with --show-prompts only.

    Who may ask could else have a server tell all that others have asked, a few letters at a time.
    """
    return bool(asked.cache_salt) or serving.settings.show_prompts


def _speed(serving: Serving) -> float | None:
    return speed(one.report for one in serving.recent)
