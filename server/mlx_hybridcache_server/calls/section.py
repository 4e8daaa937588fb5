"""What stands between a model's markers of calls, as calls and as text that is none."""

from __future__ import annotations

from collections.abc import Generator, Iterator

from .incoming import Arguments, Begin, BrokenCallError, End, Event, Incoming, Text
from .json_formats import Format, Offered

SILENT = frozenset(" \t\r\n]},")
"""Of these alone nothing is lost: a bracket too many behind a call."""


class Section:
    """One stretch of a reply that a model marked as calls, as it is written.

    A call that turns out to be none before its arguments begin is text, with all that follows. One that
    breaks off within them, or goes on as no JSON, keeps what was written, so that who reads it sees
    that it is broken: a value that was cut is never closed as if it were whole.
    """

    def __init__(self, read: Format, offered: Offered):
        self._source = Incoming()
        self._steps = self._events(read, offered)
        self.has_calls = False
        self.is_broken = False

    def feed(self, text: str) -> list[Event]:
        """What `text` adds."""
        self._source.feed(text)
        return list(self._ready())

    def end(self, *, is_whole: bool) -> list[Event]:
        """What the end adds. `is_whole`: the model ended it, and not a limit."""
        self._source.end(is_whole=is_whole)
        return list(self._ready())

    def _ready(self) -> Iterator[Event]:
        for event in self._steps:
            if event is None:
                return
            if not isinstance(event, Arguments | Text) or event.text:
                yield event

    def _events(self, read: Format, offered: Offered) -> Generator[Event | None, None, None]:
        source, is_open, broken = self._source, False, None
        try:
            for event in read(source, offered):
                if isinstance(event, Begin):
                    self.has_calls = is_open = True
                elif isinstance(event, End):
                    is_open = False
                    source.mark()
                yield event
        except BrokenCallError as error:
            broken = error
        self.is_broken = is_open
        if is_open and broken is not None and not broken.is_too_deep:
            yield Arguments(broken.raw)
            yield from self._rest(Arguments)
        elif not is_open and (broken is not None or not self.has_calls):
            yield from self._leftover(source.since_mark())
        elif not source.is_read:
            yield from self._rest(Text)

    def _leftover(self, text: str) -> Generator[Event | None, None, None]:
        """What is no call, as text, unless there is a call and nothing else that says anything."""
        waiting = [text]
        while self.has_calls and SILENT.issuperset(waiting[-1]):
            if self._source.is_read:
                return
            yield None
            waiting.append(self._source.rest())
        yield Text("".join(waiting))
        yield from self._rest(Text)

    def _rest(self, kind: type[Arguments] | type[Text]) -> Generator[Event | None, None, None]:
        while True:
            yield kind(self._source.rest())
            if self._source.is_read:
                return
            yield None
