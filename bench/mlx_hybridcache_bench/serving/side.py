"""One server led through scripts: what it replied, and what went wrong with it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .client import Reply, RequestFailed
from .scenarios import NO_REPLY, SCENARIOS, Material, Script, Step
from .servers import ServerError
from .target import Target

SETTLE_SECONDS = 0.02
"""Before each request: what a server still does after a reply should not slow the other one."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """A request that failed; `restarted` when the server had to be started again."""

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
        self.target = target
        self.material = material
        self.troubles: list[Trouble] = []
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

    def lead(self, scenario: str, script: Script) -> Iterator[tuple[Step, Reply | str]]:
        """Each request and its reply, or why there is none.

        A conversation goes on from the server's own replies, as it does for a user.
        """
        step = next(script)
        while True:
            time.sleep(SETTLE_SECONDS)
            reply = self.ask(scenario, step)
            yield step, reply
            try:
                step = script.send(NO_REPLY if isinstance(reply, str) else reply)
            except StopIteration:
                return

    def ask(self, scenario: str, step: Step) -> Reply | str:
        """The reply, or why there is none. A server that cannot go on is replaced by a new one."""
        if self.target.gone:
            return self.target.gone
        try:
            return self.target.ask(step)
        except RequestFailed as error:
            if self.failed(scenario, step.name, error):
                self._warm_up_again()
            return str(error)

    def failed(self, scenario: str, step: str, error: RequestFailed) -> bool:
        """Take down what failed; whether the server was started again."""
        restarted = self.target.revive(hung=error.hung)
        self.troubles.append(Trouble(scenario, step, str(error), restarted))
        return restarted

    def _warm_up_again(self) -> None:
        """After a new start. If that fails too, the run goes on without the server."""
        try:
            self.warm_up()
        except ServerError as error:
            self.target.gone = str(error)


class Nonces:
    """Fresh beginnings, the same for all who ask with the same key: so their replies compare."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int, int], list[str]] = {}

    def of(self, name: str, size: int, run: int, count: int = 1) -> list[str]:
        """`count` beginnings of one run of a scenario at one size in tokens."""
        made = self._made.setdefault((name, size, run), [])
        made += [fresh_nonce() for _ in range(count - len(made))]
        return made[:count]


def fresh_nonce() -> str:
    """A beginning that no prompt had before. Digits, so that all are equally many tokens."""
    return f"Case {secrets.randbelow(10**9):09}."
