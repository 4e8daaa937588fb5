"""The ranks behind rank 0: they do what they are told, in the order in which they are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from ..errors import GroupError, HybridCacheError
from ..request.options import NO_DRAFTS
from ..request.request import Request
from .acts import Hearing
from .connection import Message
from .engine import RankEngine


class _FailedThereError(Exception):
    """Something that a request brought along failed, on rank 0."""


class Follower:
    """One such rank. Used on its worker thread."""

    def __init__(self, engine: RankEngine, hearing: Hearing):
        self._engine = engine
        self._hearing = hearing
        self._under_way: dict[int, Iterator[Any]] = {}

    def do(self, message: Message) -> None:
        """One act of rank 0's. Raises what is no refusal: then this rank cannot go on."""
        self._hearing.heard(message)
        try:
            getattr(self, f"_{message['do']}")(message)
        except GroupError:
            raise
        except HybridCacheError:
            pass  # it was refused there too, or the two will be seen to have parted ways

    # A request's turns

    def _begin(self, message: Message) -> None:
        engine, request = self._engine, self._request(message)
        steps: Iterator[Any] = (
            engine.warm(request)
            if message["what"] == "warm"
            else engine.answer(request, {"drafts": NO_DRAFTS})
        )
        self._under_way[message["number"]] = steps
        self._step(message)

    def _request(self, message: Message) -> Request:
        return self._engine.sharing.request(
            message["tokens"],
            message["salt"],
            message["max_tokens"],
            boundaries=tuple(message["boundaries"]),
            lifetimes=dict(message["lifetimes"]),
            best_effort=message["best_effort"],
        )

    def _step(self, message: Message) -> None:
        number = message["number"]
        try:
            next(self._steps(number))
        except BaseException as error:
            del self._under_way[number]
            if not isinstance(error, StopIteration):
                raise

    def _close(self, message: Message) -> None:
        self._steps(message["number"]).close()  # type: ignore[attr-defined]
        del self._under_way[message["number"]]

    def _fail_request(self, message: Message) -> None:
        steps = self._steps(message["number"])
        del self._under_way[message["number"]]
        with suppress(_FailedThereError):
            steps.throw(_FailedThereError())  # type: ignore[attr-defined]

    def _steps(self, number: int) -> Iterator[Any]:
        try:
            return self._under_way[number]
        except KeyError as error:
            raise RuntimeError(
                "It has parted ways with rank 0: a request has ended here that goes on there."
            ) from error

    # What is done at once

    def _stop(self, message: Message) -> None:
        self._engine.close()

    def _clear(self, message: Message) -> None:
        self._engine.clear()

    def _drop(self, message: Message) -> None:
        self._engine.drop(message["salt"], message["tokens"])

    def _pin(self, message: Message) -> None:
        self._engine.pin(message["salt"], message["tokens"], is_pinned=message["is_pinned"])

    def _publish(self, message: Message) -> None:
        self._engine.publish()

    def _lookup(self, message: Message) -> None:
        self._engine.lookup(self._request(message))

    def _is_writing(self, message: Message) -> None:
        self._engine.is_writing()

    def _is_written(self, message: Message) -> None:
        self._engine.is_written()

    def _relieve(self, message: Message) -> None:
        self._engine.relief.relieve()
