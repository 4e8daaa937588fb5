"""One server from its start to its stop: warmed up, led through everything, and looked at."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator

from ..report.oddities import odd
from ..report.results import FAILED, MISSING, PARTIAL, Equality, Situation
from ..serving.client import Reply, RequestFailed
from ..serving.crowd import IDENTICAL, MIXED, NONCES, measure_situation
from ..serving.remote import RemoteServer
from ..serving.scenarios import AT_EVERY_SIZE, SCENARIOS
from ..serving.servers import Launch, ServerError, ServerProcess
from ..serving.side import Nonces, Side, fresh_nonce
from ..serving.watch import MemoryWatch
from .contenders import Contender
from .dialect import Dialect
from .new_starts import measure_new_starts
from .pace import REQUEST_SECONDS, Pace
from .plan import BenchPlan
from .session import EARLIER, STOP_SECONDS, Advance, Session


class Measurement(Session):
    """The whole of what one contender goes through; `found` is true at any moment."""

    def __init__(
        self,
        contender: Contender,
        plan: BenchPlan,
        tokenizer: object | None,
        advance: Advance,
        pace: Pace | None = None,
        *,
        nonces: Nonces | None = None,
    ) -> None:
        super().__init__(contender, plan, tokenizer, advance, nonces or Nonces())
        self.is_under_way = True
        self._pace = pace or Pace()
        self._probe: Reply | None = None

    def run(self) -> None:
        """Measure. A server that fails is reported in `found`, never raised."""
        for _ in self.portions():
            pass

    def portions(self) -> Generator[None, None, None]:
        """The same in portions, between which other servers have their turn: the start with its warm-up,
        then each request of each scenario. Closing it stops what it has started.
        """
        contender = self.contender
        if contender.missing:
            self.found.status, self.found.reason = MISSING, contender.missing
            self.is_under_way = False
            return
        try:
            if contender.launch is None:
                yield from self._measure_remote()
            else:
                yield from self._measure_process(contender.launch)
                yield from measure_new_starts(self, self._pace)
            self.is_under_way = False
        except ServerError as error:
            self.is_under_way = False
            self.found.status = PARTIAL if self.found.requests else FAILED
            self.found.reason = str(error)
        finally:
            self.found.notes = list(dict.fromkeys([*self.found.notes, *odd(self.found)]))

    def expected_seconds(self) -> float:
        """Once it is warm: for all that is left, as if no cache answered anything."""
        plan, is_process = self.plan, self.contender.launch is not None
        if self._probe is None:
            return 0.0
        per_token = self._probe.first_seconds / plan.warm_up_tokens
        per_request = self._probe.last_seconds - self._probe.first_seconds + REQUEST_SECONDS
        starts = 1 + plan.repeats if is_process and plan.restarts else int(is_process)
        return (
            plan.work(process=is_process) * per_token
            + plan.requests(process=is_process) * per_request
            + starts * (self.found.ready_seconds or 0.0)
        )

    def _measure_remote(self) -> Iterator[None]:
        server = RemoteServer(self.contender.name, self.contender.url, self.contender.api_key)
        target = self.target(server)
        try:
            dialect = self.learn(target)
            side = self.side(target, dialect)
            self._warm_up(side)
            yield
            yield from self._measure(side, dialect)
        finally:
            target.close()

    def _measure_process(self, launch: Launch) -> Iterator[None]:
        with ServerProcess(launch, start_seconds=self.plan.start_seconds) as process:
            with MemoryWatch(process) as watch:
                target = self.started(process)
                try:
                    dialect = self.learn(target)
                    side = self.side(target, dialect)
                    self._warm_up(side)
                    watch.mark_warm()
                    yield
                    yield from self._measure(side, dialect)
                finally:
                    target.close()
                    self.found.memory = watch.found()
            process.stop(STOP_SECONDS)

    def _warm_up(self, side: Side) -> None:
        """Then one cold request more: the first ones are too slow to foretell the others."""
        side.warm_up()
        step = next(SCENARIOS["repeat"](side.material, fresh_nonce(), self.plan.warm_up_tokens))
        try:
            self._probe = side.target.ask(step)
        except RequestFailed as error:
            raise ServerError(f"{side.name} failed while warming up: {error}") from error

    def _measure(self, side: Side, dialect: Dialect) -> Iterator[None]:
        """Run by run the scripts, then the situations of several clients."""
        for run in range(self.plan.repeats):
            if not self._pace.goes_on(run):
                return
            for number, name in enumerate(self.plan.scripts):
                if not dialect.completes and name in ("completions", "throughput"):
                    continue
                for size in self.plan.sizes if name in AT_EVERY_SIZE else self.plan.sizes[:1]:
                    (nonce,) = self.nonces.of(f"{name} {number}", size, run)
                    yield from self._measure_script(side, name, size, run, nonce)
            for name in self.plan.situations:
                self._measure_situation(side, name, run)
                yield

    def _measure_script(
        self, side: Side, name: str, size: int, run: int, nonce: str
    ) -> Iterator[None]:
        """A portion for each request, so that two servers are asked it one after the other."""
        first: dict[str, Reply] = {}
        for step, reply in side.lead(name, SCENARIOS[name](side.material, nonce, size)):
            self.tell(name, size, step.name, run, reply)
            if isinstance(reply, Reply):
                key = json.dumps([step.path, step.body])
                if key in first:
                    same = reply.repeats(first[key])
                    self.found.equalities.append(Equality(name, size, step.name, EARLIER, same))
                first.setdefault(key, reply)
                if size == self.plan.sizes[0]:
                    self.last[name] = (name, size, step, reply)
            self.advance(f"{name} {size:,}: {step.name}", size)
            self.go_on(side)
            yield

    def _measure_situation(self, side: Side, name: str, run: int) -> None:
        crowd = self.plan.crowd
        size = {IDENTICAL: crowd.identical, MIXED: crowd.mixed}.get(name, crowd.long)
        nonces = self.nonces.of(name, size, run, NONCES)
        if values := measure_situation(side, name, nonces, crowd):
            self.found.situations.append(Situation(name, size, run, values))
        self.go_on(side)
        self.advance(name, self.plan.situation_tokens(name))
