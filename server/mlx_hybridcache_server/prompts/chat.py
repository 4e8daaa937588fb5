"""From messages to prompt tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_hybridcache.errors import PromptError
from mlx_hybridcache.tokens import TurnMarks, prompt_tokens

from ..adapter import (
    NORMAL,
    TAKEN,
    initial_state,
    may_reason,
    renders_text,
    without_template,
)
from ..errors import ApiError, refuse
from ..schema.requests import Conversation
from .abilities import Abilities
from .messages import for_template
from .tokenizing import NO_LIMIT, Room, Steps, Tokenizing


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt, the state in which its reply begins, and whether it may begin with reasoning."""

    tokens: list[int]
    state: str = NORMAL
    may_reason: bool = False


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders conversations with one tokenizer, in steps that are not for the event loop.

    Raises `ApiError` 400 for what has no `room`.
    """

    tokenizer: Any
    marks: TurnMarks
    vocabulary: int
    template_args: dict[str, Any]
    room: Room = NO_LIMIT
    _tokenizing: Tokenizing = field(init=False)
    _takes: Abilities = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tokenizing", Tokenizing.learn(self.tokenizer, self.room))
        takes = Abilities.learn(self._probe) if self.tokenizer.has_chat_template else Abilities()
        object.__setattr__(self, "_takes", takes)

    def text(self, prompt: str | Sequence[int], param: str = "prompt") -> Steps[Rendered]:
        """A raw prompt, as `/v1/completions` takes it."""
        if isinstance(prompt, str):
            prompt = yield from self._tokenizing.steps(prompt, param, special=True)
        else:
            self.room.check(len(prompt), param)
        yield len(prompt)
        return Rendered(_checked(prompt, self.vocabulary, param))

    def chat(
        self,
        body: Conversation,
        *,
        continues: bool = False,
        opens_reply: bool = True,
    ) -> Steps[Rendered]:
        """A conversation up to where its reply begins, or, if it `continues`, goes on."""
        messages = for_template(body.messages, self._takes)
        if not self.tokenizer.has_chat_template:
            roles = dict(body.role_mapping) if body.role_mapping else None
            return (yield from self.text(without_template(messages, roles), "messages"))
        if continues and messages[-1]["role"] != "assistant":
            raise refuse(
                "continue_final_message needs an assistant message at the end; the last one is "
                f"{messages[-1]['role']}.",
                "continue_final_message",
            )
        tokens = yield from self._apply(
            messages,
            tools=body.tools or None,
            add_generation_prompt=opens_reply and not continues,
            **({"continue_final_message": True} if continues else {}),
            **self._extra(body),
        )
        turn = self._last_turn(tokens)
        return Rendered(
            tokens, initial_state(self.tokenizer, turn), may_reason(self.tokenizer, turn)
        )

    def prefix(self, body: Conversation) -> Steps[list[int]]:
        """What every prompt begins with that begins with these messages.

        The tokens that two continuations have in common, and the first one behind: a template may
        need a user message to render at all, and the next turn's opener is shared as well.
        """
        both: list[list[int]] = []
        for word in ("0", "a"):
            following = {"role": "user", "content": word}
            longer = body.model_copy(update={"messages": [*body.messages, following]})
            rendered = yield from self.chat(longer, opens_reply=False)
            both.append(rendered.tokens)
        one, other = both
        pairs = enumerate(zip(one, other, strict=False))
        shared = next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
        return one[: shared + 1]

    def _probe(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        is_text = renders_text(self.tokenizer)
        found = self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=not is_text, **self.template_args
        )
        return found if is_text else str(self.tokenizer.decode(found))

    def _apply(self, messages: list[dict[str, Any]], **kwargs: Any) -> Steps[list[int]]:
        is_text = renders_text(self.tokenizer)
        try:
            found = self.tokenizer.apply_chat_template(messages, tokenize=not is_text, **kwargs)
            if is_text:
                found = yield from self._tokenizing.steps(found, "messages", special=False)
        except ApiError:
            raise
        except Exception as error:  # templates raise jinja2's errors, their authors' and Python's
            raise refuse(
                f"The model's chat template cannot render these messages: {error}", "messages"
            ) from error
        self.room.check(len(found), "messages")
        yield len(found)
        return _checked(found, self.vocabulary, "messages")

    def _extra(self, body: Conversation) -> dict[str, Any]:
        extra = {**self.template_args, **(body.chat_template_kwargs or {})}
        if body.reasoning_effort is not None:
            extra.setdefault("reasoning_effort", body.reasoning_effort)
        if taken := sorted(TAKEN & extra.keys()):
            raise refuse(
                f"chat_template_kwargs cannot set {', '.join(taken)}.", "chat_template_kwargs"
            )
        return extra

    def _last_turn(self, tokens: list[int]) -> list[int]:
        """Markers of earlier turns, or that a user has written, say nothing about this reply."""
        for at in range(len(tokens) - 1, -1, -1):
            if tokens[at] in self.marks.openers:
                return tokens[at:]
        return tokens


def _checked(ids: Iterable[int], vocabulary: int, param: str) -> list[int]:
    try:
        tokens: list[int] = prompt_tokens(ids, vocabulary).tolist()
    except PromptError as error:
        raise refuse(str(error), param) from error
    return tokens
