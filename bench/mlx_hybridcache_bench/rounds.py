"""Both servers led through the same scripts in turns, so that a busy machine is unfair to neither."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from .client import Client, Reply, RequestFailed
from .scenarios import AT_EVERY_SIZE, SCENARIOS, Material, Script, Step
from .servers import Launch, ServerError, ServerProcess

SETTLE_SECONDS = 0.02
"""Before each request: what a server still does after a reply should not slow the other one."""

NO_REPLY = Reply(0.0, 0.0, 0, 0, 0, None)
"""What a script is sent when its server failed, so that it can go on."""


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
    """One server, its client and what went wrong with it."""

    def __init__(self, process: ServerProcess, material: Material, warm_up_tokens: int) -> None:
        self.name = process.name
        self.deaths: list[Death] = []
        self._process = process
        self._material = material
        self._warm_up_tokens = warm_up_tokens
        self._gone = ""  # why it is asked no more
        self._client = self._connect()

    def _connect(self) -> Client:
        return Client(self._process.url, cpu_clock=self._process.cpu_seconds)

    def close(self) -> None:
        """Give the connection back; the process belongs to whoever started it."""
        self._client.close()

    def warm_up(self) -> None:
        """Requests that are not measured: the first ones pay for the model, its kernels, new memory.

        A chat and raw text, cold and again, decoding included. Raises `ServerError`.
        """
        try:
            for name in ("throughput", "repeat"):
                script = SCENARIOS[name](self._material, fresh_nonce(), self._warm_up_tokens)
                for step in script:
                    self._client.ask(step.path, step.body)
        except RequestFailed as error:
            raise ServerError(f"{self.name} failed while warming up: {error}") from error

    def ask(self, scenario: str, step: Step) -> Reply | str:
        """The reply, or why there is none. A server that cannot go on is replaced by a new one."""
        if self._gone:
            return self._gone
        try:
            return self._client.ask(step.path, step.body)
        except RequestFailed as error:
            sentence = str(error)
        dead = not self._process.healthy()
        self.deaths.append(Death(self.name, scenario, step.name, sentence, dead))
        if dead:
            self._replace()
        return sentence

    def _replace(self) -> None:
        """Start the server again. If it will not start, the run goes on without it."""
        self._client.close()
        try:
            self._process.restart()
            self._client = self._connect()
            self.warm_up()
        except ServerError as error:
            self._gone = str(error)


@contextmanager
def started(
    launches: Sequence[Launch], material: Material, warm_up_tokens: int
) -> Iterator[list[Side]]:
    """The servers, loaded at the same time, warm and ready; all stopped at the end."""
    with ExitStack() as stack:
        processes = [stack.enter_context(ServerProcess(launch)) for launch in launches]
        for process in processes:
            process.wait_ready()
        sides = [Side(process, material, warm_up_tokens) for process in processes]
        for side in sides:
            stack.callback(side.close)
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
    on_step: Callable[[str], object] = lambda said: None,
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
                    on_step(f"{name} {size:,}: {each.step} ({run + 1} of {repeats})")
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
