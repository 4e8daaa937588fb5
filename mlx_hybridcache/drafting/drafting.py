"""Which drafters a reply has, from its first token to its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .. import models
from ..caches.layout import Layout
from ..caches.live import LiveCaches
from ..decode.reply import Reply
from ..decode.sampling import LogitsProcessor
from ..decode.speculate.drafter import Drafter, Paced
from ..decode.speculate.pace import Pace
from ..decode.speculate.passages import passages
from ..decode.speculate.recurring import MOST_SEARCHED, RecurringDrafter
from ..decode.speculate.speculation import Speculation
from ..errors import SettingError
from ..prefill.prefill import Prefill
from ..request.options import Drafts
from ..request.request import Request
from ..request.sharing import Sharing
from ..tiers import Tiers
from ..tokens import Tokens
from ..worker.mlx_thread import on_mlx_thread
from ..worker.turns import Pause
from .draft_model import DraftModel, ModelDrafter
from .head import Head
from .head_drafter import HeadDrafter
from .head_tiers import HeadTiers


@dataclass(eq=False)
class Drafting:
    """Drafters for the replies of one model. `made` makes a draft model of a model."""

    model: Any
    layout: Layout
    sharing: Sharing
    tiers: Tiers
    prefill: Prefill
    tokens: int
    """The tokenizer's: what two models must have in common, however many rows their vocabularies have."""
    made: Callable[[Any], DraftModel]
    _known: list[DraftModel] = field(default_factory=list, init=False)
    _heads: dict[str, HeadTiers] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.tiers.memory.before_refusing = self._let_go

    # Draft models

    def learn(self, model: Any, on_worker: Callable[[Callable[[], None]], None]) -> None:
        """Make a draft model of `model`, if any, unless it is one. Raises `SettingError` for one that cannot be one.

        Called on the thread that has its lazy arrays.
        """
        if model is not None and not self.layout.unsupported and not self._knows(model):
            models.evaluate(model)
            on_worker(partial(self._learn, model))

    def _knows(self, model: Any) -> bool:
        return any(each.model is model for each in self._known)

    def _learn(self, model: Any) -> None:
        if self._knows(model):
            return
        draft = self.made(model)
        if draft.layout.unsupported:
            draft.layout.release()
            names = ", ".join(draft.layout.unsupported)
            raise SettingError(
                f"This draft_model cannot be used: {names} of it cannot take drafts back. "
                "Use another model, or draft_from_cache."
            )
        own, other = self.layout.vocabulary, draft.layout.vocabulary
        if own != other and min(own, other) < max(self.tokens, 1):
            draft.layout.release()
            raise SettingError(
                f"This draft_model has a vocabulary of {other}, the model one of {own}: a draft model must "
                "share the tokenizer."
            )
        self._known.append(draft)

    def learn_asked(
        self, options: Mapping[str, Any], on_worker: Callable[[Callable[[], None]], None]
    ) -> None:
        """What these options of a request name. Raises as the two of them do."""
        self.learn(options.get("draft_model"), on_worker)
        self.learn_head(options.get("draft_mtp"), on_worker)

    def learn_head(
        self, source: str | Path | None, on_worker: Callable[[Callable[[], None]], None]
    ) -> None:
        """Load the model's own head from where the model came from, if anywhere. Raises as `Head.of` does."""
        if source is not None and not self.layout.unsupported and str(source) not in self._heads:
            head = on_mlx_thread(lambda: Head.of(self.model, self.layout, source)).result()
            on_worker(partial(self._keep_head, str(source), head))

    def _keep_head(self, source: str, head: Head) -> None:
        if source in self._heads:  # another thread has learnt it meanwhile
            head.release()
        else:
            self._heads[source] = HeadTiers(head, self.sharing, self.tiers)

    def release(self) -> None:
        """Let the model and the draft models be what they were."""
        for each in self._known:
            each.layout.release()
        for own in self._heads.values():
            own.head.release()
        self._known.clear()
        self._heads.clear()

    def forget(self, salt: str, tokens: Tokens) -> None:
        """What draft models and heads have of it goes too."""
        for each in self._known:
            each.tiers.forget(salt, tokens)
        for own in self._heads.values():
            own.forget(salt, tokens)

    def _let_go(self) -> None:
        for each in (*self._known, *(own.head for own in self._heads.values())):
            each.let_go()

    # A reply

    @contextmanager
    def listening(
        self, request: Request, live: LiveCaches, options: Mapping[str, Any]
    ) -> Iterator[None]:
        """A head hears what is read for its reply, behind what it has stored of it."""
        drafts: Drafts = options["drafts"]
        if drafts.head is None:
            yield
            return
        drafter = live.listener = HeadDrafter(self._heads[drafts.head], request)
        try:
            yield
        finally:
            live.listener = None
            drafter.leave(live.position)

    def resume(self, live: LiveCaches) -> Iterator[Pause]:
        """What a head has stored of what was restored into `live`, if one listens."""
        if isinstance(live.listener, HeadDrafter):
            yield from live.listener.resume()

    def speculation(
        self,
        request: Request,
        live: LiveCaches,
        drafts: Drafts,
        processors: Sequence[LogitsProcessor],
    ) -> Speculation | None:
        """What a reply drafts with; None where it does not.

        What is stored comes first, and what computes drafts where nothing recurs: it costs forwards of its own.
        """
        drafters = []
        if drafts.from_cache:
            recurring, pace = self.recurring(request, live), Pace(drafts.from_cache)
            drafters.append(Paced(recurring, pace, from_stored=True))
        if drafts.model is not None:
            draft = next(each for each in self._known if each.model is drafts.model)
            drafter = draft.drafter(request, self.layout.vocabulary)
            drafters.append(Paced(drafter, Pace(drafts.computed)))
        if isinstance(live.listener, HeadDrafter):
            drafters.append(Paced(live.listener, Pace(drafts.computed)))
        memory, tokens = self.tiers.memory, request.tokens
        if not drafters:
            return None
        return Speculation(self.model, self.layout, memory, tokens, drafters, processors)

    def feeds(self, reply: Reply) -> bool:
        """Whether drafts for other replies are to be found in this one, however the history renders it."""
        drafters = [] if reply.speculation is None else reply.speculation.drafters
        return any(each.from_stored for each in drafters)

    def recurring(self, request: Request, live: LiveCaches) -> Drafter:
        """What has an idea of the reply: the texts that are stored for the same namespace, its salt included."""
        tokens, memory = request.tokens, self.tiers.memory
        match = memory.match(request.namespace, tokens, live.known)
        stored = passages(match, len(tokens), MOST_SEARCHED)
        return RecurringDrafter(tokens, stored)

    def read(self, request: Request, reply: Reply) -> Iterator[Pause]:
        """The prompt, by the draft model of a reply that goes on alone: its first token does not wait for that."""
        for each in _models(reply):
            yield from each.read()
        request.job.left = 0

    @contextmanager
    def ending(self, request: Request, reply: Reply) -> Iterator[None]:
        """Whatever ends a reply, what drafted it is let go of. Its state is stored where the reply's is."""
        speculation, computing = reply.speculation, _computing(reply.speculation)
        try:
            yield
        finally:
            if speculation is not None:
                read = reply.read
                is_kept = bool(read) and reply.guard.error is None
                is_kept = is_kept and not self.prefill.marks.strips(read, request.tokens)
                speculation.end(read if is_kept else None)
                for each in computing:
                    request.account.amend(draft_forwards=each.forwards)


def told(speculation: Speculation) -> dict[str, int]:
    """What a reply's drafts came to so far, in the report's words."""
    counts = speculation.counts
    found = {
        "drafted_tokens": counts.drafted,
        "accepted_tokens": counts.accepted,
        "reply_forwards": counts.forwards,
    }
    for each in _computing(speculation):
        found["draft_forwards"] = each.forwards
        found["draft_restored_tokens"] = each.restored
    return found


def _computing(speculation: Speculation | None) -> list[ModelDrafter | HeadDrafter]:
    """Those that call something for their drafts."""
    drafters = [] if speculation is None else speculation.drafters
    return [
        each.drafter for each in drafters if isinstance(each.drafter, ModelDrafter | HeadDrafter)
    ]


def _models(reply: Reply) -> list[ModelDrafter]:
    return [each for each in _computing(reply.speculation) if isinstance(each, ModelDrafter)]
