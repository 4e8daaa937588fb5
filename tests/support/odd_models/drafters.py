"""Drafters of whom it is known what is wrong with what they say, and replies with them."""

import functools
from collections.abc import Sequence
from typing import Any

import oracle
import tiny
from mlx_lm.models import lfm2
from mlx_lm.models.cache import ConcatenateKVCache

from mlx_hybridcache import HybridPromptCache
from odd_models import quantizing


class Knowing:
    """Knows the reply to a prompt of `start` tokens; says `wrong` many false tokens behind `right` true ones.

    Unless it `trusts`, it checks that the history is what was written so far.
    """

    def __init__(
        self, start: int, reply: Sequence[int], right: int, wrong: int = 0, *, trusts: bool = False
    ) -> None:
        self.start, self.reply, self.right, self.wrong = start, list(reply), right, wrong
        self.trusts = trusts
        self.told: list[tuple[int, int]] = []

    def propose(self, history: Sequence[int], most: int) -> list[int]:
        """As `Drafter.propose`."""
        written = list(history[self.start :])
        assert self.trusts or written == self.reply[: len(written)], (
            "a drafter is shown what the reply is"
        )
        coming = self.reply[len(written) : len(written) + self.right]
        behind = self.reply[len(written) + self.right :]
        false = [(token + 1) % tiny.VOCAB for token in self.reply[: self.wrong]]
        if false[:1] and false[:1] == behind[:1]:  # it would be right by chance
            false[0] = (false[0] + 1) % tiny.VOCAB
        return [*coming, *false][:most]

    def accepted(self, drafted: int, accepted: int) -> None:
        """As `Drafter.accepted`."""
        self.told.append((drafted, accepted))

    def end(self, history: Sequence[int] | None) -> None:
        """As `Drafter.end`."""


def with_drafter(cache: HybridPromptCache, drafter: Any) -> None:
    """The cache's next replies that draft do so with this drafter, and never rest from it."""
    cache.engine.drafting.recurring = lambda request, live: drafter  # type: ignore[method-assign]


WIDER = {"wide jamba": {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}}
"""What a configuration without a `head_dim` needs for heads of 64."""


def _lfm2() -> Any:
    return lfm2.Model(
        lfm2.ModelArgs(
            model_type="lfm2",
            vocab_size=tiny.VOCAB,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            norm_eps=1e-6,
            conv_bias=False,
            conv_L_cache=3,
            block_dim=64,
            block_ff_dim=96,
            block_multiple_of=16,
            block_ffn_dim_multiplier=1.0,
            block_auto_adjust_ff_dim=False,
            full_attn_idxs=[1, 3],
            rope_theta=10000.0,
        )
    )


def _concatenating() -> Any:
    model = tiny.fresh("llama")
    model.make_cache = lambda: [ConcatenateKVCache() for _ in model.layers]
    return model


@functools.cache
def model_of(name: str) -> Any:
    """A tiny model: the shared one, LFM2 with its convolutions, one whose rows grow by concatenation, or a `wide` one
    to be quantized.
    """
    if name == "concatenating llama":
        return _concatenating()
    if name.startswith("wide "):
        return quantizing.wide(name.removeprefix("wide "), **WIDER.get(name, {}))
    return tiny.made(_lfm2) if name == "lfm2" else tiny.build(name)


def new_cache(name: str, **settings: Any) -> HybridPromptCache:
    """A cache for a tiny model, with checkpoints that lie close."""
    return HybridPromptCache(
        model_of(name),
        oracle.word_tokenizer(),
        memory_budget=settings.pop("memory_budget", "300MB"),
        prefill_step_size=64,
        checkpoint_every=settings.pop("checkpoint_every", 64),
        checkpoint_min_step=16,
        **settings,
    )
