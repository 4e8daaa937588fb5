"""What no cache can save of an exact repeat: its forwards of one token, and one copy of the rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache
from mlx_lm.utils import load

from mlx_hybridcache import HybridPromptCache

from ..kit.paired import Paired, Spent, copied, measure, tidy
from ..overhead.slices import forwards_of
from ..serving.scenarios import Material
from ..serving.side import fresh_nonce
from .chats import REPLY, conversation

WARM_UP = 2
"""Pairs before those that count."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Of one prompt: `parts` are one decode step (`a`) and one copy of its rows (`b`); in the others `a`
    is the floor, `forwards` steps and a copy, and `b` an exact repeat in the library, by ids or by text.
    """

    size: int
    tokens: int
    forwards: int
    row_bytes: int
    parts: Paired
    by_ids: Paired
    by_text: Paired

    @property
    def cpu_seconds(self) -> float:
        """Processor time of the floor."""
        return cpu_median(self.by_ids.a)

    @property
    def wall_seconds(self) -> float:
        """The same by the clock."""
        return self.by_ids.a_seconds

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        counts = {name: getattr(self, name) for name in ("size", "tokens", "forwards", "row_bytes")}
        pairs = {"parts": self.parts, "by_ids": self.by_ids, "by_text": self.by_text}
        return {
            **counts,
            **{
                name: {
                    **paired.as_json(),
                    "a_cpu_seconds": [spent.cpu_seconds for spent in paired.a],
                    "b_cpu_seconds": [spent.cpu_seconds for spent in paired.b],
                }
                for name, paired in pairs.items()
            },
        }


def measure_floors(
    model: str, material: Material, sizes: Sequence[int], pairs: int, told: Callable[[str], object]
) -> list[Floor]:
    """Of a conversation of each size, in this process."""
    loaded, tokenizer, *_ = load(model)
    with HybridPromptCache(loaded, tokenizer) as cache:
        found = []
        for size in sizes:
            told(f"the library, {size:,} tokens")
            messages = conversation(material, fresh_nonce(), size)
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            found.append(_Prompt(loaded, tokenizer, cache, text, size).floor(pairs))
    return found


class _Prompt:
    """One prompt, read before anything of it is measured."""

    def __init__(
        self, model: Any, tokenizer: Any, cache: HybridPromptCache, text: str, size: int
    ) -> None:
        self.model, self.cache, self.text, self.size = model, cache, text, size
        self.ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        self.repeat(self.text)
        with forwards_of(model) as lengths:
            self.repeat(self.ids)
        self.forwards = len(lengths)

    def floor(self, pairs: int) -> Floor:
        """All of it, in pairs."""
        count = 3 * (WARM_UP + pairs) * self.forwards
        ready = self.cache.prefill(self.ids, max_tokens=count + 1)
        caches: list[Any] = ready.prompt_cache
        rows = copied([each for layer in caches for each in _rows(layer, ready.position)])

        def step() -> None:
            logits = self.model(mx.array([self.ids[-1:]]), cache=caches)
            mx.eval(mx.argmax(logits[:, -1], axis=-1), [layer.state for layer in caches])

        def floor() -> None:
            for _ in range(self.forwards):
                step()
            copied(rows)

        def beside(a: Callable[[], object], b: Callable[[], object]) -> Paired:
            return measure(a, b, pairs=pairs, warm_up=WARM_UP, prepare_a=tidy, prepare_b=tidy)

        return Floor(
            self.size,
            len(self.ids),
            self.forwards,
            sum(each.nbytes for each in rows),
            parts=beside(step, lambda: copied(rows)),
            by_ids=beside(floor, lambda: self.repeat(self.ids)),
            by_text=beside(floor, lambda: self.repeat(self.text)),
        )

    def repeat(self, prompt: str | list[int]) -> None:
        """A reply of one token, to its end."""
        for _ in self.cache.stream_generate(prompt, max_tokens=REPLY):
            pass


def _rows(layer: Any, position: int) -> list[mx.array]:
    if not isinstance(layer, KVCache):
        return []
    held: Any = (layer.keys, layer.values)  # not empty: it has read the prompt
    return [each[..., :position, :] for each in held]


def cpu_median(spent: Sequence[Spent]) -> float:
    """Processor time, the median."""
    return statistics.median(each.cpu_seconds for each in spent)
