"""What a cold request pays for the cache: the same prompt with and without it, pair by pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_lm import stream_generate
from rich.console import Console

from mlx_hybridcache import HybridPromptCache

from ..kit.paired import Paired, measure, tidy
from ..kit.tables import Figure, show

TARGET_RATIO = 1.03


@dataclass(frozen=True, slots=True)
class Cold:
    """`paired.a` is plain `mlx_lm.stream_generate`, `paired.b` a request to an empty cache."""

    prompt_tokens: int
    reply_tokens: int
    checkpoints: int
    forwards: int
    same_reply: bool
    paired: Paired

    def figures(self) -> list[Figure]:
        """The promised ones."""
        return [
            Figure("cold run / plain stream_generate", self.paired.ratio, "x", TARGET_RATIO, False),
            Figure("replies that differ from plain", float(not self.same_reply), "", 0, True),
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "reply_tokens": self.reply_tokens,
            "checkpoints": self.checkpoints,
            "forwards": self.forwards,
            "same_reply": self.same_reply,
            "paired": self.paired.as_json(),
        }

    def show(self, console: Console) -> None:
        """Print it."""
        paired = self.paired
        show(
            console,
            f"Cold: {self.prompt_tokens} tokens in, {self.reply_tokens} out, "
            f"{len(paired.a)} pairs, {self.checkpoints} checkpoints taken",
            ("", "median s", "ratio", "of pairs", "processor time"),
            [
                ("mlx_lm.stream_generate", f"{paired.a_seconds:.3f}", "", "", ""),
                (
                    "through an empty cache",
                    f"{paired.b_seconds:.3f}",
                    f"{paired.ratio:.3f}",
                    f"{min(paired.ratios):.3f} to {max(paired.ratios):.3f}",
                    f"{paired.cpu_ratio:.3f}",
                ),
            ],
        )


def measure_cold(
    model: Any, tokenizer: Any, prompt: list[int], *, max_tokens: int, pairs: int
) -> Cold:
    """Run `prompt` plainly and through an emptied cache, in turns."""
    replies: dict[str, list[int]] = {}

    def plain() -> None:
        made = stream_generate(model, tokenizer, prompt, max_tokens=max_tokens)
        replies["plain"] = [response.token for response in made]

    with HybridPromptCache(model, tokenizer, memory_budget="8GiB") as cache:

        def through_cache() -> None:
            made = cache.stream_generate(prompt, max_tokens=max_tokens)
            replies["cache"] = [response.token for response in made]

        def emptied() -> None:
            cache.clear()
            tidy()

        paired = measure(plain, through_cache, pairs=pairs, prepare_a=emptied, prepare_b=emptied)
        report = cache.last_report
    assert report is not None
    assert report.restored_tokens == 0
    return Cold(
        prompt_tokens=len(prompt),
        reply_tokens=len(replies["plain"]),
        checkpoints=report.checkpoints_taken,
        forwards=report.forwards,
        same_reply=replies["plain"] == replies["cache"],
        paired=paired,
    )
