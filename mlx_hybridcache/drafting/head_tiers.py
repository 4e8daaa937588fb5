"""Where a head's rows are stored: beside its model's, in the same store, budget and directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ..request.request import Request
from ..request.sharing import Sharing
from ..tiers import Tiers
from ..tokens import Tokens, settings_digest
from .head import Head


class Place(NamedTuple):
    """Of the prompts of one namespace's settings."""

    sharing: Sharing
    tiers: Tiers


@dataclass(eq=False)
class HeadTiers:
    """A head, with the namespaces in which it stores what it has of its model's prompts.

    `sharing` and `tiers` are its model's. Each namespace of those has one of the head's own beside it: so nothing of
    another salt is found, nor of another adapter, whose hidden states are others.

    The row of position i is made of the hidden state there and of the token behind, so what leads to it are the
    tokens up to i + 1, and a path has those from the second on: `path(tokens)[:n]` leads to n rows and to hidden
    state n, of which no token of any branch behind it is a part. The first token is in none. Prompts that differ
    in it alone share rows: that may cost drafts that would have been right, and no reply, as each is verified.
    """

    head: Head
    sharing: Sharing
    tiers: Tiers
    _places: dict[str, Place] = field(default_factory=dict, init=False)

    @staticmethod
    def path(tokens: Tokens) -> Tokens:
        """Under which tokens a head's rows of `tokens` are stored."""
        return tokens[1:]

    def place(self, settings: str) -> Place:
        """For prompts of namespaces with these settings. Called on the worker."""
        if settings not in self._places:
            model, head = self.sharing, self.head
            own = settings_digest(settings=settings, head=head.digest)
            sharing = Sharing(own, head.layout, model.step, model.every, exact=False)
            tiers = self.tiers.beside(head, head.layout, sharing)
            self._places[settings] = Place(sharing, tiers)
        return self._places[settings]

    def request(self, request: Request) -> Request:
        """What the head reads where its model reads `request`."""
        space = request.namespace
        return self.place(space.settings).sharing.request(
            self.path(request.tokens),
            space.salt,
            request.max_tokens,
            best_effort=request.best_effort,
            job=request.job,
        )

    def forget(self, salt: str, tokens: Tokens) -> None:
        """What only `tokens` and what goes on behind them need goes."""
        for each in self.sharing.namespaces(salt):
            self.place(each.settings).tiers.forget(salt, self.path(tokens))
