"""The parts of a chat's reply: reasoning, calls of what was offered, and the content.

A model may also write a call as an example: in a block of code, or while it thinks about what to do.
There it is a call only if the reply ends with it, as it does when a model calls without having closed
its reasoning. So it waits for what comes next, and is never sent as a call and taken back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ..adapter import (
    ASIDE,
    NORMAL,
    REASONING,
    TOOL,
    Segmenter,
    Span,
)
from ..log import CLIENTS
from .fences import Fences
from .incoming import Arguments, Begin, End, Event, Text
from .section import Section

if TYPE_CHECKING:
    from .formats import ToolFormat

log = logging.getLogger(CLIENTS)

Part = Span | Begin | Arguments
"""A span of text, or what a call adds. A span in the state of calls is one that others must read."""


class _Waiting(NamedTuple):
    """White space, or a call that may be an example, and where it stands."""

    state: str
    text: str
    is_call: bool = False
    has_end: bool = False


class Parts:
    """Splits a reply as it is written, across any chunks.

    Without `tools` nothing is a call. `only_one`: what follows the first is left out.
    """

    def __init__(
        self,
        tokenizer: Any,
        initial_state: str,
        tools: ToolFormat | None,
        *,
        only_one: bool = False,
    ):
        self._segmenter = segmenter = Segmenter(tokenizer, initial_state, calls=tools is not None)
        self._tools = tools
        self._only_one = only_one
        self._fences = Fences()
        self._state = segmenter.state
        self._section: Section | None = None
        self._is_text = False  # the section begins with a call that is none
        self._example: list[str] | None = None
        self._waiting: list[_Waiting] = []
        self._count = 0
        self.is_done = False

    @property
    def is_reasoning(self) -> bool:
        """Whether the last character belongs to reasoning."""
        return self._segmenter.state in (REASONING, ASIDE)

    def feed(self, text: str) -> list[Part]:
        """What `text` completes."""
        return [] if self.is_done else list(self._split(self._segmenter.feed(text)))

    def end(self, *, is_whole: bool) -> list[Part]:
        """What was held back. `is_whole`: the model ended its reply, and not a limit."""
        if self.is_done:
            return []
        parts = list(self._split(self._segmenter.end()))
        parts += self._leave(has_end=False, is_whole=is_whole)
        if self._waiting:
            parts += self._called() if is_whole else self._no_calls()
        return parts

    def _split(self, spans: list[Span]) -> Iterator[Part]:
        for state, text in spans:
            if state != self._state:
                yield from self._leave(has_end=True, is_whole=True)
                yield from self._enter(state)
            if self.is_done:
                return
            if self._example is not None:
                self._example.append(text)
            elif self._section is not None:
                yield from self._of(self._section, self._section.feed(text))
            elif state == TOOL or text:
                yield from self._said(state, text)

    def _enter(self, state: str) -> Iterator[Part]:
        self._state = state
        if state == ASIDE or (state == TOOL and self._fences.is_code):
            self._example = []
        elif state == TOOL:
            yield from self._no_calls()
            self._section = self._new_section()
            self._is_text = False

    def _leave(self, *, has_end: bool, is_whole: bool) -> Iterator[Part]:
        if self._state == REASONING:
            yield (REASONING, "")  # though it may have been empty, content begins anew behind it
        if self._example is not None:
            where = REASONING if self._state == ASIDE else NORMAL
            self._waiting.append(_Waiting(where, "".join(self._example), True, has_end))
            self._example = None
        elif self._section is not None:
            yield from self._close(has_end=has_end, is_whole=is_whole)
        elif self._state == TOOL:
            self.is_done = self._only_one
            yield (NORMAL, "")  # one call ends, another may follow

    def _close(self, *, has_end: bool, is_whole: bool) -> Iterator[Part]:
        section, self._section = self._section, None
        assert section is not None
        yield from self._of(section, section.end(is_whole=is_whole))
        if not section.has_calls:
            start, end = self._markers
            yield from self._said(NORMAL, start * (not self._is_text) + end * has_end)
        if section.is_broken and is_whole:
            log.warning(
                "The arguments of a call are not JSON; they were sent as they were written."
            )
        self.is_done = self.is_done or (self._only_one and self._count > 0)

    def _of(self, section: Section, events: list[Event]) -> Iterator[Part]:
        for event in events:
            if isinstance(event, Begin):
                if self._only_one and self._count:
                    self.is_done = True
                    return
                self._count += 1
            if isinstance(event, Text):
                is_first = not section.has_calls and not self._is_text
                self._is_text = True
                yield from self._said(NORMAL, self._markers[0] * is_first + event.text)
            elif not isinstance(event, End):
                yield event

    def _said(self, state: str, text: str) -> Iterator[Part]:
        """Text of the content or of reasoning."""
        if self._waiting and not text.strip():
            self._waiting.append(_Waiting(state, text))
            return
        yield from self._no_calls()
        yield from self._plain(state, text)

    def _plain(self, state: str, text: str) -> Iterator[Part]:
        if state == NORMAL:
            self._fences.feed(text)
        yield (state, text)

    def _no_calls(self) -> Iterator[Part]:
        """What waits was examples."""
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            yield from self._plain(each.state, self._as_text(each))

    def _called(self) -> Iterator[Part]:
        """The reply ended with what waits: those are calls, if they can be read in full."""
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if self.is_done:
                return
            if not each.is_call:
                yield from self._plain(each.state, each.text)
            elif (section := self._new_section()) is None:
                self.is_done = self._only_one
                yield from [(TOOL, each.text), (NORMAL, "")]
            else:
                events = section.feed(each.text) + section.end(is_whole=True)
                is_text = any(isinstance(event, Text) for event in events)
                if section.has_calls and not section.is_broken and not is_text:
                    yield from self._of(section, events)
                else:
                    yield from self._plain(each.state, self._as_text(each))

    def _new_section(self) -> Section | None:
        """None for a format that others must read."""
        tools = self._tools
        return Section(tools.read, tools.offered) if tools is not None and tools.read else None

    def _as_text(self, waiting: _Waiting) -> str:
        if not waiting.is_call:
            return waiting.text
        start, end = self._markers
        return f"{start}{waiting.text}{end * waiting.has_end}"

    @property
    def _markers(self) -> tuple[str, str]:
        assert self._tools is not None, "without markers there is no state for calls"
        return self._tools.start, self._tools.end
