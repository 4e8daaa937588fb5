"""Stop texts: found however a reply is cut into chunks, and never given out."""

from __future__ import annotations

from collections.abc import Sequence

from ..calls.incoming import overlap


class StopText:
    """Finds the first of several texts in a reply's content, however it is cut into chunks.

    Behind reasoning or a call, the white space that parts them is no stop text by itself.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self._space: list[str] | None = None  # what was written since the content was interrupted
        self._lead = 0  # so much of what is held parts it from what came before
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The text that is safe to give out; with `found`, all there is before that one."""
        if self._space is not None:
            self._space.append(text)
            if not text.strip():
                return ""
            text, self._space = "".join(self._space), None
            self._lead = len(text) - len(text.lstrip())
        else:
            text = self._held + text
        found = []
        for stop in self._stops:
            at = text.find(stop, 0 if stop.strip() else self._lead)
            if at >= 0:
                found.append((at + len(stop), at, stop))
        if found:  # the one that is complete first; so chunks do not matter
            _, at, self.found = min(found)
            self._held = ""
            return text[:at]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        self._lead = max(0, self._lead - (len(text) - keep))
        return text[: len(text) - keep]

    def interrupted(self) -> str:
        """Something else follows: what was held back and is text after all."""
        held = self.end()
        self._space, self._lead = [], 0
        return held

    def end(self) -> str:
        """What was held back and is text after all."""
        held, self._held = self._held + "".join(self._space or ()), ""
        self._space = None
        return held
