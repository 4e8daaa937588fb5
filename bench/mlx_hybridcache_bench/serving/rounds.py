"""Both servers led through the same scripts in turns, so that a busy machine is unfair to neither."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from .client import Reply, RequestFailed
from .scenarios import AT_EVERY_SIZE, NO_REPLY, SCENARIOS, Material, Script, Step
from .servers import Launch, ServerError, ServerProcess
from .target import Target

SETTLE_SECONDS = 0.02
"""Before each request: what a server still does after a reply should not slow the other one."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request and what each server made of it: a reply, or the sentence of its failure."""

    scenario: str
    size: int
    step: str
    run: int
    replies: dict[str, Reply | str]


@dataclass(frozen=True, slots=True)
class Death:
    """A server that failed in a request; `restarted` when it could not answer any more."""

    server: str
    scenario: str
    step: str
    sentence: str
    restarted: bool


class Side:
    """One server led through scripts, and what went wrong with it. `warm_ups` are scenarios."""

    def __init__(
        self,
        target: Target,
        material: Material,
        warm_up_tokens: int,
        warm_ups: Sequence[str] = ("throughput", "repeat"),
    ) -> None:
        self.name = target.name
        self.deaths: list[Death] = []
        self.target = target
        self.material = material
        self._warm_up_tokens = warm_up_tokens
        self._warm_ups = warm_ups

    def warm_up(self) -> None:
        """Requests that are not measured: the first ones pay for the model, its kernels, new memory.

        A chat and raw text, cold and again, decoding included. Raises `ServerError`.
        """
        try:
            for name in self._warm_ups:
                script = SCENARIOS[name](self.material, fresh_nonce(), self._warm_up_tokens)
                for step in script:
                    self.target.ask(step)
        except RequestFailed as error:
            raise ServerError(f"{self.name} failed while warming up: {error}") from error

    def ask(self, scenario: str, step: Step) -> Reply | str:
        """The reply, or why there is none. A server that cannot go on is replaced by a new one."""
        if self.target.gone:
            return self.target.gone
        try:
            return self.target.ask(step)
        except RequestFailed as error:
            restarted = self.target.revive(hung=error.hung)
            self.deaths.append(Death(self.name, scenario, step.name, str(error), restarted))
            if restarted:
                self._warm_up_again()
            return str(error)

    def _warm_up_again(self) -> None:
        """After a new start. If that fails too, the run goes on without the server."""
        try:
            self.warm_up()
        except ServerError as error:
            self.target.gone = str(error)


@contextmanager
def started(
    launches: Sequence[Launch], material: Material, warm_up_tokens: int
) -> Iterator[list[Side]]:
    """The servers, loaded at the same time, warm and ready; all stopped at the end."""
    with ExitStack() as stack:
        processes = [stack.enter_context(ServerProcess(launch)) for launch in launches]
        for process in processes:
            process.wait_ready()
        targets = [Target(process) for process in processes]
        for target in targets:
            stack.callback(target.close)
        sides = [Side(target, material, warm_up_tokens) for target in targets]
        for side in sides:
            side.warm_up()
        yield sides


def measure_rounds(
    sides: Sequence[Side],
    material: Material,
    *,
    names: Sequence[str],
    sizes: Sequence[int],
    repeats: int,
    on_step: Callable[[Asked], object] = lambda asked: None,
) -> list[Asked]:
    """Every scenario `repeats` times, with a fresh nonce each; returns all that was asked."""
    asked: list[Asked] = []
    for run in range(repeats):
        for name in names:
            for size in sizes if name in AT_EVERY_SIZE else sizes[:1]:
                nonce = fresh_nonce()
                scripts = [SCENARIOS[name](material, nonce, size) for _ in sides]
                for each in _in_step(sides, scripts, name, size, run):
                    asked.append(each)
                    on_step(each)
    return asked


def _in_step(
    sides: Sequence[Side], scripts: Sequence[Script], name: str, size: int, run: int
) -> Iterator[Asked]:
    """Lead each server through its own script: a b, then b a, and the other way in the next run.

    A conversation goes on from its own server's replies, as it does for a user.
    """
    pairs = list(zip(sides, scripts, strict=True))
    steps = {side.name: next(script) for side, script in pairs}
    turn = run
    while steps:
        replies: dict[str, Reply | str] = {}
        for side, _ in pairs if turn % 2 == 0 else reversed(pairs):
            time.sleep(SETTLE_SECONDS)
            replies[side.name] = side.ask(name, steps[side.name])
        yield Asked(name, size, next(iter(steps.values())).name, run, replies)
        turn += 1
        following: dict[str, Step] = {}
        for side, script in pairs:
            reply = replies[side.name]
            try:
                following[side.name] = script.send(NO_REPLY if isinstance(reply, str) else reply)
            except StopIteration:
                continue
        steps = following


def fresh_nonce() -> str:
    """A beginning that no prompt had before. Digits, so that all are equally many tokens."""
    return f"Case {secrets.randbelow(10**9):09}."
