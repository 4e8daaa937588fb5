"""What the cache did for one request, and why, in words a program can read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar


class Reason(StrEnum):
    """Why a request got what it got from the cache. Each has one sentence, `Reason.sentence`."""

    EXACT = "exact"
    PREFIX = "prefix"
    BRANCH = "branch"
    COLD = "cold"
    EVICTED = "evicted"
    NAMESPACE = "namespace"
    UNSUPPORTED_LAYER = "unsupported_layer"
    DISABLED = "disabled"
    DISK_REJECTED = "disk_rejected"

    @property
    def sentence(self) -> str:
        """One sentence for people."""
        return _SENTENCES[self]


_SENTENCES = {
    Reason.EXACT: "All of the prompt was read before; only what lies behind the nearest checkpoint was read.",
    Reason.PREFIX: "The prompt continues what is stored; its new tokens were read.",
    Reason.BRANCH: "The prompt parts ways with what is stored; it was read from the nearest checkpoint.",
    Reason.COLD: "Nothing that is stored can be resumed for this prompt; all of it was read.",
    Reason.EVICTED: "The prompt's beginning was stored once and had to make room; it was read again.",
    Reason.NAMESPACE: "The prompt's beginning is stored for another model, setting or salt; it is not shared.",
    Reason.UNSUPPORTED_LAYER: "The model has a cache class that cannot be stored; it was served without the cache.",
    Reason.DISABLED: "The request asked for something that is served without the cache.",
    Reason.DISK_REJECTED: "A stored file was damaged or foreign and was passed over.",
}


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a prompt parted ways with what is stored: token ids around `position`.

    `before` is common to both; `asked` and `stored` are how they go on, at most `AROUND` ids each.
    """

    AROUND: ClassVar[int] = 24

    position: int
    before: tuple[int, ...]
    asked: tuple[int, ...]
    stored: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CacheReport:
    """One request's account. All counts are tokens; positions are absolute.

    `matched_tokens` is the longest stored prefix, `restored_tokens` the checkpoint that was used,
    `replayed_tokens` what was read on top of it (so restored + replayed == prompt), `forwards` the
    model calls that took, the one for the last token included. `diverged_at` is the position of the
    first token that differs from every stored continuation, None where none was contradicted. Of a
    reply that drafts, `accepted_tokens` of its `drafted_tokens` were right, and the model was called
    `reply_forwards` times for it; a draft model, or a head, was called `draft_forwards` times, behind
    `draft_restored_tokens` of the prompt that were restored for it too.
    `soft_pins` are the checkpoints that the request's `lifetimes` keep for a time.
    """

    prompt_tokens: int
    matched_tokens: int
    restored_tokens: int
    replayed_tokens: int
    reason: Reason
    forwards: int = 0
    tier: str = "none"
    diverged_at: int | None = None
    prefill_seconds: float = 0.0
    checkpoints_taken: int = 0
    checkpoints_refused: int = 0
    soft_pins: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    reply_forwards: int = 0
    draft_forwards: int = 0
    draft_restored_tokens: int = 0
    detail: str = ""

    def __str__(self) -> str:
        words = (
            f"{self.restored_tokens} of {self.prompt_tokens} tokens restored, "
            f"{self.replayed_tokens} read in {self.forwards} forwards ({self.reason.value})"
        )
        return f"{words}: {self.detail}" if self.detail else words


@dataclass(frozen=True, slots=True)
class StoreError:
    """Next-token distributions behind what a smaller store gave back, and behind what was never stored.

    `compared` of them, of the same text. `mean_kl` and `max_kl` are in nats, of the restored from the
    cold. `other_tokens` is how many have another likeliest token, and `first_other_token` the first of
    those, counted from 0 behind its restore point; None where all agree.
    """

    compared: int
    mean_kl: float
    max_kl: float
    other_tokens: int
    first_other_token: int | None

    @property
    def sentence(self) -> str:
        """For people."""
        kl = f"KL {self.mean_kl:.2g} nats on average, {self.max_kl:.2g} at most"
        if self.first_other_token is None:
            return f"{kl}; the likeliest token is the same in all of {self.compared}"
        return (
            f"{kl}; the likeliest token is another in {self.other_tokens} of {self.compared}, "
            f"first {self.first_other_token} tokens behind a restore"
        )
