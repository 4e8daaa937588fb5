"""Pretrained weights through the cache: what random ones cannot show, as a reply that makes sense.

SmolLM2 135M and Gemma 3 270M as packages carry them, dequantized. Prompts of Gemma's reach beyond its window.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import pytest
from checkout.client_environments import NotInstallableError, environment
from checkout.real_weights import KINDS, loaded
from mlx_lm.models.cache import make_prompt_cache

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.demo.workloads import default_text

pytestmark = [pytest.mark.clients, pytest.mark.timeout(3600)]

STEP = 256
REPLY = 6
CHANGED = 8
"""Tokens of an ending that is another one."""

LENGTHS = {"SmolLM2 135M": 200, "Gemma 3 270M": 560}
"""Tokens of the first prompt; Gemma's window is 512."""

Caches = list[Any]


@dataclass
class Real:
    """A model with its tokenizer, and what it says without a cache: prompts go on from a shared beginning."""

    name: str
    model: nn.Module
    tokenizer: Any
    begun: dict[tuple[int, ...], Caches] = field(default_factory=dict)

    @property
    def text(self) -> list[int]:
        """Tokens of a real text."""
        return list(self.tokenizer.encode(default_text()[:12_000], add_special_tokens=False))

    def prompt(self) -> list[int]:
        """The first one."""
        return self.text[: LENGTHS[self.name]]

    def begin(self, tokens: list[int]) -> None:
        """Read a beginning that others go on from."""
        self.begun[tuple(tokens)] = self._read(make_prompt_cache(self.model), tokens)

    def cold(self, prompt: list[int]) -> list[int]:
        """The greedy reply of plain mlx-lm."""
        beginning = max(
            (each for each in self.begun if tuple(prompt[: len(each)]) == each), key=len
        )
        caches = copy.deepcopy(self.begun[beginning])
        self._read(caches, prompt[len(beginning) : -1])
        reply, feed = [], prompt[-1]
        for _ in range(REPLY):
            logits = self.model(mx.array([[feed]]), cache=caches)[0, -1]  # type: ignore[operator]
            feed = int(np.array(logits).argmax())
            reply.append(feed)
        return reply

    def _read(self, caches: Caches, tokens: list[int]) -> Caches:
        for at in range(0, len(tokens), STEP):
            self.model(mx.array([tokens[at : at + STEP]]), cache=caches)  # type: ignore[operator]
            mx.eval([cache.state for cache in caches])
        return caches


@pytest.fixture(scope="module", params=KINDS)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Real:
    """The weights, installed and dequantized once."""
    try:
        made = environment("weights", Path(request.config.cache.mkdir("clients")))  # type: ignore[union-attr]
    except NotInstallableError as error:
        pytest.skip(f"the weights cannot be installed: {error}")
    model, tokenizer = loaded(KINDS[request.param], made, tmp_path_factory.mktemp("weights"))
    real = Real(request.param, model, tokenizer)
    real.begin(real.prompt()[: -2 * CHANGED])
    return real


def opened(real: Real, **settings: Any) -> HybridPromptCache:
    return HybridPromptCache(
        real.model, real.tokenizer, memory_budget="2GB", prefill_step_size=STEP, **settings
    )


def asked(cache: HybridPromptCache, prompt: list[int]) -> tuple[list[int], str, int]:
    """The reply's tokens and text, and the tokens that were restored."""
    stream = cache.stream_generate(prompt, REPLY, sampler=oracle.never_ending)
    pieces = list(stream)
    text = "".join(piece.text for piece in pieces)
    return [piece.token for piece in pieces], text, stream.report.restored_tokens


@pytest.fixture
def cache(real: Real) -> Iterator[HybridPromptCache]:
    with opened(real) as made:
        yield made


def test_repeats_next_turns_and_changed_endings_say_what_plain_mlx_lm_says(
    real: Real, cache: HybridPromptCache
) -> None:
    """Restored to all but the last token, or to before the changed ending; the texts are equal."""
    prompt = real.prompt()
    expected = real.cold(prompt)
    reply, text, restored = asked(cache, prompt)
    assert (reply, restored) == (expected, 0)
    assert text.strip()
    assert asked(cache, prompt) == (expected, text, len(prompt) - 1)

    further = [*prompt, *reply, *real.text[1000:1020]]
    reply, text, restored = asked(cache, further)
    assert restored >= len(prompt)
    assert reply == real.cold(further)
    assert real.tokenizer.decode(reply) == text

    changed = [*prompt[:-CHANGED], *real.text[2000 : 2000 + CHANGED]]
    reply, _, restored = asked(cache, changed)
    assert restored >= len(prompt) - 64 - CHANGED
    assert reply == real.cold(changed)


def test_a_model_that_speaks_says_what_comes_next(real: Real) -> None:
    """Weights in the wrong places would say anything, hot and cold alike."""
    ids = list(
        real.tokenizer.encode("Monday, Tuesday, Wednesday, Thursday,", add_special_tokens=False)
    )
    bos = [2] if real.name.startswith("Gemma") else []
    real.begin([*bos, ids[0]])
    assert "Friday" in real.tokenizer.decode(real.cold([*bos, *ids]))


def test_what_a_smaller_store_costs_is_measured_and_small(
    real: Real, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 bits a number: `docs/exactness.md` has what was found."""
    with opened(real, store_kv=8, store_state="int8") as made:
        error = made.info.store_error
    assert error is not None
    with capsys.disabled():
        print(f"\n{real.name}: {error.sentence}")
    assert error.mean_kl < 1e-2
