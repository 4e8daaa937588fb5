"""From messages to prompt tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_hybridcache.errors import PromptError
from mlx_hybridcache.prefill.schedule import FIRST_WORTH
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
from .canonical import canonical
from .messages import for_template
from .stable import Arranged, StablePrefix, arranged, places, with_note
from .tokenizing import NO_LIMIT, Room, Steps, Tokenizing

NEXT = "xyzzy"
"""What a user says next where the prompt up to there is wanted: letters, with which most of what could
stand before them melts into one token, and no word that others write."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt, the state in which its reply begins, and whether it may begin with reasoning."""

    tokens: Tokens
    state: str = NORMAL
    may_reason: bool = False
    stable: StablePrefix | None = None


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
    stable_prefix: str | None = None
    canonical_tools: bool = False
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
        found = self._arranged(body)
        messages = with_note(for_template(found.messages, self._takes), found.note)
        if not self.tokenizer.has_chat_template:
            text = without_template(messages, _roles(body))
            return (yield from self.text(text, "messages", salt=salt))
        if continues and messages[-1]["role"] != "assistant":
            raise refuse(
                "continue_final_message needs an assistant message at the end; the last one is "
                f"{messages[-1]['role']}.",
                "continue_final_message",
            )
        rendered = self._rendered(
            messages,
            tools=self._tools(body),
            add_generation_prompt=opens_reply and not continues,
            **({"continue_final_message": True} if continues else {}),
            **self._extra(body),
        )
        tokens = yield from self._tokens(rendered, salt or "")
        text = rendered if isinstance(rendered, str) else ""
        turn = self._last_turn(tokens)
        return Rendered(
            tokens,
            initial_state(self.tokenizer, turn),
            may_reason(self.tokenizer, turn),
            (yield from self._stable(body, found, text, tokens, salt or "")),
        )

    def prompt(self, body: Conversation, *, opens_reply: bool = True) -> str:
        """A conversation's prompt as text. Not for the event loop. Raises `ApiError` 400 as `chat` does."""
        arranged = self._arranged(body)
        messages = with_note(for_template(arranged.messages, self._takes), arranged.note)
        if not self.tokenizer.has_chat_template:
            return without_template(messages, _roles(body))
        asked = {
            "tools": self._tools(body),
            "add_generation_prompt": opens_reply,
            **self._extra(body),
        }
        found = self._rendered(messages, **asked)
        return found if isinstance(found, str) else str(self.tokenizer.decode(found))

    def prefix(self, body: Conversation, *, salt: str | None = None) -> Steps[Tokens]:
        """What every prompt begins with that begins with these messages, and the first token behind it.

        A user speaks next, as a template may need one to render at all, and the next turn's opener is
        shared as well. Lines that are moved stand behind that.
        """
        told = [*self._arranged(body).messages, {"role": "user", "content": NEXT}]
        longer = body.model_copy(update={"messages": told, "stable_prefix": "off"})
        tokens = (yield from self.chat(longer, opens_reply=False, salt=salt)).tokens
        starts = range(len(tokens))
        behind = bisect_right(starts, False, key=lambda start: not self._holds_next(tokens[start:]))
        return tokens[: behind or len(tokens)]

    def _holds_next(self, tokens: Tokens) -> bool:
        return NEXT in str(self.tokenizer.decode(tokens.tolist()))

    def _probe(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        is_text = renders_text(self.tokenizer)
        found = self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=not is_text, **self.template_args
        )
        return found if is_text else str(self.tokenizer.decode(found))

    def _mode(self, body: Conversation) -> str:
        return body.stable_prefix or self.stable_prefix or body.unless_set

    def _arranged(self, body: Conversation) -> Arranged:
        return arranged(body.messages, body.tools or (), self._mode(body))

    def _orders(self, body: Conversation) -> bool:
        asked = body.canonical_tools
        return bool(body.tools) and (self.canonical_tools if asked is None else asked)

    def _tools(self, body: Conversation) -> list[dict[str, Any]] | None:
        """Those that the template renders, in their order."""
        return (canonical(body.tools) if body.tools and self._orders(body) else body.tools) or None

    def _tokens(self, rendered: str | list[int], salt: str) -> Steps[Tokens]:
        ids: Sequence[int] | Tokens = (
            (yield from self._tokenizing.steps(rendered, "messages", special=False, salt=salt))
            if isinstance(rendered, str)
            else rendered
        )
        self.room.check(len(ids), "messages")
        yield len(ids)
        return _checked(ids, self.vocabulary, "messages")

    def _stable(
        self, body: Conversation, found: Arranged, rendered: str, tokens: Tokens, salt: str
    ) -> Steps[StablePrefix | None]:
        """What was done for a prompt that is `rendered` as `tokens`, with where checkpoints belong."""
        mode, orders = self._mode(body), self._orders(body)
        if mode == "off" and not orders:
            return None
        first, boundaries = None, []
        for at in places(rendered, found.volatile):
            position = yield from self._position(rendered, at, tokens, salt)
            first = position if first is None else first
            if position >= FIRST_WORTH:
                boundaries.append(position)
                break
        if found.note and (at := rendered.rfind(found.note)) >= 0:
            boundaries.append((yield from self._position(rendered, at, tokens, salt)))
        return StablePrefix(mode, first, tuple(boundaries), found.moved, orders)

    def _position(self, rendered: str, at: int, tokens: Tokens, salt: str) -> Steps[int]:
        """How many of a prompt's tokens stand before the character `at`, in any prompt that begins so."""
        before = yield from self._tokenizing.steps(
            rendered[:at], "messages", special=False, salt=salt
        )
        return common_length(before, tokens)

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


def _roles(body: Conversation) -> dict[str, str] | None:
    return dict(body.role_mapping) if body.role_mapping else None


def _checked(ids: Iterable[int], vocabulary: int, param: str) -> Tokens:
    try:
        return prompt_tokens(ids, vocabulary)
    except PromptError as error:
        raise refuse(str(error), param) from error
