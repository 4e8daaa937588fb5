"""A server on new processes: the last request of each scenario cold, then one over a restart."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

from ..report.results import Equality, Situation
from ..serving.client import Reply
from ..serving.scenarios import AFTER_RESTART, COLD, RESTART, SCENARIOS
from ..serving.servers import ServerProcess
from ..serving.side import Side
from .dialect import learn
from .pace import Pace
from .session import EARLIER, NEW_START, STOP_SECONDS, Session

KEPT = "was given --cache-dir for the restart, and for nothing else"


def measure_new_starts(session: Session, pace: Pace) -> Iterator[None]:
    """A portion for the cold checks, and one for each restart."""
    plan, contender = session.plan, session.contender
    if not (plan.restarts or plan.cold_checks):
        return
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        launch = contender.keeping(directory) if plan.restarts else contender.launch
        assert launch is not None, "remote servers are not started here"
        if launch != contender.launch:
            session.found.notes.append(KEPT)
        process = stack.enter_context(ServerProcess(launch, start_seconds=plan.start_seconds))
        side = _started(session, process)
        if plan.cold_checks:
            _check_cold(session, side)
            session.go_on(side)
            yield
        for run in range(plan.repeats if plan.restarts else 0):
            if not pace.goes_on(run):
                break
            side = _measure_restart(session, process, side, run)
            session.go_on(side)
            yield
        side.target.close()


def _started(session: Session, process: ServerProcess) -> Side:
    """Short questions first, so that no measured request pays for a cold model."""
    target = session.started(process)
    return session.side(target, learn(target))


def _check_cold(session: Session, side: Side) -> None:
    """Nothing of these requests is in the new process: their replies are cold ones."""
    for scenario, size, step, reply in session.last.values():
        cold = side.ask(scenario, step)
        if isinstance(cold, Reply):
            same = reply.repeats(cold)
            session.found.equalities.append(Equality(scenario, size, step.name, NEW_START, same))
        session.advance(f"cold checks: {scenario}, {step.name}", size)


def _measure_restart(session: Session, process: ServerProcess, side: Side, run: int) -> Side:
    size = session.plan.sizes[0]
    (nonce,) = session.nonces.of(RESTART, size, run)
    step = next(SCENARIOS["repeat"](side.material, nonce, size))
    cold = side.ask(RESTART, replace(step, name=COLD))
    session.tell(RESTART, size, COLD, run, cold)
    session.advance(f"{RESTART}: {COLD}", size)
    session.go_on(side)
    side.target.close()
    began = time.perf_counter()
    process.stop(STOP_SECONDS)
    stopped = time.perf_counter()
    process.start()
    process.wait_ready()
    ready = time.perf_counter()
    side = _started(session, process)
    hot = side.ask(RESTART, replace(step, name=AFTER_RESTART))
    session.tell(RESTART, size, AFTER_RESTART, run, hot)
    values = {"stop_seconds": stopped - began, "ready_seconds": ready - stopped}
    session.found.situations.append(Situation(RESTART, size, run, values))
    if isinstance(cold, Reply) and isinstance(hot, Reply):
        same = hot.repeats(cold)
        session.found.equalities.append(Equality(RESTART, size, AFTER_RESTART, EARLIER, same))
    session.advance(f"{RESTART}: {AFTER_RESTART}", size)
    return side
