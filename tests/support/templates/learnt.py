"""What is learnt of one template, held against what it renders, and what a next turn resumes at."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import chain, repeat
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import tiny
import tiny_models
from mlx_lm.models import qwen3_next
from mlx_lm.tokenizer_utils import TokenizerWrapper
from texts.made_tokenizers import byte_level
from tokenizers import AddedToken, decoders

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.tokenizing.turn_marks import learn_turn_marks
from mlx_hybridcache.tokens import TurnMarks

MARKER = re.compile(
    r"</?\|?[A-Za-z_][\w:]{0,40}\|?>|<\|[^|<>{}'\"\s]{1,40}\|>|<｜[^｜<>{}'\"]{1,40}｜>|\[/?[A-Z_]{3,30}\]|\[\|[a-z]+\|\]"
)
"""What is a token of its own in the vocabulary of a model that has such a template."""

NOT_SPECIAL = re.compile("think|tool|User｜|Assistant｜")
"""Those that are added and not special: as Qwen's, and DeepSeek's names."""

ROLES = ("system", "user", "assistant")

ANALYSIS = "<|channel|>analysis<|message|>so<|end|><|start|>assistant"
"""How harmony's replies reason."""

VOCABULARY = 640
STEP = 32
ASKED, ANSWER, NEXT = "What stands near the door?", "The lamp of Ada is red.", "And more?"


@dataclass
class Record:
    """What is known of one template. `turns` are by how a reply was written: "plain", "thought", "off" (with
    reasoning turned off): tokens that the next prompt shares with prompt and reply, those of these, and those restored.
    """

    name: str
    source: str = ""
    openers: list[str] = field(default_factory=list)
    user: str = ""
    reply: str = ""
    written: str = ""
    reasoning: str = ""
    turns: dict[str, list[int]] = field(default_factory=dict)
    kept: dict[str, bool] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def tokenizer_of(template: str, end: str = "</s>") -> TokenizerWrapper:
    """Bytes and a few words, and the template's markers; its model ends replies with `end`."""
    made = byte_level()
    markers = {*MARKER.findall(template), "<s>", "</s>"}
    markers |= {"<think>"} if "</think>" in markers else set()
    for opens, closes in (("<|", "|>"), ("[|", "|]")):
        if re.search(rf"{re.escape(opens)}(\{{\{{|')", template):  # the role between them
            markers |= {f"{opens}{role}{closes}" for role in ROLES}
    made.add_tokens(
        [
            AddedToken(each, special=not NOT_SPECIAL.search(each), normalized=False)
            for each in sorted(markers)
        ]
    )
    made.add_special_tokens({"bos_token": "<s>", "eos_token": end})
    made.backend_tokenizer.decoder = decoders.ByteLevel()
    made.chat_template = template
    return TokenizerWrapper(made)


