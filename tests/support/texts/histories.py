"""Seeded conversations as clients really send them: every mutation that OpenAI's API lets through, and more.

Every text is a word of its own, so that whoever renders one can be asked for all of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass
class History:
    """Messages; `words[i]` are those of message i that must be seen, reasoning left out."""

    seed: int
    messages: list[Message] = field(default_factory=list)
    words: list[list[str]] = field(default_factory=list)

    def questions(self) -> list[int]:
        """How many messages the client had when it asked for the next reply, for each time it did."""
        roles = [message["role"] for message in self.messages]
        asked = [at for at in range(1, len(roles)) if roles[at] == "assistant" != roles[at - 1]]
        return [*asked, len(roles)]


def without_reasoning(message: Message) -> Message:
    """A message as a client sends it back that keeps no reasoning."""
    kept = {k: v for k, v in message.items() if k not in ("reasoning", "reasoning_content")}
    if isinstance(kept.get("content"), list):
        kept["content"] = [
            part
            for part in kept["content"]
            if not (isinstance(part, dict) and part.get("type") == "thinking")
        ]
    return kept


def history(seed: int) -> History:
    """One conversation of two to five rounds."""
    made = _Making(random.Random(seed), History(seed))
    made.beginning()
    for _ in range(made.rng.randint(2, 5)):
        made.question()
        for _ in range(made.rng.choice((0, 0, 1, 2))):
            made.calls()
        made.interjection()
        made.answer()
    made.question()
    return made.history


class _Making:
    def __init__(self, rng: random.Random, history: History):
        self.rng = rng
        self.history = history
        self._count = 0
        self._new: list[str] = []

    # Messages

    def beginning(self) -> None:
        for _ in range(self.rng.choice((0, 1, 1, 2, 3))):
            role = self.rng.choice(("system", "system", "developer"))
            self._add(role, self._content())
        if self.rng.random() < 0.15:
            self._add("assistant", self._content())  # a greeting

    def question(self) -> None:
        for _ in range(self.rng.choice((1, 1, 1, 2))):
            self._add("user", self._content(), **self._maybe(name="Ada"))

    def answer(self) -> None:
        content = self._content(thinks=True)
        more = self._reasoning()
        if self.rng.random() < 0.1:
            content, more = None, {**more, "refusal": self._word()}
        self._add("assistant", content, **more)

    def interjection(self) -> None:
        if self.rng.random() < 0.3:
            role = self.rng.choice(("system", "developer", "system", "critic"))
            self._add(role, self._content())

    def calls(self) -> None:
        if self.rng.random() < 0.15:
            older = {"name": self._word(), "arguments": self._arguments()}
            self._add("assistant", None, function_call=older)
            self._add("function", self._content(pictures=True), name="f")
            return
        calls = [self._call() for _ in range(self.rng.choice((1, 1, 2, 3)))]
        content = self.rng.choice((None, "", self._content(thinks=True)))
        self._add("assistant", content, tool_calls=calls, **self._reasoning())
        ids = [call.get("id") for call in calls]
        if self.rng.random() < 0.2:
            self.rng.shuffle(ids)
        if self.rng.random() < 0.1:
            ids = [*ids, "call_of_nobody"]
        for call_id in ids:
            known = {} if call_id is None else {"tool_call_id": call_id}
            self._add("tool", self._content(pictures=True), **known)

    # Parts of them

    def _content(self, *, thinks: bool = False, pictures: bool = False) -> Any:
        kinds: list[Callable[[], Any]] = [
            self._word,
            lambda: f"{self._word()} \ud83d{self._word()}",  # cut through the middle of a character
            lambda: [{"type": "text", "text": self._word()} for _ in range(2)],
            lambda: [{"text": self._word()}],
            lambda: [self._word(), {"type": "output_text", "text": self._word()}],
        ]
        if thinks:
            thought = {"type": "thinking", "thinking": "pondering", "signature": "x"}
            kinds.append(lambda: [thought, {"type": "text", "text": self._word()}])
            kinds.append(lambda: [{"type": "refusal", "refusal": self._word()}])
        if pictures:
            picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
            kinds.append(lambda: [picture, {"type": "text", "text": self._word()}])
            kinds.append(lambda: [picture])
        return self.rng.choice(kinds)()

    def _call(self) -> dict[str, Any]:
        function = {"name": self._word(), "arguments": self._arguments()}
        call: dict[str, Any] = {"type": "function", "function": function}
        if self.rng.random() < 0.1:
            call = {"type": "custom", "custom": {"name": self._word(), "input": self._word()}}
        known = self.rng.choice(("call_1", f"call_{self.rng.getrandbits(64):x}", "\u00fc \n", None))
        return {"id": known, **call} if known is not None else call

    def _arguments(self) -> Any:
        whole = lambda: json.dumps({self._word(): self._word(), "n": 2**60, "x": None})  # noqa: E731
        kinds: list[Callable[[], Any]] = [
            *[whole] * 5,
            lambda: "",
            lambda: "null",
            lambda: None,
            lambda: "[]",
            lambda: json.dumps(whole()),
            lambda: json.dumps(json.dumps(whole())),
            lambda: whole()[:-9],
            lambda: json.dumps([self._word(), 7]),
            self._word,
            lambda: {self._word(): [self._word()]},
            lambda: json.dumps({self._word(): "\ud800"}),
            lambda: '{"a":' * 400 + json.dumps(self._word()) + "}" * 400,
        ]
        return self.rng.choice(kinds)()

    def _reasoning(self) -> dict[str, Any]:
        names = self.rng.choice(((), (), ("reasoning",), ("reasoning_content", "reasoning")))
        return dict.fromkeys(names, "pondering")

    def _maybe(self, **fields: Any) -> dict[str, Any]:
        return fields if self.rng.random() < 0.2 else {}

    def _word(self) -> str:
        self._count += 1
        word = f"w{self._count}z"
        self._new.append(word)
        return word

    def _add(self, role: str, content: Any, **fields: Any) -> None:
        self.history.messages.append({"role": role, "content": content, **fields})
        written = json.dumps(self.history.messages[-1])
        self.history.words.append([word for word in self._new if word in written])
        self._new = []
