"""Pieces of grammars in llguidance's dialect of Lark. Text in, text out: nothing is compiled."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from .compiled import MOST_BYTES
from .narrowing import Schema, without_notes
from .speech import GrammarError, Speech

WHITESPACE = r" |\n[ \t]{0,32}"
"""Between the parts of a JSON text, once: JSON allows any, and a weak model would never end it."""


@dataclass(eq=False)
class Lark:
    """The lines of one grammar as it is written, of at most `MOST_BYTES`: more would not be compiled.

    `is_exact`: it is the one that was asked for, and not the one that keeps markers out of values.
    """

    speech: Speech
    is_exact: bool
    lenient: frozenset[str] = frozenset()
    lines: list[str] = field(
        # Where only one text can follow, llguidance would allow only the tokens that its tokenizer
        # makes of it: those of a marker for its text in a string, and others in either grammar.
        default_factory=lambda: ['%llguidance {"no_forcing": true}', r"SPACE: /[ \n]{1,4}/"]
    )
    nbytes: int = 0
    _count: int = 0

    def json(self, schema: Schema, *, is_lenient: bool = False) -> str:
        """JSON by `schema`."""
        options = {"whitespace_pattern": WHITESPACE, **({"lenient": True} if is_lenient else {})}
        return self.rule(f"%json {json.dumps({**without_notes(schema), 'x-guidance': options})}")

    def marker(self, text: str) -> str:
        """A marker as the model writes it: in tokens of its own, or as text."""
        return self.speech.token_of(text) or literal(text)

    def tags(self, text: str, marks: Sequence[str] = ()) -> str:
        """A text in which `marks` may be tokens of their own."""
        if not marks:
            return literal(text)
        found = [each for each in re.split(f"({'|'.join(map(re.escape, marks))})", text) if each]
        return " ".join(self.marker(each) if each in marks else literal(each) for each in found)

    def free(self, *without: str | None) -> str:
        """Any text that holds none of these, an empty one included."""
        return self.terminal(f"/(?s:.*)/{none_of(*without)}")

    def until(self, marker: str, *without: str | None) -> str:
        """Any text without these, and the marker that ends it."""
        return self.ended(self.free(marker, *without), marker)

    def ended(self, text: str, end: str, marks: Sequence[str] = ()) -> str:
        """A terminal, and what ends it: a token, or text that is looked for behind each character."""
        if not marks:
            token = self.speech.token_of(end)
            return f"{text} {token}" if token else self.lazy(f"{text} {literal(end)}")
        first = next((mark for mark in marks if end.startswith(mark)), None)
        if first is not None and self.speech.token_of(first):
            return f"{text} {self.tags(end, marks)}"
        return self.lazy(f"{text} {literal(end)}")

    def several(self, call: str, most: int | None, between: str = "SPACE?") -> str:
        """One call, or `most` of them, or any number."""
        rule = self.rule(call)
        return rule if most == 1 else f"{rule} ({between} {rule})*"

    def listed(self, items: Sequence[tuple[str, bool]], comma: str) -> str:
        """Items in their order with a comma between them. The second of each: whether it must come."""
        first, more = '""', '""'
        for item, must in reversed(items):
            behind = f"{literal(comma)} {item} {more}"
            begun = f"{item} {more}"
            first = self.rule(begun if must else f"{begun} | {first}")
            more = self.rule(behind if must else f"{behind} | {more}")
        return first

    def terminal(self, body: str) -> str:
        """A regular expression, by the name that is returned."""
        return self.define(self.named("T"), body)

    def rule(self, body: str) -> str:
        """A rule, by the name that is returned."""
        return self.define(self.named(), body)

    def lazy(self, body: str) -> str:
        """A text that ends as soon as it can."""
        terminal, name = self.terminal(body), self.named()
        self._add(f"{name}[lazy]: {terminal}")
        return name

    def named(self, kind: str = "r") -> str:
        """A name for a rule, or with `T` for a terminal, that nothing has yet."""
        self._count += 1
        return f"{kind}{self._count}"

    def define(self, name: str, body: str) -> str:
        """A line of the grammar."""
        self._add(f"{name}: {body}")
        return name

    def _add(self, line: str) -> None:
        """Raises `GrammarError` where the grammar has become too large, before the rest of it is written."""
        self.nbytes += len(line)
        if self.nbytes > MOST_BYTES:
            raise GrammarError(
                f"This takes a grammar of more than {MOST_BYTES:,} bytes, descriptions left out, which is "
                "not compiled. Ask for less in one reply: a smaller schema, or fewer tools."
            )
        self.lines.append(line)


def none_of(*texts: str | None) -> str:
    """Behind a regular expression: and none of these within it."""
    held = "|".join(pattern(text) for text in texts if text)
    return f" & ~/(?s:.*)({held})(?s:.*)/" if held else ""


def literal(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)


def pattern(text: str) -> str:
    """A text as part of a Lark regular expression."""
    return "".join(rf"\x{ord(c):02x}" if c < " " else _escaped(c) for c in text)


def _escaped(char: str) -> str:
    # Not re.escape: what it does to < and a space means something else here.
    return f"\\{char}" if char in r"\.+*?()|[]{}^$#&-~/" else char
