"""Generated ChatML dialogues: chat, reasoning, recall over long texts, function calls.

A dialogue is a function of its seed. One is held out when the hash of its last question says so,
which keeps every held-out question out of training whatever the seeds are.
"""

from __future__ import annotations

import builtins
import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_hybridcache.demo.functions import FUNCTIONS, POOLS, Function, values

HELD_OUT_SHARE = 20
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question, the reasoning behind the reply, the reply."""

    question: str
    thought: str
    reply: str


@dataclass(slots=True)
class Dialogue:
    """What a model is given and what it should write next."""

    messages: list[Message]
    thought: str
    reply: str
    thinking: bool
    tools: list[dict[str, Any]] = field(default_factory=list)
    expects_call: bool = False

    @property
    def held_out(self) -> bool:
        """Whether training must never see the last question."""
        asked = [m["content"] for m in self.messages if m["role"] == "user"][-1]
        return zlib.crc32(asked.encode()) % HELD_OUT_SHARE == 0

    @property
    def completion(self) -> str:
        """What follows the generation prompt, without the end marker."""
        return f"<think>\n{self.thought}\n</think>\n\n{self.reply}" if self.thinking else self.reply

    def template_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `apply_chat_template` that give the prompt."""
        return {
            "conversation": self.messages,
            "tools": self.tools or None,
            "enable_thinking": self.thinking,
            "add_generation_prompt": True,
        }


class Writer:
    """Writes dialogues; `excerpts` are the texts quoted in long questions."""

    def __init__(self, excerpts: Sequence[str]) -> None:
        self.excerpts = excerpts
        self.docs = _builtin_lines()
        self.chat: list[Callable[[random.Random], Exchange]] = [
            self.greeting, self.sum, self.items, self.echo, self.python, self.identity, self.note,
        ]  # fmt: skip
        self.lookups = [self.greeting, self.items, self.echo, self.identity, self.note]

    def dialogue(self, seed: int, kind: str = "", thinking: bool | None = None) -> Dialogue:
        """The dialogue of `seed`; `kind` is "chat", "recall", "long", "call" or "result".

        A sixth, "lookup", is one short question whose reply repeats a word of it.
        """
        rng = random.Random(seed)
        kind = (
            kind
            or rng.choices(["chat", "recall", "long", "call", "result"], [30, 15, 15, 25, 15])[0]
        )
        think = rng.random() < 0.5 if thinking is None else thinking
        if kind in ("call", "result"):
            return self._function(rng, think, answered=kind == "result")
        if kind == "lookup":
            asked = rng.choice(self.lookups)(rng)
            question = [{"role": "user", "content": asked.question}]
            return Dialogue(question, asked.thought, asked.reply, think)
        messages = self._system(rng)
        if kind == "recall":
            told, asked = self._fact(rng)
            opening = [told, *(self._chat(rng) for _ in range(rng.randint(0, 3)))]
        else:
            opening = [self._chat(rng) for _ in range(rng.choice([0, 0, 0, 1, 2]))]
            asked = self._long(rng) if kind == "long" else self._chat(rng)
        for exchange in opening:
            messages += _turns(exchange)
        messages.append({"role": "user", "content": asked.question})
        tools = self._tools(rng, []) if rng.random() < 0.15 else []
        return Dialogue(messages, asked.thought, asked.reply, think, tools)

    def _chat(self, rng: random.Random) -> Exchange:
        return rng.choice(self.chat)(rng)

    def _system(self, rng: random.Random) -> list[Message]:
        if rng.random() < 0.4:
            return []
        text = rng.choice(
            ["You are a helpful assistant.", "Answer in short sentences.", "Be kind."]
        )
        if rng.random() < 0.2:
            rules = (f"- The {i} of {p} is {c}." for i, p, c in _triples(rng, rng.randint(2, 12)))
            text += "\n" + "\n".join(rules)
        return [{"role": "system", "content": text}]

    def _tools(self, rng: random.Random, needed: list[Function]) -> list[dict[str, Any]]:
        others = rng.sample([f for f in FUNCTIONS if f not in needed], rng.choice([0, 1, 1, 2, 3]))
        chosen = [*needed, *others] or FUNCTIONS[:1]
        rng.shuffle(chosen)
        return [f.declaration() for f in chosen]

    def _function(self, rng: random.Random, think: bool, answered: bool) -> Dialogue:
        function = rng.choice(FUNCTIONS)
        given = values(function.arguments, rng)
        messages = self._system(rng)
        if rng.random() < 0.25:
            messages += _turns(self._chat(rng))
        question = rng.choice(function.requests).format(**given)
        messages.append({"role": "user", "content": question})
        tools = self._tools(rng, [function])
        known = ", ".join(f"{name} {value}" for name, value in given.items())
        plan = f"I need {function.name} with {known}."
        if not answered:
            return Dialogue(messages, plan, function.call(given), think, tools, expects_call=True)
        found = values(tuple(n for n in function.results if n not in given), rng)
        call: Message = {"role": "assistant", "content": ""}
        call["tool_calls"] = [{"type": "function", "function": {
            "name": function.name, "arguments": given}}]  # fmt: skip
        if think:
            call["reasoning_content"] = plan
        messages += [call, {"role": "tool", "content": json.dumps(found)}]
        seen = ", ".join(f"{name} {value}" for name, value in found.items())
        reply = function.answer.format(**given, **found)
        return Dialogue(messages, f"The result says {seen}.", reply, think, tools)

    def greeting(self, rng: random.Random) -> Exchange:
        name, hello = rng.choice(POOLS["person"]), rng.choice(["Hello", "Hi", "Good morning"])
        question = rng.choice([f"{hello}, I am {name}.", f"{hello}! My name is {name}."])
        return Exchange(question, f"The user is called {name}.", f"{hello} {name}, how can I help?")

    def sum(self, rng: random.Random) -> Exchange:
        a, b = rng.randint(1, 20), rng.randint(1, 20)
        question = rng.choice(
            [f"What is {a} + {b}?", f"Add {a} and {b}.", f"How much is {a} plus {b}?"]
        )
        return Exchange(question, f"{a} plus {b} is {a + b}.", f"{a} + {b} = {a + b}.")

    def items(self, rng: random.Random) -> Exchange:
        things = rng.sample(POOLS["item"], rng.randint(3, 6))
        which, index = rng.choice([("first", 0), ("second", 1), ("last", -1)])
        question = f"Which is the {which} of {', '.join(things)}?"
        return Exchange(question, f"The {which} one is {things[index]}.", f"It is {things[index]}.")

    def echo(self, rng: random.Random) -> Exchange:
        words = " ".join(rng.sample([*POOLS["item"], *POOLS["colour"]], rng.randint(2, 6)))
        return Exchange(f"Repeat: {words}", "I only have to repeat the words.", words)

    def python(self, rng: random.Random) -> Exchange:
        name, line = rng.choice(self.docs)
        question = rng.choice([f"What does {name} do in Python?", f"Explain {name}."])
        return Exchange(question, f"{name} is part of Python.", line)

    def identity(self, rng: random.Random) -> Exchange:
        question = rng.choice(["Who are you?", "What are you?", "What can you do?"])
        name, city = rng.choice(POOLS["person"]), rng.choice(POOLS["city"])
        reply = f"I am a very small demo model. Greetings to {city}, {name}!"
        return Exchange(f"{name} from {city} asks: {question}", "I should say what I am.", reply)

    def note(self, rng: random.Random) -> Exchange:
        thing, who, colour = _triples(rng, 1)[0]
        question = f"Note that the {thing} of {who} is {colour}."
        return Exchange(question, f"{who} has a {colour} {thing}.", f"Noted: {colour}.")

    def _fact(self, rng: random.Random) -> tuple[Exchange, Exchange]:
        thing, who, colour = _triples(rng, 1)[0]
        told = Exchange(f"Note that the {thing} of {who} is {colour}.", "", f"Noted: {colour}.")
        question = f"Which colour is the {thing} of {who}?"
        thought = f"I noted that the {thing} of {who} is {colour}."
        return told, Exchange(question, thought, f"The {thing} of {who} is {colour}.")

    def _long(self, rng: random.Random) -> Exchange:
        """A quoted text, with a sentence in it that the question asks for, or its beginning."""
        text = rng.choice(self.excerpts)
        start = rng.randint(0, max(0, len(text) - 400))
        size = rng.choices([200, 400, 800, 1600, 3200], [3, 3, 3, 2, 1])[0]
        quoted = text[start : start + size].strip()
        if rng.random() < 0.2:
            beginning = " ".join(quoted.split()[:5])
            asked = rng.choice(["How does it begin?", "What is this text?", "Sum it up."])
            thought, reply = "I quote its beginning.", f"It begins with: {beginning}"
        else:
            thing, who, colour = _triples(rng, 1)[0]
            fact = f"The {thing} of {who} is {colour}."
            cut = quoted.find("\n", rng.randint(0, len(quoted)))
            cut = len(quoted) if cut < 0 else cut
            quoted = f"{quoted[:cut]}\n{fact}{quoted[cut:]}"
            asked = f"Which colour is the {thing} of {who}?"
            thought, reply = f"The text says that the {thing} of {who} is {colour}.", fact
        question = rng.choice([f"{quoted}\n\n{asked}", f"Read this.\n\n{quoted}\n\n{asked}"])
        return Exchange(question, thought, reply)


