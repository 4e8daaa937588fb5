"""The model being served, the requests running on it, and what is remembered of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fastapi import Request

from mlx_hybridcache import CacheReport, Generation
from mlx_hybridcache.cache import Through
from mlx_hybridcache.report import Divergence
from mlx_hybridcache.tokens import Tokens

from ..adapter import NORMAL, Sampling
from ..calls.parts import Parts
from ..log import CLIENTS
from ..metrics import Metrics
from ..prompts.stable import StablePrefix
from ..prompts.threads import Rendering
from ..settings import Settings
from .admission import Admission, Admitted, ReadingSlot
from .changes import kind_of_change
from .history import REMEMBERED, Record
from .limits import NO_LIMITS, Limits
from .listen import Listener
from .model_slot import ModelSlot
from .models import Loaded
from .pieces import Count, Piece, PromptProgress
from .trace import Recorder, Served

if TYPE_CHECKING:
    from ..calls.formats import ToolFormat
    from ..grammar.constrain import Constraint

log = logging.getLogger("mlx_hybridcache.server")
clients = logging.getLogger(CLIENTS)

BETWEEN = 4
"""Calls that may wait for the end of a turn of the worker at once, each with a thread."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ReplyRequest:
    """One reply that is wanted."""

    tokens: Tokens
    max_tokens: int
    sampling: Sampling
    seed: int
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None
    state: str = NORMAL
    endpoint: str = "/v1/chat/completions"
    is_chat: bool = True
    goes_on: bool = False  # where the prompt's text ends, so that a leading space counts
    tools: ToolFormat | None = None
    one_tool_call: bool = False
    constraint: Constraint | None = None
    limits: Limits = NO_LIMITS
    best_effort: bool = False
    cache_salt: str | None = None
    use_cache: bool = True
    stable: StablePrefix | None = None
    options: dict[str, Any] = field(default_factory=dict)


class UnderWay(Protocol):
    """What waits for the model, or is at it."""

    def progress(self) -> dict[str, Any]:
        """How far it is, as JSON."""
        ...


