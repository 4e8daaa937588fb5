"""What clients of llama.cpp's server send to have text turned into tokens, and back."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .requests import Body, Conversation, Count


class TokenizeBody(Body):
    """`POST /tokenize`. Special tokens in the text are read as such, as in every prompt here."""

    model: str | None = None
    content: str
    add_special: bool | None = None
    with_pieces: bool | None = None
    cache_salt: str | None = None


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[Count], Field(max_length=2_000_000)]


class TemplateBody(Conversation):
    """`POST /apply-template`: a chat without what it asks of its reply."""

    model: str | None = None
    add_generation_prompt: bool | None = None
