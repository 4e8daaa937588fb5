"""Two requests, rendered as for replies: where the second parts from the first, and what does that.

What stands at the place is not guessed from its letters: each difference is undone in the second request, which
is rendered again, and the one is named behind which the prompts go on together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

from mlx_hybridcache.report import Divergence
from mlx_hybridcache.store.tree import common_length
from mlx_hybridcache.tokens import Tokens

from ..errors import ApiError
from ..prompts.chat import Renderer
from ..prompts.tokenizing import Steps
from ..schema.requests import ChatBody
from .asked import Asked, prompt_of, tokens_of
from .differences import Difference, Where, differences
from .kinds import Kind
from .texts import kind_between
from .turns import carried_over, first_thought

AROUND = Divergence.AROUND


@dataclass(frozen=True, slots=True)
class Cause:
    """What parts two prompts, where it stands, and what else differs behind it."""

    kind: Kind
    where: Where | None = None
    also: tuple[Difference, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two prompts that have `common` tokens in common. What is new in the second begins at `carried`."""

    first: Tokens
    second: Tokens
    common: int
    carried: int
    cause: Cause
    text: dict[str, str]


def compared(
    one: Asked, other: Asked, renderer: Renderer, apart: Kind | None = None, weight: int = 0
) -> Steps[Comparison]:
    """Both rendered and compared. They share nothing where something else keeps them `apart`.

    They weigh so many bytes, whatever of them their prompts show: so does each step that reads all of them.
    Raises `ApiError` 400 for what cannot be rendered.
    """
    first = yield from tokens_of(one, renderer)
    yield weight
    second = yield from tokens_of(other, renderer)
    common = common_length(first, second)
    if isinstance(one, ChatBody) and isinstance(other, ChatBody):
        pair = _Chats(one, other, first, second, common, renderer, weight)
        cause = yield from pair.cause()
        carried = yield from pair.carried()
    else:
        cause = _cause_of_texts(one, other, first, second, renderer)
        carried = common if cause.kind is Kind.APPENDED else len(second)
    cause = cause if apart is None else Cause(apart)
    yield len(second)
    text = around(renderer.tokenizer, second, common, first=first[common:], second=second[common:])
    return Comparison(first, second, common, carried, cause, text)


def around(tokenizer: Any, tokens: Tokens, at: int, **behind: Tokens) -> dict[str, str]:
    """The letters before the place where prompts part, and those with which each goes on."""
    parts = {"before": tokens[max(0, at - AROUND) : at], **behind}
    return {name: str(tokenizer.decode(part[:AROUND].tolist())) for name, part in parts.items()}


@dataclass(frozen=True, slots=True)
class _Chats:
    one: ChatBody
    other: ChatBody
    first: Tokens
    second: Tokens
    common: int
    renderer: Renderer
    weight: int

    def cause(self) -> Steps[Cause]:
        if len(self.first) == len(self.second) == self.common:
            return Cause(Kind.SAME)
        goes_on = len(self.other.messages) > len(self.one.messages)
        if goes_on and (yield from self._is_history_common()):
            return Cause(Kind.APPENDED)
        yield self.weight
        found = differences(self.one, self.other)
        if self.common == len(self.first):  # behind which only a switch can put something else
            is_switched = bool(found) and found[0].kind is Kind.ARGUMENTS
            return Cause(found[0].kind, found[0].where) if is_switched else Cause(Kind.APPENDED)
        at = yield from self._deciding(found)
        if at is not None:
            return Cause(found[at].kind, found[at].where, tuple(found[at + 1 :]))
        thought = first_thought(self.one.messages)
        if thought is not None:
            where = Where("messages", thought, "assistant", "reasoning")
            return Cause(Kind.REASONING_NOT_RENDERED, where, tuple(found))
        return Cause(Kind.UNKNOWN, None, tuple(found))

    def _is_history_common(self) -> Steps[bool]:
        """Whether the prompts part no earlier than where the first one opens its reply."""
        history = yield from self._tried(self.one, opens_reply=False)
        return self.common >= common_length(history, self.first)

    def _deciding(self, found: list[Difference]) -> Steps[int | None]:
        """The difference that parts the prompts: once it is undone with those before it, they part later."""
        if not found or not (yield from self._part_later(found)):
            return None
        least, most = 0, len(found) - 1
        while least < most:
            half = (least + most) // 2
            if (yield from self._part_later(found[: half + 1])):
                most = half
            else:
                least = half + 1
        return least

    def _part_later(self, undone: list[Difference]) -> Steps[bool]:
        body = reduce(lambda body, each: each.undo(body), undone, self.other)
        if not body.messages:  # nothing is left of the second one that could part them
            return True
        if body.messages[-1]["role"] != "assistant":  # of which there is nothing to go on with
            body = body.model_copy(update={"continue_final_message": None})
        tokens = yield from self._tried(body)
        return common_length(self.first, tokens) > self.common

    def carried(self) -> Steps[int]:
        """Up to which token the second prompt is what became of the first one's messages."""
        yield self.weight
        messages = self.other.messages
        end = carried_over(self.one.messages, messages)
        if end >= len(messages):
            return len(self.second)
        new = messages[end]
        changed: dict[str, Any] = {
            name: new[name] for name in ("role", "tool_call_id", "name") if name in new
        }
        changed["content"] = "a" if str(new.get("content")).startswith("0") else "0"
        body = self.other.model_copy(
            update={"messages": [*messages[:end], changed, *messages[end + 1 :]]}
        )
        tokens = yield from self._tried(body)
        return common_length(tokens, self.second)

    def _tried(self, body: ChatBody, *, opens_reply: bool = True) -> Steps[Tokens]:
        """The prompt of a chat that nobody asked for. Where that cannot be, the second's, which shows nothing."""
        yield self.weight
        try:
            return (yield from tokens_of(body, self.renderer, opens_reply=opens_reply))
        except ApiError:
            return self.second


def _cause_of_texts(
    one: Asked, other: Asked, first: Tokens, second: Tokens, renderer: Renderer
) -> Cause:
    """Of a prompt as it stands nothing is known but its text."""
    common = common_length(first, second)
    if common == len(first):
        return Cause(Kind.SAME if common == len(second) else Kind.APPENDED)
    if common == len(second):
        return Cause(Kind.REWOUND)
    if isinstance(one, ChatBody) or isinstance(other, ChatBody):
        return Cause(Kind.UNKNOWN)
    texts = [
        prompt
        if isinstance(prompt := prompt_of(each), str)
        else str(renderer.tokenizer.decode(prompt))
        for each in (one, other)
    ]
    return Cause(kind_between(*texts) or Kind.PROMPT_EDITED, Where("prompt"))
