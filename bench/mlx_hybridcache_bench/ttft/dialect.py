"""What a server can do, learnt from a few short requests before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass

from ..kit.text import ByCharacters
from ..serving.client import CHAT, COMPLETIONS, NO_USAGE, Reply, RequestFailed
from ..serving.scenarios import Material, Step
from ..serving.servers import ServerError
from ..serving.side import fresh_nonce
from ..serving.target import Target

NO_OPTIONS = "refuses stream_options, and was asked without"
NO_COMPLETIONS = "has no /v1/completions, so raw text was not measured"
ESTIMATED = "sizes are estimates: 4 characters were taken for a token"

USUAL_CHARACTERS = 4.0
SHORT, LONG = 200, 1_200
"""Tokens of two probes; what the template adds to both falls out of their difference."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """Whether it completes raw text, what is odd about it, and how long its tokens are."""

    completes: bool
    notes: tuple[str, ...]
    characters_per_token: float


def learn(target: Target) -> Dialect:
    """Ask it. Raises `ServerError` when it answers no chat at all."""
    notes: list[str] = []
    material = Material(ByCharacters(USUAL_CHARACTERS), LONG)
    try:
        short = _without_options(target, _probe(material, SHORT), notes)
        long = target.ask(_probe(material, LONG))
    except RequestFailed as error:
        raise ServerError(f"{target.name} does not answer a short question: {error}") from error
    try:
        target.ask(Step("probe", COMPLETIONS, {"prompt": "The if statement", "max_tokens": 2}))
        completes = True
    except RequestFailed as error:
        if error.status is None:
            raise ServerError(f"{target.name} failed in /v1/completions: {error}") from error
        completes = False
        notes.append(NO_COMPLETIONS)
    return Dialect(completes, (*notes, *short.notes), _characters_per_token(short, long))


def _without_options(target: Target, step: Step, notes: list[str]) -> Reply:
    """The reply, if need be to the request without the field that older servers do not know."""
    try:
        return target.ask(step)
    except RequestFailed as error:
        if error.status not in (400, 422):
            raise
        target.leave_out("stream_options")
        reply = target.ask(step)
        notes.append(NO_OPTIONS)
        return reply


def _probe(material: Material, tokens: int) -> Step:
    text = f"{fresh_nonce()}\n{material.text(tokens)}"
    return Step("probe", CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": 2})


def _characters_per_token(short: Reply, long: Reply) -> float:
    if short.prompt_tokens is None or long.prompt_tokens is None:
        return USUAL_CHARACTERS
    tokens = long.prompt_tokens - short.prompt_tokens
    return (LONG - SHORT) * USUAL_CHARACTERS / tokens if tokens > 0 else USUAL_CHARACTERS


def material_for(dialect: Dialect, tokenizer: object | None, tokens: int) -> Material:
    """Text by the model's own tokens, or by their measured length."""
    return Material(tokenizer or ByCharacters(dialect.characters_per_token), tokens)


def says_sizes(dialect: Dialect) -> bool:
    """Whether the server tells how many tokens it was sent."""
    return NO_USAGE not in dialect.notes
