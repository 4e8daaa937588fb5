"""One server from its start to its stop: warmed up, led through everything, and looked at."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import replace

from ..report.oddities import odd
from ..report.results import (
    FAILED,
    MISSING,
    PARTIAL,
    Equality,
    Measured,
    Request,
    Situation,
    Trouble,
)
from ..serving.client import Reply, RequestFailed
from ..serving.crowd import IDENTICAL, Sizes, measure_runs
from ..serving.rounds import Asked, Side, fresh_nonce, measure_rounds
from ..serving.scenarios import (
    AFTER_RESTART,
    AT_EVERY_SIZE,
    COLD,
    RESTART,
    SCENARIOS,
    Material,
    Step,
)
from ..serving.servers import Launch, ServerError, ServerProcess
from ..serving.target import Target
from .contenders import Contender
from .dialect import ESTIMATED, Dialect, learn, material_for, says_sizes
from .memory import MemoryWatch
from .pace import REQUEST_SECONDS, Pace
from .plan import Plan
from .remote import RemoteServer

MOST_RESTARTS = 5
"""A server that dies more often is left alone."""

HEAD_START_SECONDS = 0.25
"""Of a long prompt before the short one: no server has read it by then, and all have begun."""

STOP_SECONDS = 60.0
"""For a server to write down what it keeps."""

EARLIER, NEW_START = "the same request earlier", "a newly started server"
KEPT = "was given --cache-dir for the restart, and for nothing else"

Advance = Callable[[str, int], object]


class Witness(Side):
    """A side that remembers each request and its reply, to compare them."""

    def __init__(
        self, target: Target, material: Material, plan: Plan, *, completes: bool = True
    ) -> None:
        warm_ups = ("throughput", "repeat") if completes else ("repeat",)
        super().__init__(target, material, plan.warm_up_tokens, warm_ups)
        self.heard: list[tuple[str, Step, Reply | str]] = []

    def ask(self, scenario: str, step: Step) -> Reply | str:
        reply = super().ask(scenario, step)
        self.heard.append((scenario, step, reply))
        return reply

    def forget(self) -> None:
        """What comes next is another run."""
        self.heard.clear()


class Measurement:
    """The whole of what one contender goes through; `found` is true at any moment.

    `tokenizer` is None where the model's files are not at hand. `advance` is told what was
    measured, and how many tokens of prompts that was.
    """

    def __init__(
        self,
        contender: Contender,
        plan: Plan,
        tokenizer: object | None,
        advance: Advance,
        pace: Pace | None = None,
    ) -> None:
        self.found = Measured(
            name=contender.name,
            kind="process" if contender.launch else "url",
            version=contender.version,
            flags=contender.flags,
            model=dict(contender.model),
        )
        self._contender = contender
        self._plan = plan
        self._tokenizer = tokenizer
        self._advance = advance
        self._pace = pace or Pace()
        self._probe: Reply | None = None
        self.is_under_way = True
        self._last: dict[str, tuple[str, int, Step, Reply]] = {}  # by scenario

    def run(self) -> None:
        """Measure. A server that fails is reported in `found`, never raised."""
        for _ in self.portions():
            pass

    def portions(self) -> Generator[None, None, None]:
        """The same in portions, between which other servers have their turn: the start with its warm-up,
        then each scenario of each run. Closing it stops what it has started.
        """
        contender = self._contender
        if contender.missing:
            self.found.status, self.found.reason = MISSING, contender.missing
            self.is_under_way = False
            return
        try:
            if contender.launch is None:
                yield from self._measure_remote()
            else:
                yield from self._measure_process(contender.launch)
                yield from self._measure_new_starts(contender)
            self.is_under_way = False
        except ServerError as error:
            self.is_under_way = False
            self.found.status = PARTIAL if self.found.requests else FAILED
            self.found.reason = str(error)
        finally:
            self.found.notes = list(dict.fromkeys([*self.found.notes, *odd(self.found)]))

    def expected_seconds(self) -> float:
        """Once it is warm: for all that is left, as if no cache answered anything."""
        plan, is_process = self._plan, self._contender.launch is not None
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
        server = RemoteServer(self._contender.name, self._contender.url, self._contender.api_key)
        target = self._target(server)
        try:
            dialect = self._learn(target)
            side = self._side(target, dialect)
            self._warm_up(side)
            yield
            yield from self._measure(side, dialect)
        finally:
            target.close()

    def _measure_process(self, launch: Launch) -> Iterator[None]:
        with ServerProcess(launch, start_seconds=self._plan.start_seconds) as process:
            with MemoryWatch(process) as watch:
                target = self._started(process)
                try:
                    dialect = self._learn(target)
                    side = self._side(target, dialect)
                    self._warm_up(side)
                    watch.mark_warm()
                    yield
                    yield from self._measure(side, dialect)
                finally:
                    target.close()
                    self.found.memory = watch.found()
            process.stop(STOP_SECONDS)

    def _warm_up(self, side: Witness) -> None:
        """Then one cold request more: the first ones are too slow to foretell the others."""
        side.warm_up()
        step = next(SCENARIOS["repeat"](side.material, fresh_nonce(), self._plan.warm_up_tokens))
        try:
            self._probe = side.target.ask(step)
        except RequestFailed as error:
            raise ServerError(f"{side.name} failed while warming up: {error}") from error

    def _started(self, process: ServerProcess) -> Target:
        began = time.perf_counter()
        if process.pid is None:
            process.start()
        process.wait_ready()
        if self.found.ready_seconds is None:
            self.found.ready_seconds = time.perf_counter() - began
        return self._target(process)

    def _target(self, server: ServerProcess | RemoteServer) -> Target:
        return Target(
            server,
            timeout_seconds=self._plan.timeout_seconds,
            fields=self._contender.fields,
            api_key=self._contender.api_key,
            most_restarts=MOST_RESTARTS,
            head_start_seconds=HEAD_START_SECONDS,
        )

    def _learn(self, target: Target) -> Dialect:
        dialect = learn(target)
        self.found.notes += dialect.notes
        if self._tokenizer is None and not says_sizes(dialect):
            self.found.notes.append(ESTIMATED)
        return dialect

    def _side(self, target: Target, dialect: Dialect) -> Witness:
        material = material_for(dialect, self._tokenizer, self._plan.text_tokens)
        return Witness(target, material, self._plan, completes=dialect.completes)

    def _measure(self, side: Witness, dialect: Dialect) -> Iterator[None]:
        """Run by run the scripts, then the situations of several clients."""
        for run in range(self._plan.repeats):
            if not self._pace.goes_on(run):
                return
            for name in self._plan.scripts:
                if not dialect.completes and name in ("completions", "throughput"):
                    continue
                for size in self._plan.sizes if name in AT_EVERY_SIZE else self._plan.sizes[:1]:
                    self._measure_script(side, name, size, run)
                    self._go_on(side)
                    yield
            for name in self._plan.situations:
                self._measure_situation(side, name, run)
                yield

    def _measure_script(self, side: Witness, name: str, size: int, run: int) -> None:
        side.forget()

        def on_step(asked: Asked) -> None:
            reply = asked.replies[side.name]
            self.found.requests.append(_request(name, size, asked.step, run, reply))
            self._advance(f"{name} {size:,}: {asked.step}", size)

        measure_rounds(
            [side], side.material, names=[name], sizes=[size], repeats=1, on_step=on_step
        )
        first: dict[str, Reply] = {}
        for scenario, step, reply in side.heard:
            if isinstance(reply, str):
                continue
            key = json.dumps([step.path, step.body])
            if key in first:
                same = reply.repeats(first[key])
                self.found.equalities.append(Equality(scenario, size, step.name, EARLIER, same))
            first.setdefault(key, reply)
            if size == self._plan.sizes[0]:
                self._last[scenario] = (scenario, size, step, reply)

    def _measure_situation(self, side: Witness, name: str, run: int) -> None:
        first = self._plan.sizes[0]
        sizes = Sizes(first, self._plan.long, 0, 0, self._plan.clients)
        runs, failures = measure_runs(
            [side.target], side.material, names=[name], sizes=sizes, repeats=1
        )
        size = first if name == IDENTICAL else self._plan.long
        for each in runs:
            if values := each.values.get(side.name):
                self.found.situations.append(Situation(name, size, run, dict(values)))
        self.found.troubles += [
            Trouble(name, "", failure.sentence, failure.restarted) for failure in failures
        ]
        self._go_on(side)
        self._advance(name, self._plan.situation_tokens(name))

    def _measure_new_starts(self, contender: Contender) -> Iterator[None]:
        """On new processes: the last request of each scenario cold, then one over a restart."""
        plan = self._plan
        if not (plan.restarts or plan.cold_checks):
            return
        with ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            launch = contender.keeping(directory) if plan.restarts else contender.launch
            assert launch is not None, "remote servers are not started here"
            if launch != contender.launch:
                self.found.notes.append(KEPT)
            process = stack.enter_context(ServerProcess(launch, start_seconds=plan.start_seconds))
            side = self._new_start(process)
            if plan.cold_checks:
                self._check_cold(side)
                self._go_on(side)
                yield
            for run in range(plan.repeats if plan.restarts else 0):
                if not self._pace.goes_on(run):
                    break
                side = self._measure_restart(process, side, run)
                self._go_on(side)
                yield
            side.target.close()

    def _new_start(self, process: ServerProcess) -> Witness:
        """Short questions first, so that no measured request pays for a cold model."""
        target = self._started(process)
        dialect = learn(target)
        return self._side(target, dialect)

    def _check_cold(self, side: Witness) -> None:
        """Nothing of these requests is in the new process: their replies are cold ones."""
        for scenario, size, step, reply in list(self._last.values()):
            cold = side.ask(scenario, step)
            if isinstance(cold, Reply):
                same = reply.repeats(cold)
                self.found.equalities.append(Equality(scenario, size, step.name, NEW_START, same))
            self._advance(f"cold checks: {scenario}, {step.name}", size)

    def _measure_restart(self, process: ServerProcess, side: Witness, run: int) -> Witness:
        size = self._plan.sizes[0]
        step = next(SCENARIOS["repeat"](side.material, fresh_nonce(), size))
        cold = side.ask(RESTART, replace(step, name=COLD))
        self.found.requests.append(_request(RESTART, size, COLD, run, cold))
        self._advance(f"{RESTART}: {COLD}", size)
        self._go_on(side)
        side.target.close()
        began = time.perf_counter()
        process.stop(STOP_SECONDS)
        stopped = time.perf_counter()
        process.start()
        process.wait_ready()
        ready = time.perf_counter()
        side = self._new_start(process)
        hot = side.ask(RESTART, replace(step, name=AFTER_RESTART))
        self.found.requests.append(_request(RESTART, size, AFTER_RESTART, run, hot))
        values = {"stop_seconds": stopped - began, "ready_seconds": ready - stopped}
        self.found.situations.append(Situation(RESTART, size, run, values))
        if isinstance(cold, Reply) and isinstance(hot, Reply):
            same = hot.repeats(cold)
            self.found.equalities.append(Equality(RESTART, size, AFTER_RESTART, EARLIER, same))
        self._advance(f"{RESTART}: {AFTER_RESTART}", size)
        return side

    def _go_on(self, side: Witness) -> None:
        """Take down what failed. Raises `ServerError` when the server will not come back."""
        self.found.troubles += [
            Trouble(each.scenario, each.step, each.sentence, each.restarted) for each in side.deaths
        ]
        side.deaths.clear()
        if side.target.gone:
            raise ServerError(side.target.gone)


def _request(scenario: str, size: int, step: str, run: int, reply: Reply | str) -> Request:
    if isinstance(reply, str):
        return Request(scenario, size, step, run, error=reply)
    return Request(
        scenario,
        size,
        step,
        run,
        ttft_seconds=reply.first_seconds,
        total_seconds=reply.last_seconds,
        prompt_tokens=reply.prompt_tokens,
        cached_tokens=reply.cached_tokens,
        completion_tokens=reply.completion_tokens,
        finish_reason=reply.finish_reason,
        notes=list(reply.notes),
    )