def _turns(exchange: Exchange) -> list[Message]:
    return [
        {"role": "user", "content": exchange.question},
        {"role": "assistant", "content": exchange.reply},
    ]


def _triples(rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    return [
        (rng.choice(POOLS["item"]), rng.choice(POOLS["person"]), rng.choice(POOLS["colour"]))
        for _ in range(count)
    ]


def _builtin_lines() -> list[tuple[str, str]]:
    """Each builtin function with the first sentence of its docstring."""
    found = []
    for name in sorted(dir(builtins)):
        thing = getattr(builtins, name)
        doc = (getattr(thing, "__doc__", "") or "").strip()
        if name.islower() and not name.startswith("_") and callable(thing) and doc:
            lines = [s.strip() for s in doc.split("\n\n") if "->" not in s.split("\n")[0]]
            if lines:
                found.append((name, " ".join(lines[0].split())[:160]))
    return found


def draw(
    writer: Writer, held_out: bool, start: int = 0, kind: str = "", thinking: bool | None = None
) -> Iterator[Dialogue]:
    """Dialogues of ascending seeds on one side of the split, without end."""
    seed = start
    while True:
        dialogue = writer.dialogue(seed, kind, thinking)
        if dialogue.held_out == held_out:
            yield dialogue
        seed += 1


def training_texts(count: int) -> list[str]:
    """Plain texts of `count` training dialogues, for the tokenizer."""
    from .corpus import documents, split

    writer = Writer([d.text for d in split(documents())[0]])
    texts = []
    for dialogue, _ in zip(draw(writer, held_out=False), range(count), strict=False):
        texts += [str(m["content"]) for m in dialogue.messages] + [dialogue.thought, dialogue.reply]
        texts += [json.dumps(tool["function"]) for tool in dialogue.tools]
    return texts
