"""Who is let in, and who gets a turn: places for replies, the slots that run and read, and room in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, ExitStack, aclosing
from typing import Any, TypeVar

from mlx_hybridcache.errors import BudgetError

from ..errors import RETRY_SECONDS, ApiError
from ..metrics import Metrics
from ..settings import Settings

T = TypeVar("T")


class Admission:
    """Counts replies from before their prompts are rendered until they end.

    As many are let in as may run at once and wait at once; what comes beyond is refused before
    anything is done for it.
    """

    def __init__(self, settings: Settings, metrics: Metrics):
        self.most = settings.decode_concurrency + settings.max_queue
        self.taken = 0
        self.waiting = 0
        self._running = asyncio.Semaphore(settings.decode_concurrency)
        self._reading = asyncio.Semaphore(settings.prompt_concurrency)
        self.memory = MemoryQueue()
        self.metrics = metrics
        self.timeout_seconds = settings.request_timeout

    def admit(self, replies: int) -> Admitted:
        """Places for the replies of one request. Raises `ApiError` 429 when there are not as many."""
        if self.taken + replies > self.most:
            self.metrics.refused.labels("queue").inc()
            raise self._full(replies)
        self.taken += replies
        return Admitted(self, replies)

    async def slots(self, held: AsyncExitStack) -> ReadingSlot:
        """A slot to run in, then one to read in."""
        await held.enter_async_context(self._running)
        await self._reading.acquire()
        reading = ReadingSlot(self._reading)
        held.callback(reading.end)
        return reading

    @property
    def is_full(self) -> bool:
        """Whether as many run as may."""
        return self._running.locked()

    def _full(self, replies: int) -> ApiError:
        if replies > self.most:  # and would be too many at any other time
            return ApiError(
                429,
                f"This request asks for {replies:,} replies; {self.most:,} may run or wait at once "
                "(--decode-concurrency and --max-queue). Ask for fewer.",
                code="queue_full",
                headers={"x-should-retry": "false"},  # OpenAI's clients look for it
            )
        return ApiError(
            429,
            f"{self.taken:,} replies run or wait already, of {self.most:,} that may (--max-queue); "
            f"this request asks for {replies:,} more. Try again later.",
            code="queue_full",
            headers={"Retry-After": str(RETRY_SECONDS)},
        )


class Admitted:
    """The places of one request. They are free again as its replies end, at the latest with it.

    `held` is what else it keeps until then: the model that it uses.
    """

    def __init__(self, admission: Admission, replies: int):
        self._admission = admission
        self._left = replies
        self.held = ExitStack()
        self.arrived = time.perf_counter()

    def leave(self, replies: int = 1) -> None:
        """So many of its replies have ended."""
        replies = min(replies, self._left)
        self._left -= replies
        self._admission.taken -= replies

    def close(self) -> None:
        """The request has ended."""
        self.leave(self._left)
        self.held.close()

    @property
    def left_seconds(self) -> float | None:
        """Until its time is over; None without a limit."""
        most = self._admission.timeout_seconds
        return None if most is None else max(0.0, self.arrived + most - time.perf_counter())

    def too_late(self) -> ApiError:
        """What a request hears whose time is over."""
        admission = self._admission
        admission.metrics.refused.labels("timeout").inc()
        return ApiError(
            504,
            f"The request took longer than {admission.timeout_seconds:g} s (--request-timeout). "
            "What was read of its prompt is kept.",
            code="timeout",
        )

    async def in_time(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives, which is cancelled and answered with `ApiError` 504 when it is too late."""
        try:
            async with asyncio.timeout(self.left_seconds) as limit:
                return await work
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise self.too_late() from error

    async def turn(self, held: AsyncExitStack) -> ReadingSlot:
        """Wait for a slot to run in and one to read in. `held` gives both back.

        Raises `ApiError` 504 when its time is over before.
        """
        return await self.queued(self._admission.slots(held))

    async def queued(self, work: Coroutine[Any, Any, T]) -> T:
        """What it waits for before it is begun. Raises `ApiError` 504 when its time is over before."""
        admission = self._admission
        admission.waiting += 1
        try:
            return await self.in_time(work)
        finally:
            admission.waiting -= 1


class ReadingSlot:
    """A slot in which a prompt is read. It is free from when it is read, whatever follows."""

    def __init__(self, slots: asyncio.Semaphore):
        self._slots = slots
        self._is_held = True

    def end(self) -> None:
        """The prompt is read, or never will be; once is enough."""
        if self._is_held:
            self._is_held = False
            self._slots.release()


class MemoryQueue:
    """Where requests wait that do not fit beside those that run: the first one tries again whenever one of these ends.

    Who comes meanwhile waits behind it; else small requests could keep a large one waiting for ever.
    """

    def __init__(self) -> None:
        self._first = asyncio.Lock()  # it goes to those who wait for it in their order
        self._freed = asyncio.Event()
        self._running: set[object] = set()

    def freed(self) -> None:
        """What a request held is free, before anything that is asked of the model from now on."""
        self._freed.set()

    async def items(
        self,
        begin: Callable[[], AsyncGenerator[T]],
        wait: Callable[[Coroutine[Any, Any, bool]], Awaitable[bool | None]],
    ) -> AsyncGenerator[T]:
        """What a request gives that `begin` begins: once more where others left no room for it.

        `wait` gives what it is given to wait for, and None for a request that is cancelled meanwhile. Raises
        `BudgetError` where it would not fit alone either.
        """
        async with AsyncExitStack() as turn:
            is_first, waits = False, self._first.locked()
            while True:
                if waits:
                    if not await wait(self._worth_a_try(turn, is_first)):
                        return
                    is_first = True
                try:
                    async with aclosing(self._tried(begin, turn)) as items:
                        async for item in items:
                            yield item
                    return
                except _NoRoomNowError:
                    waits = True

    async def _worth_a_try(self, turn: AsyncExitStack, is_first: bool) -> bool:
        """As the first of those who wait, at once and then whenever something was freed."""
        if is_first:
            await self._freed.wait()
        else:
            await turn.enter_async_context(self._first)
        self._freed.clear()
        return True

    async def _tried(
        self, begin: Callable[[], AsyncGenerator[T]], turn: AsyncExitStack
    ) -> AsyncGenerator[T]:
        own, others, has_begun = object(), bool(self._running), False
        self._running.add(own)
        may_hold = True
        try:
            async with aclosing(begin()) as items:
                async for item in items:
                    has_begun = True
                    await turn.aclose()  # whoever waits behind it may try
                    yield item
        except BudgetError as error:
            may_hold = has_begun
            if may_hold or not error.fits_later or not (others or len(self._running) > 1):
                raise
            raise _NoRoomNowError from error
        finally:
            self._running.discard(own)
            if may_hold:
                self.freed()


class _NoRoomNowError(Exception):
    """It would fit without those that run."""
