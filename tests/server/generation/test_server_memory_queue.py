"""A request that does not fit beside those that run waits for one of these to end; alone, it hears why it cannot be."""

import asyncio

import pytest
from bundled import text
from in_process import COMPLETIONS, ENDLESS, WARM, Client, busy, served, until
from mlx_hybridcache_server.generation.admission import MemoryQueue

from mlx_hybridcache.errors import BudgetError

SMALL = ("--prompt-cache-bytes", "3MB")  # room for 2,815 tokens
LARGE = {"prompt": [5] * 2_000}
OTHER = {"prompt": [7] * 1_500, "max_tokens": 3, "logit_bias": {"700": 100}}
TINY = {"prompt": [9] * 8, "max_tokens": 3, "logit_bias": {"700": 100}}


def is_writing(serving):
    return any(run.progress()["state"] == "writing" for run in serving.runs)


async def running(serving, app):
    """2,000 tokens and a reply without an end."""
    client = Client(app, COMPLETIONS, {**ENDLESS, **LARGE, "stream": True})
    await until(lambda: is_writing(serving))
    return client


async def two_waiting(serving, app):
    """Behind the 2,000 wait 1,500 tokens that do not fit beside them, then 8 that would."""
    large = await running(serving, app)
    other = Client(app, COMPLETIONS, OTHER)
    await until(lambda: serving.admission.waiting == 1)
    tiny = Client(app, COMPLETIONS, TINY)
    await until(lambda: serving.admission.waiting == 2)
    return large, other, tiny


def states(serving):
    return sorted(
        (run.progress()["prompt_tokens"], run.progress()["state"]) for run in serving.runs
    )


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_fit_beside_another_is_served_behind_it(stream):
    """1,500 tokens beside 2,000 in 3 MB: queued until these have gone, then answered as if they had never been."""

    async def work(serving, app):
        alone = await Client(app, COMPLETIONS, OTHER).answer()
        cleared = await Client(app, "/v1/cache", method="DELETE").answer()
        assert cleared.status == 200
        large = await running(serving, app)
        other = Client(app, COMPLETIONS, {**OTHER, "stream": stream})
        await until(lambda: serving.admission.waiting == 1)
        assert states(serving) == [(1_500, "queued"), (2_000, "writing")]
        for _ in range(20):  # however often others get a turn
            await asyncio.sleep(0)
            assert not other.task.done()
        large.leave()
        await other.answer()
        assert other.status == 200
        assert not serving.admission.waiting
        await until(lambda: not busy(serving))
        return alone.reply["choices"], None if stream else other.reply["choices"]

    alone, behind = served(work, *SMALL)
    assert behind in (None, alone)


def test_who_comes_later_waits_behind_it():
    """8 tokens would fit beside the 2,000 that run: the 1,500 that came before them would wait for ever."""

    async def work(serving, app):
        large, other, tiny = await two_waiting(serving, app)
        large.leave()
        assert (await other.answer()).status == (await tiny.answer()).status == 200
        ends = [each.endpoint for each in serving.recent]
        assert len(ends) == 3
        assert [each.report.prompt_tokens for each in serving.recent][-1] == 2_000

    served(work, *SMALL)


def test_one_that_leaves_while_it_waits_lets_the_next_one_try():
    """The 8 tokens behind it are answered while the 2,000 still run."""

    async def work(serving, app):
        large, other, tiny = await two_waiting(serving, app)
        other.leave()
        assert (await tiny.answer()).status == 200
        assert is_writing(serving)
        assert not serving.admission.waiting
        large.leave()
        await until(lambda: not busy(serving))
        assert not serving.admission.taken

    served(work, *SMALL)


def test_warming_waits_too():
    """A beginning of 1,500 tokens."""

    async def work(serving, app):
        large = await running(serving, app)
        warm = Client(app, WARM, {"prompt": text(1_500)})
        await until(lambda: serving.admission.waiting == 1)
        large.leave()
        assert (await warm.answer()).status == 200

    served(work, *SMALL)


def test_who_waits_hears_that_the_server_stops():
    """503, as those that run."""

    async def work(serving, app):
        await running(serving, app)
        other = Client(app, COMPLETIONS, OTHER)
        await until(lambda: serving.admission.waiting == 1)
        serving.stop()
        return (await other.answer()).status, other.reply["error"]["code"]

    assert served(work, *SMALL) == (503, "shutting_down")


# The queue alone


class Asked:
    """Something that needs `need` of ten bytes, until it is told to end."""

    held = 0

    def __init__(self, queue, need):
        self.need, self.tries, self.end, self.error = need, 0, asyncio.Event(), None
        self.has_begun = False
        self._queue = queue
        self.task = asyncio.create_task(self._run())

    async def _run(self):
        try:
            async for _ in self._queue.items(self._begin, self._wait):
                self.has_begun = True
        except BudgetError as error:
            self.error = error

    async def _wait(self, work):
        return await work

    async def _begin(self):
        self.tries += 1
        if Asked.held + self.need > 10:
            for _ in range(5):  # it takes a while to hear of it
                await asyncio.sleep(0)
            raise BudgetError("too much", fits_later=self.need <= 10)
        Asked.held += self.need
        try:
            yield "first"
            await self.end.wait()
        finally:
            Asked.held -= self.need


@pytest.fixture
def asked():
    """Makes them of one queue."""
    Asked.held = 0
    queue = MemoryQueue()
    return lambda need: Asked(queue, need)


async def settled():
    for _ in range(50):
        await asyncio.sleep(0)


def test_alone_what_does_not_fit_is_refused_at_once(asked):
    """11 of 10 bytes, beside others too; and 5 where something else than requests holds 6."""

    async def work():
        first, never = asked(4), asked(11)
        await settled()
        assert (never.error is not None, never.tries, first.has_begun) == (True, 1, True)
        first.end.set()
        await settled()
        Asked.held = 6
        alone = asked(5)
        await settled()
        assert (alone.error is not None, alone.tries) == (True, 1)

    asyncio.run(work())


def test_each_end_is_one_try_of_the_first_who_waits(asked):
    """6, 3 and 1 run. 9 waits, with a second try as the first of the queue, 1 and 2 behind it with none. The 1 and the
    6 end: a try each. The 3 ends: 9 begins, then the other 1 beside it, and 2 waits until 9 has ended.
    """

    async def work():
        six, three, one = asked(6), asked(3), asked(1)
        await settled()
        nine = asked(9)
        await settled()
        other, two = asked(1), asked(2)
        await settled()
        assert [each.tries for each in (nine, other, two)] == [2, 0, 0]
        for ended, tries in ((one, 3), (six, 4), (three, 5)):
            assert not nine.has_begun
            ended.end.set()
            await settled()
            assert nine.tries == tries
        assert [each.has_begun for each in (nine, other, two)] == [True, True, False]
        nine.end.set()
        await settled()
        assert two.has_begun
        assert two.error is None

    asyncio.run(work())


def test_what_ends_while_the_first_one_tries_is_not_missed(asked):
    """It failed beside what has ended by the time it would wait."""

    async def work():
        ten = asked(10)
        await settled()
        waits = asked(5)
        await asyncio.sleep(0)
        assert waits.tries == 1
        ten.end.set()
        await settled()
        assert waits.has_begun

    asyncio.run(work())
