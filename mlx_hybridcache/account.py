"""The account given of a request: what was found for it, what was done, and why."""

from __future__ import annotations

from collections.abc import Sequence

from .report import CacheReport, Divergence, Reason
from .request.request import Request
from .store.match import Found
from .store.store import Store


def report(store: Store, request: Request, found: Found, seconds: float) -> CacheReport:
    """What was found for a request, and what was done about it so far, in `seconds` of reading."""
    tokens, matched = request.tokens, found.match.matched
    contradicted = found.match.contradicted
    return CacheReport(
        prompt_tokens=len(tokens),
        matched_tokens=matched,
        restored_tokens=found.position,
        replayed_tokens=len(tokens) - found.position,
        forwards=request.forwards,
        tier=found.tier if found.position else "none",
        reason=_reason(store, request, found),
        diverged_at=matched if contradicted else None,
        prefill_seconds=seconds,
        checkpoints_taken=request.taken,
        checkpoints_refused=request.refused,
        detail=request.detail,
    )


def _reason(store: Store, request: Request, found: Found) -> Reason:
    namespace, tokens = request.namespace, request.tokens
    if request.rejected:
        return Reason.DISK_REJECTED
    if found.position == 0:
        if store.was_evicted(namespace, tokens):
            return Reason.EVICTED
        if store.known_elsewhere(namespace, tokens) > found.match.matched:
            return Reason.NAMESPACE
        return Reason.COLD
    if found.match.matched >= len(tokens) - 1:
        return Reason.EXACT
    return Reason.BRANCH if found.match.contradicted else Reason.PREFIX


def uncached_report(
    request: Request, why: Sequence[str], unsupported: Sequence[str]
) -> CacheReport:
    """The report of a request served without the cache, because of `why` or of the model's layers."""
    return CacheReport(
        prompt_tokens=len(request.tokens),
        matched_tokens=0,
        restored_tokens=0,
        replayed_tokens=len(request.tokens),
        reason=Reason.DISABLED if why else Reason.UNSUPPORTED_LAYER,
        detail=", ".join(why or unsupported),
    )


def divergence(request: Request, found: Found) -> Divergence | None:
    """Where the prompt parted ways with what is stored, if it did."""
    tokens, at, around = request.tokens, found.match.matched, Divergence.AROUND
    if not found.match.contradicted:
        return None
    return Divergence(
        position=at,
        before=tuple(tokens[max(0, at - around) : at].tolist()),
        asked=tuple(tokens[at : at + around].tolist()),
        stored=tuple(found.match.continuation()[:around].tolist()),
    )
