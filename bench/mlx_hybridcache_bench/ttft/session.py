"""What all parts of one server's measurement share: the server, what was asked, and what was found."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..report.results import Measured, Request
from ..serving.client import Reply
from ..serving.remote import RemoteServer
from ..serving.scenarios import Step
from ..serving.servers import ServerError, ServerProcess
from ..serving.side import Nonces, Side
from ..serving.target import Target
from .contenders import Contender
from .dialect import ESTIMATED, Dialect, learn, material_for, says_sizes
from .plan import BenchPlan

MOST_RESTARTS = 5
"""A server that dies more often is left alone."""

HEAD_START_SECONDS = 0.25
"""Of a long prompt before the short one: no server has read it by then, and all have begun."""

STOP_SECONDS = 60.0
"""For a server to write down what it keeps."""

EARLIER, NEW_START = "the same request earlier", "a newly started server"

Advance = Callable[[str, int], object]


class Session:
    """One contender, and what was found out about it. `replies` belong to `found.requests`, in their order.

    `tokenizer` is None where the model's files are not at hand. `advance` is told what was
    measured, and how many tokens of prompts that was. `last` holds each scenario's last request.
    """

    def __init__(
        self,
        contender: Contender,
        plan: BenchPlan,
        tokenizer: object | None,
        advance: Advance,
        nonces: Nonces,
    ) -> None:
        self.found = Measured(
            name=contender.name,
            kind="process" if contender.launch else "url",
            version=contender.version,
            flags=contender.flags,
            model=dict(contender.model),
        )
        self.contender = contender
        self.plan = plan
        self.advance = advance
        self.nonces = nonces
        self.replies: list[Reply | str] = []
        self.last: dict[str, tuple[str, int, Step, Reply]] = {}
        self._tokenizer = tokenizer

    def started(self, process: ServerProcess) -> Target:
        began = time.perf_counter()
        if process.pid is None:
            process.start()
        process.wait_ready()
        if self.found.ready_seconds is None:
            self.found.ready_seconds = time.perf_counter() - began
        return self.target(process)

    def target(self, server: ServerProcess | RemoteServer) -> Target:
        return Target(
            server,
            timeout_seconds=self.plan.timeout_seconds,
            fields=self.contender.fields,
            api_key=self.contender.api_key,
            most_restarts=MOST_RESTARTS,
            head_start_seconds=HEAD_START_SECONDS,
        )

    def learn(self, target: Target) -> Dialect:
        dialect = learn(target)
        self.found.notes += dialect.notes
        if self._tokenizer is None and not says_sizes(dialect):
            self.found.notes.append(ESTIMATED)
        return dialect

    def side(self, target: Target, dialect: Dialect) -> Side:
        material = material_for(dialect, self._tokenizer, self.plan.text_tokens)
        warm_ups = ("throughput", "repeat") if dialect.completes else ("repeat",)
        return Side(target, material, self.plan.warm_up_tokens, warm_ups)

    def tell(self, scenario: str, size: int, step: str, run: int, reply: Reply | str) -> None:
        """Take down a request and what came back."""
        self.found.requests.append(Request.of(scenario, size, step, run, reply))
        self.replies.append(reply)

    def go_on(self, side: Side) -> None:
        """Take down what failed. Raises `ServerError` when the server will not come back."""
        self.found.troubles += side.troubles
        side.troubles.clear()
        if side.target.gone:
            raise ServerError(side.target.gone)
