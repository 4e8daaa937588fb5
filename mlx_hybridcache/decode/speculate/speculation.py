"""Speculation: what a lone reply drafts is read in one forward, and what is right of it stays.

A draft changes nothing but the number of forwards: what is drawn behind each token, from the very
log-probabilities that it has without drafts, decides whether the next drafted one is right. So a sampled
reply is the one that its seed gives, and its distribution the model's (a drafter that names one token for
a place makes rejection sampling, arXiv 2211.17192, come to this).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...caches.layout import Layout
from ...caches.live import LiveCaches
from ...caches.memory import MemoryStore
from ...caches.rollback.block import Block
from ...store.budget import Claim
from ...tokens import Tokens
from ..batch import Made
from .drafter import Foreseeing, Paced

if TYPE_CHECKING:
    from ..reply import Reply


@dataclass(slots=True)
class Drafted:
    """What a reply's drafts came to: tokens that were drafted and those that were right, and all forwards
    of the model, for which it would have needed one a token.
    """

    drafted: int = 0
    accepted: int = 0
    forwards: int = 0


class Speculation:
    """One reply's drafts. Between two forwards its caches can go back to any token of the last block.

    Of several `drafters` those that come later are asked where the ones before them have no idea.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout,
        store: MemoryStore,
        prompt: Tokens,
        drafters: Sequence[Paced],
        processors: Sequence[object] = (),
    ):
        self.counts = Drafted(forwards=1)  # the prompt's last token gave the reply's first one
        self._model = model
        self._layout = layout
        self._longest = layout.longest_block
        self._store = store
        self.drafters = drafters
        self._drafted_by: Paced | None = None
        self._foreseeing = [each for each in processors if isinstance(each, Foreseeing)]
        self._start = len(prompt)
        self._history: list[int] = prompt.tolist()
        self._block: Block | None = None
        self._claim: Claim | None = None

    def step(self, reply: Reply) -> list[Made]:
        """The next tokens of a lone reply by one forward; none where it has nothing to draft."""
        self.let_go()
        room = self._room(reply)
        coming = reply.coming if room > 0 else None
        if coming is not None and coming not in reply.ends:
            drafted = self._propose(reply.read, coming, room)
            if drafted and self._read(reply.live, [coming, *drafted]):
                return self._verify(reply)
        self.counts.forwards += 1  # that of a single token
        return []

    def _room(self, reply: Reply) -> int:
        """How many tokens may be drafted behind the coming one."""
        live = reply.live
        ahead = self._layout.tokens_ahead(live.position)
        most = min(self._longest, ahead, live.capacity - live.position)
        return (most if reply.left < 0 else min(most, reply.left)) - 1

    def _propose(self, read: list[int], coming: int, room: int) -> list[int]:
        """Drafted tokens behind `coming`, which follows what the reply has `read`."""
        self._history.extend(read[len(self._history) - self._start :])
        if len(self._history) == self._start + len(read):
            self._history.append(coming)
        for paced in self.drafters:
            most = min(room, paced.pace.width())
            drafted = paced.drafter.propose(self._history, most) if most > 0 else []
            if drafted:
                for each in self._foreseeing:  # what cannot come need not be read
                    drafted = drafted[: max(0, each.may_follow([coming, *drafted]) - 1)]
            if drafted:
                self._drafted_by = paced
                return drafted
        return []

    def _read(self, live: LiveCaches, tokens: list[int]) -> bool:
        """A forward over the coming token and drafted ones; False where what is stored would have to go."""
        self._claim = self._store.claim_free(self._layout.block_bytes(len(tokens)))
        if self._claim is None:
            return False
        self._block = Block(self._layout, self._model, live.caches, live.position, tokens)
        return True

    def _verify(self, reply: Reply) -> list[Made]:
        """The block's right tokens; the caches stand behind them."""
        block, guard, by = self._block, reply.guard, self._drafted_by
        assert block is not None and by is not None
        made = reply.steps.batch.verified(
            block.tokens, block.logits, reply.ends, lambda: guard.error is not None
        )
        drafted, accepted = len(block.tokens) - 1, len(made) - 1
        block.keep(len(made))
        by.drafter.accepted(drafted, accepted)
        by.pace.note(drafted, accepted)
        self.counts.drafted += drafted
        self.counts.accepted += accepted
        self.counts.forwards += block.forwards
        return made

    def take_back(self, count: int) -> None:
        """Nobody took the last `count` tokens of the block: the caches go back behind those before them."""
        block = self._block
        assert block is not None
        block.keep(block.stands - count)

    def let_go(self) -> None:
        """The caches will not go back any more: what that takes is given back."""
        claim, self._claim, self._block = self._claim, None, None
        if claim is not None:
            claim.release()

    def end(self, read: Sequence[int] | None) -> None:
        """No more drafts. The reply has `read` these tokens; None where what drafted it is not to be stored."""
        self.let_go()
        history = None if read is None else [*self._history[: self._start], *read]
        for paced in self.drafters:
            paced.drafter.end(history)
