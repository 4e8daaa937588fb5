"""What a reader has to know before believing a figure: found in the figures themselves."""

from __future__ import annotations

from collections.abc import Iterator

from ..kit.tables import size_text
from ..serving.scenarios import AGAIN, COLD, RESTART
from .results import Measured, Request

CUT = 0.8
"""A prompt of which the server read less than this share was probably cut."""

WARM = 0.1
"""A prompt of which more than this share was cached was not cold."""


def odd(found: Measured) -> Iterator[str]:
    """A sentence for each oddity of a server, as it continues the server's name."""
    for request in found.requests:
        yield from request.notes
    plain = [each for each in found.requests if each.scenario in ("repeat", RESTART)]
    yield from _cut(plain)
    yield from _not_cold(plain)
    yield from _counts_less_when_hot(plain)


def _cut(requests: list[Request]) -> Iterator[str]:
    for size in sorted({each.size for each in requests}):
        told = [r.prompt_tokens for r in requests if r.size == size and r.step == COLD]
        counts = [each for each in told if each is not None]
        if counts and max(counts) < CUT * size:
            yield (
                f"read only {max(counts):,} tokens of prompts of about {size_text(size)}: its "
                "context is too small for them (llama-server: --ctx-size; Ollama: "
                "OLLAMA_CONTEXT_LENGTH; LM Studio: the model's context length)"
            )


def _not_cold(requests: list[Request]) -> Iterator[str]:
    for each in requests:
        cached, prompt = each.cached_tokens, each.prompt_tokens
        if each.step == COLD and cached and prompt and cached > WARM * prompt:
            yield "had part of a new prompt cached, so that its cold times are too good"
            return


def _counts_less_when_hot(requests: list[Request]) -> Iterator[str]:
    cold = {(r.size, r.run): r.prompt_tokens for r in requests if r.step == COLD}
    for each in requests:
        whole, prompt = cold.get((each.size, each.run)), each.prompt_tokens
        if each.step == AGAIN and whole and prompt is not None and prompt < CUT * whole:
            yield "counts as prompt only what it read when part of it was cached"
            return
