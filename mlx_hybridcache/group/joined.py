"""One rank's engine, made of a plain one, and what it and the others hear of each other while they serve."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import asdict, fields
from functools import partial

from ..caches.relief import Relief, T
from ..engine import Engine
from ..errors import GroupError
from ..machine import Pressure
from ..worker.turns import Pause
from ..worker.worker import Worker
from .acts import Acts, Hearing, Telling
from .connection import Message
from .engine import LeadingEngine, RankEngine, drawn_by_rank_0
from .follower import Follower
from .group import Group


class OneTry(Relief):
    """What is refused for want of memory on one rank is not tried again: others may have done it."""

    def twice(
        self, attempt: Callable[[], Generator[Pause, None, T]], release: Callable[[], None]
    ) -> Generator[Pause, None, T]:
        return (yield from attempt())


def ranked(group: Group, engine: Engine) -> RankEngine:
    """The engine of this rank, which decides as those of all others do."""
    memory, pressure = engine.tiers.memory, engine.relief.pressure
    memory.budget.limit(min(group.agree(memory.budget.limit_bytes)))
    kind: type[Acts] = Hearing if group.rank else Telling
    acts = kind(group, memory, engine.prefill.load)
    memory.seconds = lambda: acts.now
    engine.decoder.batches = all(group.agree(engine.decoder.batches))
    engine.decoder.agreed = drawn_by_rank_0(group.ranks)
    acts.reserve_bytes, own = group.agree(pressure.reserve_bytes)[0], pressure.reserve_bytes
    acts.own_reserve_bytes = own
    reserve = Pressure(acts.reserve_bytes, read=lambda: acts.left, clock=lambda: acts.now)
    engine.relief = OneTry(memory, engine.tiers.pool, reserve, engine.tiers.publish)
    parts = {each.name: getattr(engine, each.name) for each in fields(Engine) if each.init}
    made: type[RankEngine] = RankEngine if group.rank else LeadingEngine
    return made(**parts, acts=acts)


def begin(group: Group, engine: Engine, worker: Worker) -> None:
    """From now on the ranks hear of each other; where one is lost, nobody waits for `worker` any more."""
    assert isinstance(engine, RankEngine)
    group.agree(None)  # who was ready first is not to miss the others
    group.on_failure(worker.abandon)
    acts = engine.acts
    if isinstance(acts, Telling):
        group.watch(acts.hear, lambda: {"do": "beat"})
        acts.has_begun = True
        return
    assert isinstance(acts, Hearing)
    worker.refuse(
        GroupError(
            f"Rank {group.rank} does what rank 0 tells it: ask rank 0, and call follow() here."
        )
    )
    group.watch(_Listener(group, engine, acts, worker).hear, partial(_beat, engine))


def _beat(engine: RankEngine) -> Message:
    return {"do": "beat", **asdict(engine.figures())}


class _Listener:
    """What comes from rank 0, on the thread that listens."""

    def __init__(self, group: Group, engine: RankEngine, acts: Hearing, worker: Worker):
        self._group = group
        self._acts = acts
        self._worker = worker
        self._follower = Follower(engine, acts)

    def hear(self, message: Message) -> None:
        do = message["do"]
        if do in ("agree", "gathered"):
            self._acts.hear(message)
        elif do == "end":
            self._group.end()
        elif do != "beat":
            self._worker.post(partial(self._do, message))

    def _do(self, message: Message) -> None:
        try:
            self._follower.do(message)
        except Exception as error:  # whatever it was, rank 0 is to hear of it
            self._group.fail(str(error))