class RunningReply:
    """One reply under way. Read `pieces` once; then `report`, `count` and `timings` are complete."""

    def __init__(
        self,
        serving: Serving,
        loaded: Loaded,
        request: ReplyRequest,
        reply_id: str,
        admitted: Admitted,
    ):
        self.request = request
        self.reply_id = reply_id
        self.count = Count(prompt=len(request.tokens))
        self.report: CacheReport | None = None
        self._serving = serving
        self._loaded = loaded
        self._admitted = admitted
        self._arrived_at = time.time()
        self._progress: PromptProgress | None = None
        self._began = self._first = self._last = 0.0
        self._is_late = False
        self._giving_back: asyncio.Future[None] | None = None
        self._generation: Generation[Piece | PromptProgress] | None = None
        self._turn: asyncio.Future[Any] | None = None

    @property
    def tokenizer(self) -> Any:
        """That of the model it runs on."""
        return self._loaded.tokenizer

    @property
    def seconds_to_first_token(self) -> float:
        """From its arrival, waiting included."""
        return self._first - self._admitted.arrived

    @property
    def endpoint(self) -> str:
        """Where it was asked for."""
        return self.request.endpoint

    @property
    def seconds_waited(self) -> float:
        """In the queue, until it was handed to the model's thread."""
        return max(0.0, self._began - self._admitted.arrived)

    @property
    def read_tokens(self) -> int:
        """Of its prompt, so far."""
        if self._first:
            return self.count.prompt
        return self._progress.read if self._progress is not None else 0

    def progress(self) -> dict[str, Any]:
        """How far it is, as JSON."""
        state = "writing" if self._first else "reading" if self._began else "queued"
        return {
            "id": self.reply_id,
            "endpoint": self.endpoint,
            "arrived": self._arrived_at,
            "state": state,
            "prompt_tokens": self.count.prompt,
            "restored_tokens": self.count.cached if self._first else None,
            "read_tokens": self.read_tokens,
            "completion_tokens": self.count.completion,
        }

    async def pieces(self) -> AsyncGenerator[Piece | PromptProgress]:
        """Wait for a turn, then what comes. Closing this iterator cancels the request."""
        serving = self._serving
        async with AsyncExitStack() as held:
            held.callback(self._admitted.leave)
            serving.runs[self] = None
            held.callback(serving.runs.pop, self)
            reading = await self._waited(self._admitted.turn(held))
            if reading is None:
                return
            begin = partial(self._begun, held, reading)
            async with aclosing(serving.admission.memory.items(begin, self._queued)) as items:
                async for item in items:
                    yield item

    async def _begun(
        self, held: AsyncExitStack, reading: ReadingSlot
    ) -> AsyncGenerator[Piece | PromptProgress]:
        """What comes once it is handed to the worker, which it is again where there was no room."""
        async with await held.enter_async_context(AsyncExitStack()) as begun:
            generation = self._start(begun)
            left = self._admitted.left_seconds
            if left is not None:
                timer = asyncio.get_running_loop().call_later(left, self._give_up, generation, held)
                begun.callback(timer.cancel)
            async with aclosing(self._counted(generation, reading)) as items:
                async for item in items:
                    yield item

    async def _waited(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What it waits for; None when it is cancelled before."""
        turn = self._turn = asyncio.ensure_future(work)
        try:
            done: T = await turn
            return done
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():  # its client left, or the request ended
                raise
            return None

    async def _queued(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The same, as one that is not begun, whatever it was."""
        self._generation, self._began = None, 0.0
        return await self._waited(self._admitted.queued(work))

    def _start(self, held: AsyncExitStack) -> Generation[Piece | PromptProgress]:
        """Hand it to the worker; `held` ends it."""
        serving = self._serving
        serving.check_open()
        self._began = time.perf_counter()
        generation = self._generation = self._generate()
        serving.generations.add(generation)
        held.callback(self._closed, generation)
        return generation

    def _give_up(
        self, generation: Generation[Piece | PromptProgress], held: AsyncExitStack
    ) -> None:
        """The time is over. What it holds is free at once, though its client may not be listening."""
        self._is_late = True
        generation.cancel()
        self._serving.admission.memory.freed()
        self._giving_back = asyncio.ensure_future(held.aclose())

    async def _counted(
        self, generation: Generation[Piece | PromptProgress], reading: ReadingSlot
    ) -> AsyncGenerator[Piece | PromptProgress]:
        finished = False
        async for item in generation:
            if isinstance(item, Piece):
                if not self._first:
                    self._read(generation)
                    reading.end()
                self._last = time.perf_counter()
                self.count.completion += 1
                self.count.reasoning += item.is_reasoning
                finished = item.finish is not None
                if item.finish == "length" and self.request.best_effort:
                    clients.warning(
                        "A reply went on until no more fitted: its request set no max_tokens, or more. "
                        "--max-tokens bounds those that set none."
                    )
            else:
                self._progress = item
            yield item
        if not finished:
            if self._is_late:
                raise self._admitted.too_late()
            self._serving.check_open()

    def cancel(self) -> bool:
        """End it where it is, as a client's leaving does; whether it was under way."""
        if self._generation is not None:
            self._generation.cancel()
            return True
        return self._turn is not None and self._turn.cancel()

    def timings(self) -> dict[str, float]:
        """What took how long, under llama.cpp's names, and how many tokens stand before what changes."""
        stable = self.request.stable
        return {
            **({} if stable is None or stable.tokens is None else {"stable_n": stable.tokens}),
            "cache_n": self.count.cached,
            "prompt_n": self.count.prompt - self.count.cached,
            "prompt_ms": round((self._first - self._began) * 1e3, 3),
            "predicted_n": self.count.completion,
            "predicted_ms": round((self._last - self._first) * 1e3, 3),
            **self._drafts(),
        }

    def _drafts(self) -> dict[str, float]:
        """What drafts came to, where there may have been some; `forwards_n` are the model's calls."""
        report = self._generation.report if self._generation is not None else None
        options = self.request.options
        if report is None or not options.keys() & {"draft_model", "draft_mtp", "draft_from_cache"}:
            return {}
        counts: dict[str, float] = {
            "draft_n": report.drafted_tokens,
            "draft_n_accepted": report.accepted_tokens,
            "forwards_n": report.reply_forwards,
        }
        if options.keys() & {"draft_model", "draft_mtp"}:  # what has its own of a prompt
            counts["draft_cache_n"] = report.draft_restored_tokens
            counts["draft_forwards_n"] = report.draft_forwards
        return counts

    def _listener(self) -> Listener:
        request, loaded = self.request, self._loaded
        parts = partial(
            Parts, loaded.tokenizer, request.state, request.tools, only_one=request.one_tool_call
        )
        return Listener(
            request.stops,
            parts if request.is_chat else None,
            request.top_logprobs,
            loaded.token_bytes if request.goes_on else None,
            request.limits.ends,
        )

    def _generate(self) -> Generation[Piece | PromptProgress]:
        request, loaded, listener = self.request, self._loaded, self._listener()
        sampling = request.sampling
        processors = sampling.processors()
        processors += request.limits.processors(loaded.tokenizer, request.state)
        through: Through[Piece | PromptProgress] = listener.listen
        if request.constraint is not None:
            guide = request.constraint.start()
            processors.append(guide)  # last: no bias can allow what the grammar does not
            through = guide.watching(through)
        recorder, uses_cache = self._serving.recorder, self._serving.settings.uses_cache
        declined = uses_cache and not request.use_cache
        if recorder is not None and not declined:
            served = Served.now(loaded.cache.info, request.tokens, request.cache_salt)
            through = recorder.watching(through, served)
        return loaded.cache.stream_generate(
            request.tokens,
            request.max_tokens,
            prompt_progress_callback=listener.on_progress,
            cache_salt=request.cache_salt,
            use_cache=request.use_cache,
            seed=request.seed,
            best_effort=request.best_effort,
            # Greedy replies draw nothing, so they need no random stream of their own.
            sampler=sampling.sampler(loaded.tokenizer) if sampling.temperature else None,
            logits_processors=processors or None,
            through=through,
            **request.options,
        )

    def _read(self, generation: Generation[Piece | PromptProgress]) -> None:
        """The first token is there."""
        self._first = time.perf_counter()
        self.report = report = generation.report
        assert report is not None
        self.count.cached = report.restored_tokens
        self._serving.metrics.read(report, self.seconds_to_first_token)

    def _closed(self, generation: Generation[Piece | PromptProgress]) -> None:
        generation.cancel()  # which ends nothing if it has ended
        self._serving.generations.discard(generation)
        self._serving.metrics.generated.inc(self.count.completion)
        if generation.report is not None:
            self._serving.metrics.wrote(generation.report)
        if self.report is not None:
            self.report = generation.report  # which has grown with the reply
            self._serving.remember(self, generation.divergence)


class Serving:
    """Runs replies on the model that is loaded, within the limits that were set."""

    def __init__(self, settings: Settings, loaded: Loaded, recorder: Recorder | None = None):
        self.settings = settings
        self.closing = asyncio.Event()
        self.slot = ModelSlot(settings, loaded, self.closing)
        self.recorder = recorder
        self.metrics = Metrics(
            held=lambda: self.loaded.cache.summary,
            on_disk=lambda: self.loaded.cache.disk_summary,
            load=lambda: self.loaded.cache.load,
            waiting=lambda: self.admission.waiting,
        )
        self.admission = Admission(settings, self.metrics)
        self.rendering = Rendering()
        self.generations: set[Generation[Any]] = set()
        self.runs: dict[UnderWay, None] = {}
        self.recent: deque[Record] = deque(maxlen=REMEMBERED)
        self.remembered = 0
        self.started = time.time()
        self.watching = 0
        self._between = ThreadPoolExecutor(BETWEEN, thread_name_prefix="between-turns")

    def cancel(self, reply_id: str, salt: str | None) -> bool:
        """End a reply that is being written under this id and salt; whether there was one."""
        for run in self.runs:
            if isinstance(run, RunningReply) and run.reply_id == reply_id:
                return run.request.cache_salt == salt and run.cancel()
        return False

    async def between_turns(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run what the worker does between two turns. No work without bound keeps it waiting."""
        call = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._between, call)

    @property
    def loaded(self) -> Loaded:
        """The model that is served, or what is known of it while it rests."""
        return self.slot.loaded

    def check_open(self) -> None:
        """Raises `ApiError` 503 when the server is stopping."""
        self.slot.check_open()

    def stop(self) -> None:
        """End what runs: every stream gets its event, every other request its error."""
        self.closing.set()
        for generation in list(self.generations):
            generation.cancel()
        self.slot.stop()

    def close(self) -> None:
        """Let go of the model. Waits for the worker."""
        self.rendering.close()
        self._between.shutdown()
        self.slot.close()

    def remember(self, run: RunningReply, divergence: Divergence | None) -> None:
        """Keep what happened for `/v1/cache/recent`."""
        assert run.report is not None
        changed = text = None
        if divergence is not None:
            parts = {
                name: run.tokenizer.decode(list(getattr(divergence, name)))
                for name in ("before", "asked", "stored")
            }
            changed = kind_of_change(**parts)
            if self.settings.show_prompts and not run.request.cache_salt:
                text = parts
        self.remembered += 1
        self.recent.appendleft(
            Record(
                run.reply_id,
                run.endpoint,
                int(time.time()),
                run.report,
                run.seconds_waited,
                run.seconds_to_first_token,
                run.count.completion,
                run.request.stable,
                changed,
                text,
            )
        )
        log.info(
            "%s: %s; first token after %.3f s", run.reply_id, run.report, run.seconds_to_first_token
        )


def serving_of(request: Request) -> Serving:
    """The server that a request came to."""
    serving: Serving = request.app.state.serving
    return serving
