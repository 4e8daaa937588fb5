"""What the server takes from mlx-lm beyond the library: the one file to read when mlx-lm moves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    SPMStreamingDetokenizer,
    _byte_decoder,
)
from transformers import PreTrainedTokenizerBase

NORMAL, REASONING, TOOL = "normal", "reasoning", "tool"
"""The states of mlx-lm's text state machine that a reply is made of. It has others, without text."""

ASIDE = "tool in reasoning"
"""One of our own, behind which reasoning goes on: mlx-lm's would take what follows for content."""

TAKEN = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {
    "messages"
}
"""What `chat_template_kwargs` may not name: it would change how, not what, is rendered."""

Span = tuple[str, str]
"""A state and the text that was written in it, its markers left out."""


class Segmenter:
    """Splits generated text into reasoning, tool calls and the rest, across any chunks.

    What may be the beginning of a marker is held back until it is known not to be one. Without `calls`
    the markers of calls are text like any other.
    """

    def __init__(self, tokenizer: Any, initial_state: str, *, calls: bool = True):
        # A machine is not shared: `make_state` adds states to the one it is called on.
        machine = make_text_state_machine(tokenizer if calls else _WithoutCalls(tokenizer))
        _return_to_reasoning(machine)
        self._runtime = machine.make_state(initial_state)

    @property
    def state(self) -> str:
        """The state that the last character left behind."""
        return str(self._runtime[0])

    def feed(self, text: str) -> list[Span]:
        """The spans that `text` completes."""
        self._runtime, spans = TextStateMachine.split(self._runtime, text)
        return [(str(state), text) for state, text in spans]

    def end(self) -> list[Span]:
        """What was held back and is text after all."""
        self._runtime, text, state = TextStateMachine.flush(self._runtime)
        return [(str(state), text)]


class _WithoutCalls:
    """A tokenizer as mlx-lm's state machine sees it, of a model that has no markers of calls."""

    has_tool_calling = False

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        transitions = tokenizer.response_transitions
        self.response_transitions = {
            state: [edge for edge in edges if edge[1] != TOOL]
            for state, edges in transitions.items()
            if state != TOOL
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _return_to_reasoning(machine: TextStateMachine) -> None:
    """Let a call that begins within reasoning end there."""
    states = machine._states
    if REASONING not in states or TOOL not in states[REASONING][1]:
        return
    trie, targets = states[REASONING]
    states[REASONING] = (trie, tuple(ASIDE if each == TOOL else each for each in targets))
    trie, targets = states[TOOL]
    states[ASIDE] = (trie, tuple(REASONING if each == NORMAL else each for each in targets))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen: the fields of a request under mlx_lm.server's names."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 0.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    presence_context_size: int = 20
    frequency_penalty: float = 0.0
    frequency_context_size: int = 20

    def sampler(self, tokenizer: Any) -> Callable[[mx.array], mx.array]:
        """mlx-lm's sampler, which draws from the random stream of the thread that it runs on."""
        return make_sampler(
            self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            xtc_probability=self.xtc_probability,
            # No two tokens are likelier than a half, so beyond it nothing is left out; mlx-lm's own
            # server takes more and its sampler then refuses it.
            xtc_threshold=min(self.xtc_threshold, 0.5),
            xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
        )

    def processors(self) -> list[Callable[[mx.array, mx.array], mx.array]]:
        """mlx-lm's logits processors."""
        penalties = make_logits_processors(
            None,
            self.repetition_penalty,
            self.repetition_context_size,
            self.presence_penalty,
            self.presence_context_size,
            self.frequency_penalty,
            self.frequency_context_size,
        )
        return [*([_biased(self.logit_bias)] if self.logit_bias else []), *penalties]


def _biased(
    bias: Sequence[tuple[int, float]],
) -> Callable[[mx.array, mx.array], mx.array]:
    """mlx-lm's own processor for `logit_bias`, made when it is first called: on MLX's thread."""
    made: list[Callable[[mx.array, mx.array], mx.array]] = []

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        if not made:
            made.extend(make_logits_processors(dict(bias)))
        return made[0](tokens, logits)

    return processor


def initial_state(tokenizer: Any, tail: Sequence[int]) -> str:
    """The state in which a reply begins; `tail` are the prompt's tokens of the turn it belongs to."""
    if tokenizer.response_initial_state:
        return str(tokenizer.response_initial_state)
    if not tokenizer.has_thinking:
        return NORMAL
    opened, closed = (
        _last(list(tail), list(marker))
        for marker in (tokenizer.think_start_tokens, tokenizer.think_end_tokens)
    )
    return REASONING if opened > closed else NORMAL


def may_reason(tokenizer: Any, tail: Sequence[int]) -> bool:
    """Whether a reply may begin with reasoning: not behind a block that the template has closed."""
    if not tokenizer.has_thinking:
        return False
    return _last(list(tail), list(tokenizer.think_end_tokens)) < 0


def _last(tokens: list[int], marker: list[int]) -> int:
    """Where `marker` last begins in `tokens`, -1 if nowhere."""
    for at in range(len(tokens) - len(marker), -1, -1):
        if tokens[at] == marker[0] and tokens[at : at + len(marker)] == marker:
            return at
    return -1


def token_bytes(tokenizer: Any) -> Callable[[int], bytes]:
    """The bytes that each token id stands for; those of a reply's tokens join to its text.

    A leading space that SentencePiece adds to a text's first word is part of its token.
    """
    detokenizer = tokenizer.detokenizer
    added = {int(i): str(t).encode() for i, t in _added_tokens(tokenizer).items()}
    if isinstance(detokenizer, BPEStreamingDetokenizer):
        to_byte = _byte_decoder()

        def of(token: int) -> bytes:
            text = detokenizer.tokenmap[token] or ""
            return b"".join(
                bytes([to_byte[char]]) if char in to_byte else char.encode() for char in text
            )
    elif isinstance(detokenizer, SPMStreamingDetokenizer):

        def of(token: int) -> bytes:
            return bytes(detokenizer.tokenmap[token]).replace("\u2581".encode(), b" ")
    else:

        def of(token: int) -> bytes:
            return str(tokenizer.decode([token])).encode()

    return lambda token: added[token] if token in added else of(token)


def renders_text(tokenizer: Any) -> bool:
    """Whether a conversation becomes text first. Some tokenizers make tokens of it at once."""
    own = type(unwrapped(tokenizer)).apply_chat_template
    return tokenizer._chat_template is not None or (
        own is PreTrainedTokenizerBase.apply_chat_template
    )


def unwrapped(tokenizer: Any) -> Any:
    """The tokenizer of transformers that mlx-lm's wraps."""
    return tokenizer._tokenizer


def byte_letters() -> frozenset[str]:
    """The 256 letters in which byte-level vocabularies spell their tokens, one for each byte."""
    return frozenset(_byte_decoder())


def _added_tokens(tokenizer: Any) -> dict[int, Any]:
    return dict(getattr(tokenizer, "added_tokens_decoder", {}))


def without_template(messages: list[dict[str, Any]], roles: dict[str, str] | None) -> str:
    """Messages as text for a tokenizer that has no chat template, as mlx_lm.server writes them."""
    from mlx_lm.server import convert_chat  # slow to import, and seldom needed

    return str(convert_chat(messages, roles))
