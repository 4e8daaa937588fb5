"""What stands around the choices of a reply: who made it, when, and what it took."""

from __future__ import annotations

import platform
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ..generation.pieces import Count

FINGERPRINT = "-".join(
    (
        f"mlx_hybridcache_{version('mlx-hybridcache')}",
        f"mlx_lm_{version('mlx-lm')}",
        f"mlx_{version('mlx')}",
        platform.system(),
        platform.machine(),
    )
)


def usage(counts: Iterable[Count]) -> dict[str, Any]:
    """OpenAI's usage. A prompt with several choices must be counted in one of them only."""
    total = Count()
    for count in counts:
        total.prompt += count.prompt
        total.cached += count.cached
        total.completion += count.completion
        total.reasoning += count.reasoning
    return {
        "prompt_tokens": total.prompt,
        "completion_tokens": total.completion,
        "total_tokens": total.prompt + total.completion,
        "prompt_tokens_details": {"cached_tokens": total.cached},
        "completion_tokens_details": {"reasoning_tokens": total.reasoning},
    }


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every object of one reply has in common."""

    id: str
    object: str
    model: str
    created: int

    @classmethod
    def new(cls, prefix: str, kind: str, model: str) -> Envelope:
        """A fresh one, named as OpenAI names them: chatcmpl-..., cmpl-..."""
        return cls(f"{prefix}-{secrets.token_hex(12)}", kind, model, int(time.time()))

    def around(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The whole object."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            **more,
        }
