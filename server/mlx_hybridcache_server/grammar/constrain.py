"""Replies that can only be what was asked for: tokens that would break a grammar are masked out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Any, TypeVar

import llguidance.hf
import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from mlx_lm.generate import GenerationResponse

from mlx_hybridcache.cache import Through
from mlx_hybridcache.worker.turns import PAUSE, Pause

from ..adapter import REASONING, unwrapped
from ..errors import ApiError, refuse
from ..prompts.chat import Rendered
from ..schema.form import is_constrained, wanted_schema
from ..schema.requests import ChatBody, GenerationBody, NamedTool
from ..schema.tool_choice import callable_tools, is_forced
from .call_formats import FORMATS, for_reader
from .compiled import MOST_BYTES, Compiled, weight
from .narrowing import remainders
from .relaxing import ToolError, relaxed, without_notes_in
from .replies import written
from .speech import GrammarError, Layout, Reasoning, Speech, Tool, Wanted

MOST_MARKERS = 256
"""Of one model, whose tokens are remembered."""

T = TypeVar("T")
Responses = Iterator[GenerationResponse | Pause]


@dataclass(frozen=True, eq=False, slots=True)
class Constraint:
    """What a reply may be, compiled. `tools` is what the parser of its calls must be given."""

    vocabulary: LLTokenizer
    matchers: tuple[LLMatcher, ...]
    tools: list[Tool] | None = None

    def start(self) -> Guide:
        """The guide of one reply."""
        return Guide(self.vocabulary, [matcher.deep_copy() for matcher in self.matchers])


class Guide:
    """A logits processor for one reply, on the worker thread.

    It takes the tokens that it is shown first for the prompt's. A token more is a step; anything
    else, as when drafted tokens are taken back, makes it go back to where the two agree. It never
    raises, as others may be in the same batch: a reply that cannot go on ends, and `watching` tells
    its reader why.
    """

    def __init__(self, vocabulary: LLTokenizer, matchers: list[LLMatcher]):
        self._vocabulary = vocabulary
        self._ends = frozenset(vocabulary.eos_tokens)
        self._matchers = matchers
        self._mask, self._other = (
            allocate_token_bitmask(1, vocabulary.vocab_size) for _ in range(2)
        )
        self._prompt: int | None = None
        self._tokens: list[int] = []
        self._taken = 0  # tokens that the matchers were shown: not the end, nor a failure
        self._failure: ApiError | None = None

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """`logits` (1, vocabulary) with everything at minus infinity that cannot come next."""
        last = tokens[-1:]
        # In this order the model's forward goes on while the mask is made.
        mx.async_eval(last)
        mx.async_eval(logits)
        self._follow(tokens, last)
        if self._failure is None and self._taken < len(self._tokens):
            return logits  # behind the end: computed ahead, and never looked at
        if self._failure is None:
            self._fill()
        if self._failure is not None:
            self._mask[:] = 0
            for token in self._ends:
                self._mask.view(np.uint32)[0, token // 32] |= np.uint32(1 << token % 32)
        return masked(logits, self._mask[0], self._vocabulary.vocab_size)

    def may_follow(self, tokens: Sequence[int]) -> int:
        """As `Foreseeing.may_follow`: how many of them the grammar lets through."""
        if self._failure is not None or self._taken < len(self._tokens):
            return len(tokens)
        size = self._vocabulary.vocab_size
        # A matcher that is asked of another one allows nothing from then on.
        known = [*takewhile(lambda token: token < size, tokens)]
        return min(matcher.validate_tokens(known) for matcher in self._matchers)

    def watching(self, through: Through[T]) -> Through[T]:
        """`through`, shown responses up to where the reply could not go on, and `ApiError` there."""

        def watched(responses: Responses) -> Responses:
            count = 0
            for response in responses:
                count += response is not PAUSE
                if self._failure is not None and count > self._taken:
                    raise self._failure
                yield response

        return lambda responses: through(watched(responses))

    def _follow(self, tokens: mx.array, last: mx.array) -> None:
        """Bring the matchers to where `tokens` end."""
        if self._prompt is None:
            self._prompt = tokens.size
            return
        assert tokens.size >= self._prompt, "a history does not lose its beginning"
        known = self._tokens
        if tokens.size - self._prompt == len(known) + 1:
            new = [int(np.array(last)[0])]
        else:
            now: list[int] = np.array(tokens[self._prompt :]).tolist()
            pairs = enumerate(zip(known, now, strict=False))
            kept = next((at for at, (a, b) in pairs if a != b), min(len(known), len(now)))
            self._go_back(kept)
            new = now[kept:]
        for token in new:
            self._take(token)

    def _go_back(self, kept: int) -> None:
        del self._tokens[kept:]
        if kept < self._taken:
            for matcher in self._matchers:
                matcher.rollback(self._taken - kept)
            self._taken = kept
            if not any(matcher.is_error() for matcher in self._matchers):
                self._failure = None

    def _take(self, token: int) -> None:
        is_behind = self._taken < len(self._tokens)
        self._tokens.append(token)
        if is_behind or self._failure is not None:
            return
        ends = token in self._ends
        for matcher in self._matchers:
            if not (matcher.is_accepting() if ends else matcher.consume_token(token)):
                self._fail(matcher.get_error() or f"the token {token} was not allowed")
                return
        self._taken += not ends

    def _fill(self) -> None:
        for matcher in self._matchers:
            mask = self._mask if matcher is self._matchers[0] else self._other
            fill_next_token_bitmask(matcher, mask)
            if matcher.is_error():
                self._fail(matcher.get_error())
                return
            if mask is self._other:
                self._mask &= self._other
        if not self._mask.any():
            self._fail(
                "nothing may follow. A text that marks a part of this model's replies cannot stand "
                "in a value"
            )

    def _fail(self, why: str) -> None:
        self._failure = ApiError(
            400,
            f"The reply could not be kept to what was asked for: {_brief(why)}.",
            code="constraint_failed",
        )


def masked(logits: mx.array, words: np.ndarray[Any, Any], size: int) -> mx.array:
    """`logits` (1, V) where bit i of the int32 `words` is set for i < `size`, else minus infinity."""
    bits = mx.array(words.view(np.uint32))[:, None] >> mx.arange(32, dtype=mx.uint32) & 1
    allowed = bits.reshape(-1).astype(mx.bool_)[:size]
    rows = logits.shape[-1]
    if rows > size:  # a model's vocabulary may be padded
        allowed = mx.concatenate([allowed, mx.zeros(rows - size, mx.bool_)])
    return mx.where(allowed[:rows], logits, -mx.inf)


@dataclass(eq=False)
class Constraints:
    """Compiles constraints for one model and keeps the last. Slow: not for the event loop."""

    tokenizer: Any
    compiled: Compiled[tuple[LLMatcher, ...]] = field(default_factory=Compiled)

    def of(self, body: GenerationBody, rendered: Rendered) -> Constraint | None:
        """What `body` asks of the reply to `rendered`, if it asks for anything.

        Raises `ApiError` 400 for what no grammar can be made of.
        """
        if not is_constrained(body):
            return None
        schema, forced = wanted_schema(body), is_forced(body)
        tools = callable_tools(body) if isinstance(body, ChatBody) else []
        is_free = schema is None and not forced
        if is_free and not (tools and self._can_narrow(body)):
            return None  # what is called otherwise is text
        if isinstance(body, ChatBody) and body.continue_final_message:
            raise refuse(
                "A message that goes on cannot be held to a form; leave out "
                "continue_final_message, or response_format and tool_choice.",
                "continue_final_message",
            )
        wanted = Wanted(
            schema=None if forced else schema,
            tools=tools,
            most_calls=_most_calls(body),
            reasoning=_reasoning(rendered),
            is_plain=not isinstance(body, ChatBody),
            is_free=is_free,
        )
        try:
            wanted = replace(wanted, tools=[without_notes_in(tool) for tool in tools])
            wanted, matchers, said = self._followed(wanted)
        except RecursionError as error:
            raise refuse("This schema is nested too deeply.", _param(wanted, error)) from error
        except ValueError as error:  # ours, and text that is not Unicode
            raise refuse(str(error), _param(wanted, error)) from error
        for sentence in said:
            body.warn("tools", sentence)
        read_as = for_reader(self.speech, wanted.tools) if tools else None
        return Constraint(self.vocabulary, matchers, read_as)

    def _followed(self, wanted: Wanted) -> tuple[Wanted, tuple[LLMatcher, ...], list[str]]:
        """What is wanted as far as it can be followed, compiled, and what of it cannot."""
        try:
            return wanted, self._compiled(wanted), []
        except GrammarError:
            if self.speech.parser not in FORMATS:
                raise
            followed, said = relaxed(wanted, self._fault)
            if not said:
                raise
        return followed, self._compiled(followed), said

    def _fault(self, wanted: Wanted) -> str | None:
        try:
            grammar = written(self.speech, wanted)[0]
        except GrammarError as error:
            return str(error).rstrip(".")
        _check_size(len(grammar))  # reading one without a bound overflows the stack
        found = _brief(LLMatcher.validate_grammar(grammar, self.vocabulary))
        _, _, of_pattern = found.rpartition("\nerror: ")  # behind the pattern, on lines of its own
        return of_pattern or found.removeprefix("failed to compile JSON schema: ") or None

    def _can_narrow(self, body: GenerationBody) -> bool:
        """Whether calls can be held to some tools in a reply that is free otherwise."""
        if isinstance(body, ChatBody) and body.continue_final_message:
            return False
        try:
            speech = self.speech
        except GrammarError:
            return False
        return speech.parser in FORMATS and speech.call_token() is not None

    @cached_property
    def speech(self) -> Speech:
        """How this model marks the parts of its replies."""
        tokenizer = self.tokenizer
        parser = tokenizer.tool_parser
        return Speech(
            tokenizer.think_start,
            tokenizer.think_end,
            tokenizer.tool_call_start,
            tokenizer.tool_call_end,
            parser.__module__.rpartition(".")[2] if parser is not None else None,
            lru_cache(MOST_MARKERS)(self._token_of),  # asked for each parameter
            has_headers="[ARGS]" in str(tokenizer.chat_template),
            layout=_layout(tokenizer),
        )

    @cached_property
    def vocabulary(self) -> LLTokenizer:
        """The tokenizer as llguidance reads it."""
        inner = unwrapped(self.tokenizer)  # which alone knows the merges
        return llguidance.hf.from_tokenizer(inner, eos_token=sorted(self.tokenizer.eos_token_ids))

    def _token_of(self, marker: str) -> str | None:
        ids = self.tokenizer.encode(marker, add_special_tokens=False)
        if not any(map(self.vocabulary.is_special_token, ids)):
            return None
        return " ".join(f"<[{each}]>" for each in ids)

    def _compiled(self, wanted: Wanted) -> tuple[LLMatcher, ...]:
        grammars = written(self.speech, wanted)
        _check_size(sum(map(len, grammars)))
        count = remainders([wanted.schema, *(tool["function"] for tool in wanted.tools)])
        return self.compiled.get(grammars, weight(grammars, count), lambda: self._made(grammars))

    def _made(self, grammars: tuple[str, ...]) -> tuple[LLMatcher, ...]:
        made = tuple(LLMatcher(self.vocabulary, each, log_level=0) for each in grammars)
        for matcher in made:
            if matcher.is_error():
                raise GrammarError(f"This schema cannot be used: {_brief(matcher.get_error())}.")
        return made


def _check_size(nbytes: int) -> None:
    if nbytes > MOST_BYTES:
        raise GrammarError(
            f"This takes a grammar of {nbytes:,} bytes, descriptions left out; at most "
            f"{MOST_BYTES:,} are compiled. Ask for less in one reply: a smaller schema, or fewer tools."
        )


def _layout(tokenizer: Any) -> Layout:
    if tokenizer.response_transitions:
        return "messages"
    return "sections" if tokenizer.structural_markers else "plain"


def _most_calls(body: GenerationBody) -> int | None:
    if not isinstance(body, ChatBody):
        return None
    is_one = isinstance(body.tool_choice, NamedTool) or body.parallel_tool_calls is False
    return 1 if is_one else None


def _reasoning(rendered: Rendered) -> Reasoning:
    if rendered.state == REASONING:
        return "open"
    return "possible" if rendered.may_reason else "none"


def _param(wanted: Wanted, error: Exception) -> str:
    is_tool = isinstance(error, ToolError) or (wanted.tools and wanted.schema is None)
    return "tools" if is_tool else "response_format"


def _brief(error: str) -> str:
    """The library's message without its place in a grammar that the client has not written."""
    error = re.sub(r"^at \d+\(\d+\): ", "", error)
    return re.split(r"\n\s+\d+ \| |\n<state>", error)[0].strip().rstrip(".")
