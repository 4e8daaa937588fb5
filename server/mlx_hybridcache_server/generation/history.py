"""What is remembered of requests that have ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mlx_hybridcache import CacheReport

from ..prompts.stable import StablePrefix

REMEMBERED = 100
"""Reports that `/v1/cache/recent` tells of."""


@dataclass(frozen=True, slots=True)
class Record:
    """What `/v1/cache/recent` tells of one request. `changed` is the kind of thing that differs."""

    id: str
    endpoint: str
    created: int
    report: CacheReport
    seconds_waited: float
    seconds_to_first_token: float
    completion_tokens: int
    stable: StablePrefix | None
    changed: str | None
    text: dict[str, str] | None

    def body(self) -> dict[str, Any]:
        """As JSON."""
        report = self.report
        return {
            "id": self.id,
            "endpoint": self.endpoint,
            "created": self.created,
            **asdict(report),
            "sentence": report.reason.sentence,
            "seconds_waited": round(self.seconds_waited, 6),
            "seconds_to_first_token": round(self.seconds_to_first_token, 6),
            "completion_tokens": self.completion_tokens,
            "stable_prefix": None if self.stable is None else self.stable.body(),
            "changed": self.changed,
            "text": self.text,
        }
