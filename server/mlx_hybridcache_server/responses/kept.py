"""Responses that are kept, so that a client can go on from one or ask for it again."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ..errors import ApiError
from ..http.wire import written

MOST_BYTES = 64 * 2**20
"""Bytes of all that is kept, as JSON; the least recently used go first."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One response with what its request added to the conversation before it."""

    response: dict[str, Any]
    added: list[dict[str, Any]]
    salt: str | None
    nbytes: int


class KeptResponses:
    """In memory, until the server ends. What one salt keeps another does not find."""

    def __init__(self, most_bytes: int = MOST_BYTES):
        self._most_bytes = most_bytes
        self._all: OrderedDict[str, Kept] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._all)

    def keep(self, response: dict[str, Any], added: list[dict[str, Any]], salt: str | None) -> None:
        """Keep it, if there is room for it at all."""
        nbytes = len(written([response, added]))
        if nbytes > self._most_bytes:
            return
        self._all[response["id"]] = Kept(response, added, salt, nbytes)
        self.nbytes += nbytes
        while self.nbytes > self._most_bytes:
            _, oldest = self._all.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def find(self, name: str, salt: str | None, param: str | None = None) -> Kept:
        """One of them. Raises `ApiError` 404."""
        kept = self._all.get(name)
        if kept is None or kept.salt != salt:
            raise ApiError(
                404,
                f"No response {name!r} is kept here: it was not stored, or had to make room, or the "
                "server has been started again since. Send the conversation's items.",
                param=param,
                code="response_not_found",
            )
        self._all.move_to_end(name)
        return kept

    def conversation(self, name: str | None, salt: str | None) -> list[dict[str, Any]]:
        """All items up to the end of a response, oldest first. Raises `ApiError` 404."""
        found: list[Kept] = []
        while name is not None:
            found.append(self.find(name, salt, "previous_response_id"))
            name = found[-1].response["previous_response_id"]
        return [
            item for kept in reversed(found) for item in (*kept.added, *kept.response["output"])
        ]

    def drop(self, name: str, salt: str | None) -> None:
        """Forget one. Raises `ApiError` 404."""
        self.nbytes -= self.find(name, salt).nbytes
        del self._all[name]