class Talk:
    """Renders with one template, and knows how its model would write."""

    def __init__(self, template: str):
        self.template = template
        self.tokenizer = tokenizer_of(template)
        self.tokenizer = tokenizer_of(template, self._end())
        self.marks = learn_turn_marks(self.tokenizer)
        self.thinks = "think>" in template

    def _end(self) -> str:
        """The token by which its model ends a reply: harmony's own, or what the history has there."""
        if "<|return|>" in self.template:
            return "<|return|>"
        found = MARKER.match(self.prompt(ASKED, ANSWER, NEXT).partition(ANSWER)[2].lstrip())
        return found.group() if found else "</s>"

    def prompt(self, *said: str, reply: bool = True, **options: Any) -> str:
        """A conversation that a user begins, in text or in parts, as the template takes it."""
        for shaped in (str, lambda text: [{"type": "text", "text": text}]):
            messages = [
                {"role": ("user", "assistant")[at % 2], "content": shaped(text)}
                for at, text in enumerate(said)
            ]
            try:
                found = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=reply, **options
                )
            except Exception:  # templates raise what they like
                continue
            if all(text.strip() in found for text in said[-1:]):
                return str(found)
        return ""

    def ids(self, text: str) -> list[int]:
        """Its tokens."""
        return [*self.tokenizer.encode(text, add_special_tokens=False)]

    def ways(self) -> Iterator[tuple[str, list[int], list[int], list[int]]]:
        """How a reply is written, with its prompt, its tokens and the next turn's prompt."""
        plain = self.prompt(ASKED)
        opens = plain.rstrip().endswith("<think>")
        kept = "<think>" * opens
        if not opens:
            yield self._way("plain", plain, self._own(plain) + ANSWER, ANSWER)
        if self.thinks:
            thought = "<think>" * (not opens) + f"\nso\n</think>\n\n{ANSWER}"
            said = ANSWER if self._leaves_out else kept + thought
            yield self._way("thought", plain, thought, said)
        if "<|channel|>" in self.template:
            yield self._way("thought", plain, ANALYSIS + self._own(plain) + ANSWER, ANSWER)
        off = self.prompt(ASKED, enable_thinking=False)
        if "enable_thinking" in self.template and off != plain:
            yield self._way("off", off, self._own(off) + ANSWER, ANSWER, enable_thinking=False)

    @property
    def _leaves_out(self) -> bool:
        return (
            "so" not in self.prompt(ANSWER, "<think>\nso\n</think>\n\nLo", ANSWER).split(ANSWER)[1]
        )

    def _own(self, prompt: str) -> str:
        """What a past reply has before its text that the prompt for it has not: the model writes it."""
        past = self.prompt(ASKED, ANSWER, NEXT).partition(ANSWER)[0]
        whole = past.partition(ASKED)[2]
        parts = (at for at in range(len(whole) + 1) if prompt.endswith(whole[:at]))
        return whole[max(parts, default=0) :]

    def _way(
        self, name: str, prompt: str, reply: str, said: str, **options: Any
    ) -> tuple[str, list[int], list[int], list[int]]:
        following = self.prompt(ASKED, said, NEXT, **options)
        return name, self.ids(prompt), self.ids(reply), self.ids(following)


@cache
def model() -> nn.Module:
    """A hybrid of two recurrent layers and one of attention."""
    args = {**tiny_models.COMMON, "vocab_size": VOCABULARY}
    return tiny.made(
        lambda: qwen3_next.Model(
            qwen3_next.ModelArgs(
                model_type="qwen3_next",
                shared_expert_intermediate_size=32,
                mlp_only_layers=[],
                rope_theta=10000.0,
                partial_rotary_factor=0.25,
                **args,
                **tiny_models.GATED_DELTA,
                **tiny_models.EXPERTS,
            )
        )
    )


def learn(name: str, template: str, source: str = "") -> Record:
    """Everything of one template: what was learnt, and what the next turn of a conversation restores."""
    talk = Talk(template)
    marks = talk.marks
    record = Record(name, source, **_in_words(talk, marks))
    for way, prompt, reply, following in talk.ways():
        history = [*prompt, *reply]
        shared = _shared(history, following)
        record.kept[way] = not marks.strips(reply, np.array(prompt, dtype=np.int32))
        record.turns[way] = [shared, len(history), _restored(talk, prompt, reply, following)]
    return record


def _in_words(talk: Talk, marks: TurnMarks) -> dict[str, Any]:
    def text(ids: Sequence[int]) -> str:
        return str(talk.tokenizer.decode([*ids]))

    reasoning = "left out" if marks.strips_thinking else "kept"
    return {
        "openers": sorted(text(each) for each in [*([o] for o in marks.openers), *marks.phrases]),
        "user": text(marks.user_opener),
        "reply": text(marks.reply_opener),
        "written": text(marks.written),
        "reasoning": reasoning if talk.thinks else "",
    }


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _restored(
    talk: Talk, prompt: Sequence[int], reply: Sequence[int], following: Sequence[int]
) -> int:
    """Let a model write that reply, and ask the next turn."""
    settings = {"prefill_step_size": STEP, "checkpoint_every": STEP, "checkpoint_min_step": STEP}
    with HybridPromptCache(
        model(), talk.tokenizer, memory_budget="50MB", memory_reserve=0, **settings
    ) as cache:
        left = chain(reply, repeat(talk.tokenizer.eos_token_id))
        for _ in cache.stream_generate(
            prompt, len(reply) + 2, sampler=lambda _: mx.array([next(left)])
        ):
            pass
        found = cache.lookup(following)
        return found.restored_tokens
