"""Responses that are kept, so that a client can go on from one or ask for it again."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from ..errors import ApiError
from ..http.wire import written

MOST_BYTES = 64 * 2**20
"""Bytes of all that is kept; the least recently used go first."""

OWN_BYTES = 1024
"""Of one beside its texts."""

LETTER_BYTES = 4
"""Of a salt's letter, at most."""

Item = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kept:
    """One response with what its request added to the conversation before it, as JSON.

    Items are a line each, so that no other thread waits until all of them are read.
    """

    name: str
    before: str | None
    salt: str | None
    response: bytes
    added: bytes

    @classmethod
    def of(cls, response: dict[str, Any], added: Iterable[Item], salt: str | None) -> Kept:
        """As it is kept."""
        lines = b"\n".join(map(written, added))
        before = response["previous_response_id"]
        return cls(response["id"], before, salt, written(response), lines)

    @property
    def nbytes(self) -> int:
        """What it holds, all told."""
        return (
            OWN_BYTES + len(self.response) + len(self.added) + LETTER_BYTES * len(self.salt or "")
        )

    def input_items(self) -> list[Item]:
        """What its request added, in order."""
        return [json.loads(line) for line in self.added.splitlines()]

    def items(self) -> list[Item]:
        """That, and what came of it."""
        output: list[Item] = json.loads(self.response)["output"]
        return [*self.input_items(), *output]


class KeptResponses:
    """In memory, until the server ends. What one salt keeps another does not find."""

    def __init__(self, most_bytes: int = MOST_BYTES):
        self._most_bytes = most_bytes
        self._all: OrderedDict[str, Kept] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._all)

    def keep(self, kept: Kept) -> None:
        """Keep it, if there is room for it at all."""
        if kept.nbytes > self._most_bytes:
            return
        self._all[kept.name] = kept
        self.nbytes += kept.nbytes
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

    def conversation(self, name: str | None, salt: str | None) -> list[Kept]:
        """All up to a response, oldest first. Raises `ApiError` 404."""
        found: list[Kept] = []
        while name is not None:
            found.append(self.find(name, salt, "previous_response_id"))
            name = found[-1].before
        return found[::-1]

    def drop(self, name: str, salt: str | None) -> None:
        """Forget one. Raises `ApiError` 404."""
        self.nbytes -= self.find(name, salt).nbytes
        del self._all[name]


def weight_of(before: list[Kept], most_bytes: int) -> int:
    """Bytes of a conversation that is gone on with. Raises `ApiError` 413: it may be as long as a body."""
    weight = sum(len(kept.response) + len(kept.added) for kept in before)
    if weight > most_bytes:
        raise ApiError(
            413,
            f"The responses that this one goes on from have {weight:,} bytes, of {most_bytes:,} that a "
            "conversation may have (--max-body-bytes).",
            param="previous_response_id",
            code="body_too_large",
        )
    return weight


def kept_responses(request: Request) -> KeptResponses:
    """Those of the server that a request came to."""
    kept: KeptResponses = request.app.state.kept_responses
    return kept
