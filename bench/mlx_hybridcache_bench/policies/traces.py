"""Traces: lists of requests as token ids, generated or recorded, and their file format.

A trace file is JSON Lines in UTF-8. The first line is `{"format": "mlx_hybridcache trace 1"}`; every
other line is one request, in the order in which they came:

    {"t": 12.5, "conversation": "3", "tokens": [...], "turns": [3, 820], "reply": 2,
     "keeps_reply": true, "reply_tokens": [...]}

* `t`: seconds since the recording began.
* `conversation`: a name that a client gave its conversation, or null. No policy of ours looks at it.
* `tokens`: one unsigned 32-bit number for each token of the prompt. A recording holds no token ids: number
  i is a keyed hash of tokens 0 to i, so that two prompts have equal numbers exactly as far as they are
  equal. Generated traces hold plain ids. Whoever reads only compares.
* `turns`: the positions just behind the tokens that open a turn, ascending.
* `reply`: how many tokens were generated.
* `keeps_reply`: false when the chat template leaves part of this reply (its reasoning) out of the
  conversation's next prompt.
* `reply_tokens`: the reply's own numbers, continuing those of `tokens`. May be missing; then nothing
  can be said of the state at the reply's end, and it counts as not saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hybridcache.errors import PromptError
from mlx_hybridcache.tokens import Tokens

FORMAT = "mlx_hybridcache trace 1"


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request of a trace.

    `tokens` and `reply` are int32, whatever 32 bits the file held; `turns` are positions behind turn
    openers. `reply_tokens` counts what was generated, also where `reply` is unknown and empty.
    """

    seconds: float
    conversation: str | None
    tokens: Tokens
    turns: tuple[int, ...]
    reply: Tokens
    reply_tokens: int
    keeps_reply: bool

    @property
    def history(self) -> Tokens:
        """The prompt and, where its end may come back, the reply."""
        return np.concatenate([self.tokens, self.reply]) if self.keeps_reply else self.tokens

    def as_json(self) -> dict[str, Any]:
        """One line of a trace file."""
        return {
            "t": self.seconds,
            "conversation": self.conversation,
            "tokens": self.tokens.view(np.uint32).tolist(),
            "turns": list(self.turns),
            "reply": self.reply_tokens,
            "keeps_reply": self.keeps_reply,
            "reply_tokens": self.reply.view(np.uint32).tolist(),
        }


def write_trace(path: Path, trace: Iterable[TracedRequest]) -> None:
    """Write a trace file."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"format": FORMAT}) + "\n")
        for asked in trace:
            file.write(json.dumps(asked.as_json(), separators=(",", ":")) + "\n")


def read_trace(path: Path) -> list[TracedRequest]:
    """Every request of a trace file, in the order in which they came.

    A server writes them as they end. Raises `PromptError`, which names the line, for a file of another format.
    """
    return sorted(_requests(path), key=lambda asked: asked.seconds)


def _requests(path: Path) -> Iterator[TracedRequest]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                read = json.loads(line)
                if number == 1:
                    if read.get("format") != FORMAT:
                        raise PromptError(
                            f"{path} begins with {line.strip()[:60]!r}, not with "
                            f'{{"format": "{FORMAT}"}}. Is it a trace that this version wrote?'
                        )
                    continue
                yield _asked(read)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                if isinstance(error, PromptError):
                    raise
                raise PromptError(
                    f"Line {number} of {path} is not a request of a trace ({error!r}). "
                    "Was the recording cut short? Delete that line."
                ) from error


def _asked(read: dict[str, Any]) -> TracedRequest:
    tokens = _numbers(read["tokens"])
    if len(tokens) == 0:
        raise ValueError("no tokens")
    turns = tuple(int(turn) for turn in read["turns"])
    if list(turns) != sorted(set(turns)) or (
        turns and not 0 < turns[0] <= turns[-1] <= len(tokens)
    ):
        raise ValueError("turns must ascend within the prompt")
    reply = _numbers(read.get("reply_tokens") or [])
    return TracedRequest(
        seconds=float(read["t"]),
        conversation=read["conversation"],
        tokens=tokens,
        turns=turns,
        reply=reply,
        reply_tokens=max(int(read["reply"]), len(reply)),
        keeps_reply=bool(read["keeps_reply"]) and len(reply) > 0,
    )


def _numbers(values: Sequence[int]) -> Tokens:
    return np.array(values, dtype=np.uint32).view(np.int32)


def summary(trace: Sequence[TracedRequest]) -> dict[str, int]:
    """What a trace is made of: requests, conversations, tokens."""
    lengths = [len(asked.tokens) for asked in trace]
    return {
        "requests": len(trace),
        "conversations": len({asked.conversation for asked in trace}),
        "prompt_tokens": sum(lengths),
        "longest_tokens": max(lengths, default=0),
        "reply_tokens": sum(asked.reply_tokens for asked in trace),
    }
