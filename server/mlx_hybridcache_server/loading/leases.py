"""Who uses the model that is loaded, and who waits for another one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Waiting(Generic[T]):
    """One that waits for what it wants to be there, or for the error of what was tried."""

    wanted: T
    granted: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Leases(Generic[T]):
    """Nothing is switched while anybody uses it. Used on one event loop.

    In the order in which they come: once one waits for something else, those who want what is there
    wait behind it, so that no stream of them keeps it away. When it has come, all who wait for it by
    then get it, wherever they stand, so that two that take turns are not switched for each request.
    """

    def __init__(
        self,
        serves: Callable[[T], bool],
        switch: Callable[[T], Awaitable[None]],
        idle: Callable[[bool], None] = lambda is_idle: None,
    ):
        """`idle` is told whether anybody uses it or waits, whenever that may have changed."""
        self._serves = serves
        self._switch = switch
        self._idle = idle
        self._users = 0
        self._waiting: deque[_Waiting[T]] = deque()
        self._switching: asyncio.Task[None] | None = None

    @property
    def is_switching(self) -> bool:
        """Whether what is there is being replaced."""
        return self._switching is not None

    @property
    def is_idle(self) -> bool:
        """Whether nobody uses what is there, or waits for anything."""
        return not (self._users or self._waiting or self.is_switching)

    def empty(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work`, which takes away what is there, if it `is_idle`; who comes meanwhile waits for its end."""
        if self.is_idle:
            self._switching = asyncio.create_task(self._emptied(work))

    async def _emptied(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        finally:
            self._switching = None
            self._go_on()

    async def take(self, wanted: T, held: ExitStack) -> None:
        """Wait until `wanted` is there. It stays until `held` is closed, whatever else happens.

        Raises what switching to it raised. One that stops waiting leaves the queue.
        """
        waiting = _Waiting(wanted)
        self._waiting.append(waiting)
        self._go_on()
        try:
            await waiting.granted
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
                self._go_on()
            elif not waiting.granted.cancelled() and waiting.granted.exception() is None:
                self._give_back()  # both at once
            raise
        held.callback(self._give_back)

    def refuse(self, error: Exception) -> None:
        """End the waiting of all."""
        while self._waiting:
            _tell(self._waiting.popleft(), error)

    def _give_back(self) -> None:
        self._users -= 1
        self._go_on()

    def _go_on(self) -> None:
        if self.is_switching:
            return
        while self._waiting and self._serves(self._waiting[0].wanted):
            self._grant(self._waiting.popleft())
        if self._waiting and not self._users:
            wanted = self._waiting[0].wanted
            self._switching = asyncio.create_task(self._switch_to(wanted))
        self._idle(self.is_idle)

    async def _switch_to(self, wanted: T) -> None:
        failure: Exception | None = None
        try:
            await self._switch(wanted)
        except Exception as error:  # told to those who wanted it
            failure = error
        self._switching = None
        waiting, self._waiting = self._waiting, deque()
        for one in waiting:
            if failure is not None and one.wanted == wanted:
                _tell(one, failure)
            elif failure is None and self._serves(one.wanted):
                self._grant(one)
            else:
                self._waiting.append(one)
        self._go_on()

    def _grant(self, one: _Waiting[T]) -> None:
        if not one.granted.cancelled():
            self._users += 1
            one.granted.set_result(None)


def _tell(one: _Waiting[T], error: Exception) -> None:
    if not one.granted.cancelled():
        one.granted.set_exception(error)
