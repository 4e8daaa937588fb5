"""The grammars that a whole reply is held to."""

from __future__ import annotations

from collections.abc import Sequence

from .call_formats import FORMATS
from .lark import Lark
from .narrowing import Schema, closed
from .speech import GrammarError, Reasoning, Speech, Tool, Wanted


def written(speech: Speech, wanted: Wanted) -> tuple[str, ...]:
    """The grammars that all must allow a reply. Raises `GrammarError`.

    The first is what is asked for. mlx-lm finds the parts of a reply by their markers, wherever they
    stand, and a JSON string may hold any text; so the second one keeps markers out of values.
    """
    grammars = [_write(Lark(speech, True, wanted.lenient), wanted)]
    if not wanted.is_plain and (speech.think_start or speech.call_start):
        grammars.append(_write(Lark(speech, False, wanted.lenient), wanted))
    return tuple(grammars)


def _write(lark: Lark, wanted: Wanted) -> str:
    if wanted.is_free:
        return "\n".join([f"start: {_freely(lark, wanted)}", *lark.lines, ""])
    bodies = []
    if wanted.schema is not None:
        bodies.append(_json_reply(lark, wanted.schema))
    if wanted.tools:
        bodies.append(_calls(lark, wanted.tools, wanted.most_calls))
    before, behind = _around(lark, wanted.reasoning)
    return "\n".join([f"start: {before} ({' | '.join(bodies)}) {behind}", *lark.lines, ""])


def _around(lark: Lark, reasoning: Reasoning) -> tuple[str, str]:
    """What stands before what was asked for, and behind it."""
    if lark.speech.layout == "messages":
        return _messages(lark)
    if lark.speech.layout == "sections":
        return f"{_reasoning(lark, reasoning)} {_answer(lark)}", f"({lark.marker(MESSAGE_END)})?"
    return _reasoning(lark, reasoning), ""


def _reasoning(lark: Lark, reasoning: Reasoning) -> str:
    speech = lark.speech
    if reasoning == "none" or speech.think_start is None or speech.think_end is None:
        return ""
    # mlx-lm's state machine leaves reasoning for a call, too.
    thought = f"{lark.until(speech.think_end, speech.call_start)} SPACE?"
    return thought if reasoning == "open" else f"({lark.marker(speech.think_start)} {thought})?"


# Kimi K3

ANSWER = "<|open|>response<|sep|>", "<|close|>response<|sep|>"
MESSAGE_END = "<|close|>message<|sep|>"


def _answer(lark: Lark) -> str:
    """An empty one, which may stand before calls."""
    begin, end = map(lark.marker, ANSWER)
    return f"({begin} {end})?"


# Muse Spark


def _messages(lark: Lark) -> tuple[str, str]:
    """One of reasoning, and the header of one that calls; it may end with a token of its own."""
    marker = lark.marker
    thought = (
        f'" "? "to=self" {marker("<|message|>")} {lark.until("<|eom|>", lark.speech.call_start)}'
    )
    again = f'{marker("<|start|>")} "assistant"'
    whom = lark.terminal(r"/[\w.:-]{1,64}/ & ~/self|user|commentary/")
    header = f'" "? "to=" {whom} {marker("<|message|>")}'
    ends = f"({marker('<|eom|>')} | {marker('<|eot|>')})?"
    return f"({thought} {again})? {header}", ends


# What was asked for


def _freely(lark: Lark, wanted: Wanted) -> str:
    """Any tokens but the one that begins a call, and calls."""
    start = lark.speech.call_token()
    if start is None:
        raise GrammarError("The calls of this model are not begun by a token of their own.")
    free = f"<[^{start}]>"
    calls = lark.rule(_calls(lark, wanted.tools, wanted.most_calls))
    if wanted.most_calls == 1 or not lark.speech.call_end:
        return f"{free}* {calls}?"
    return f"({free} | {calls})*"


def _json_reply(lark: Lark, schema: Schema) -> str:
    if lark.speech.layout != "plain":
        raise GrammarError(
            "This model's replies have parts of their own, which cannot be held to a form yet."
        )
    if lark.is_exact:
        return lark.json(closed(schema))
    return lark.free(lark.speech.think_start, lark.speech.call_start)


def _calls(lark: Lark, tools: Sequence[Tool], most: int | None) -> str:
    speech = lark.speech
    if speech.call_start is None:
        raise GrammarError("This model's tokenizer has no format for tool calls.")
    form = FORMATS.get(speech.parser or "")
    if form is None:
        raise GrammarError(
            f"Calls cannot be forced in the format of this model's tool parser, {speech.parser}; "
            f"they can in those of {', '.join(FORMATS)}."
        )
    return form.calls(lark, tools, most)
