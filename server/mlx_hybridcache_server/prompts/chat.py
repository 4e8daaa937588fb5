"""From messages to prompt tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_hybridcache.errors import PromptError
from mlx_hybridcache.store.tree import common_length
from mlx_hybridcache.tokenizing.encoder import Encoder
from mlx_hybridcache.tokens import Tokens, TurnMarks, prompt_tokens

from ..adapter import (
    NORMAL,
    TAKEN,
    initial_state,
    may_reason,
    renders_text,
    without_template,
)
from ..errors import refuse
from ..schema.requests import Conversation
from .abilities import Abilities
from .messages import for_template
from .tokenizing import NO_LIMIT, Room, Steps, Tokenizing


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt, the state in which its reply begins, and whether it may begin with reasoning."""

    tokens: Tokens
    state: str = NORMAL
    may_reason: bool = False


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders conversations with one tokenizer, in steps that are not for the event loop.

    Raises `ApiError` 400 for what has no `room`. What was tokenized for one `salt` is not known to another.
    """

    tokenizer: Any
    marks: TurnMarks
    vocabulary: int
    template_args: dict[str, Any]
    room: Room = NO_LIMIT
    encoder: Encoder | None = None
    _tokenizing: Tokenizing = field(init=False)
    _takes: Abilities = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "_tokenizing", Tokenizing.learn(self.tokenizer, self.room, self.encoder)
        )
        takes = Abilities.learn(self._probe) if self.tokenizer.has_chat_template else Abilities()
        object.__setattr__(self, "_takes", takes)

    def text(
        self,
        prompt: str | Sequence[int],
        param: str = "prompt",
        *,
        special: bool = True,
        salt: str | None = None,
    ) -> Steps[Rendered]:
        """A raw prompt, as `/v1/completions` takes it, with what opens and closes every one if `special`."""
        if isinstance(prompt, str):
            ids: Iterable[int] = yield from self._tokenizing.steps(
                prompt, param, special=special, salt=salt or ""
            )
        else:
            self.room.check(len(prompt), param)
            ids = prompt
        yield len(prompt)
        return Rendered(_checked(ids, self.vocabulary, param))

    def chat(
        self,
        body: Conversation,
        *,
        continues: bool = False,
        opens_reply: bool = True,
        salt: str | None = None,
    ) -> Steps[Rendered]:
        """A conversation up to where its reply begins, or, if it `continues`, goes on."""
        messages = for_template(body.messages, self._takes)
        if not self.tokenizer.has_chat_template:
            roles = dict(body.role_mapping) if body.role_mapping else None
            return (yield from self.text(without_template(messages, roles), "messages", salt=salt))
        if continues and messages[-1]["role"] != "assistant":
            raise refuse(
                "continue_final_message needs an assistant message at the end; the last one is "
                f"{messages[-1]['role']}.",
                "continue_final_message",
            )
        tokens = yield from self._apply(
            messages,
            salt or "",
            tools=body.tools or None,
            add_generation_prompt=opens_reply and not continues,
            **({"continue_final_message": True} if continues else {}),
            **self._extra(body),
        )
        turn = self._last_turn(tokens)
        return Rendered(
            tokens, initial_state(self.tokenizer, turn), may_reason(self.tokenizer, turn)
        )

    def prompt(self, body: Conversation, *, opens_reply: bool = True) -> str:
        """A conversation's prompt as text. Not for the event loop. Raises `ApiError` 400 as `chat` does."""
        messages = for_template(body.messages, self._takes)
        if not self.tokenizer.has_chat_template:
            roles = dict(body.role_mapping) if body.role_mapping else None
            return without_template(messages, roles)
        asked = {
            "tools": body.tools or None,
            "add_generation_prompt": opens_reply,
            **self._extra(body),
        }
        found = self._rendered(messages, **asked)
        return found if isinstance(found, str) else str(self.tokenizer.decode(found))

    def prefix(self, body: Conversation, *, salt: str | None = None) -> Steps[Tokens]:
        """What every prompt begins with that begins with these messages.

        The tokens that two continuations have in common, and the first one behind: a template may
        need a user message to render at all, and the next turn's opener is shared as well.
        """
        both: list[Tokens] = []
        for word in ("0", "a"):
            following = {"role": "user", "content": word}
            longer = body.model_copy(update={"messages": [*body.messages, following]})
            rendered = yield from self.chat(longer, opens_reply=False, salt=salt)
            both.append(rendered.tokens)
        one, other = both
        return one[: common_length(one, other) + 1]

    def _probe(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        is_text = renders_text(self.tokenizer)
        found = self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=not is_text, **self.template_args
        )
        return found if is_text else str(self.tokenizer.decode(found))

    def _apply(self, messages: list[dict[str, Any]], salt: str, **kwargs: Any) -> Steps[Tokens]:
        found = self._rendered(messages, **kwargs)
        if isinstance(found, str):
            found = yield from self._tokenizing.steps(found, "messages", special=False, salt=salt)
        self.room.check(len(found), "messages")
        yield len(found)
        return _checked(found, self.vocabulary, "messages")

    def _rendered(self, messages: list[dict[str, Any]], **kwargs: Any) -> Any:
        """What the template makes of them: text, or tokens of one that makes no text."""
        is_text = renders_text(self.tokenizer)
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=not is_text, **kwargs)
        except Exception as error:  # templates raise jinja2's errors, their authors' and Python's
            raise refuse(
                f"The model's chat template cannot render these messages: {error}", "messages"
            ) from error

    def _extra(self, body: Conversation) -> dict[str, Any]:
        extra = {**self.template_args, **(body.chat_template_kwargs or {})}
        if body.reasoning_effort is not None:
            extra.setdefault("reasoning_effort", body.reasoning_effort)
        if taken := sorted(TAKEN & extra.keys()):
            raise refuse(
                f"chat_template_kwargs cannot set {', '.join(taken)}.", "chat_template_kwargs"
            )
        return extra

    def _last_turn(self, tokens: Tokens) -> list[int]:
        """Markers of earlier turns, or that a user has written, say nothing about this reply."""
        openers = np.fromiter(self.marks.openers, dtype=np.int32)
        opened = np.flatnonzero(np.isin(tokens, openers))
        last: list[int] = tokens[opened[-1] if len(opened) else 0 :].tolist()
        return last


def _checked(ids: Iterable[int], vocabulary: int, param: str) -> Tokens:
    try:
        return prompt_tokens(ids, vocabulary)
    except PromptError as error:
        raise refuse(str(error), param) from error
