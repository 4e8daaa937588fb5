"""Which prompts may share what: by settings and salt and, where it matters, by the slices they are read in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..caches.layout import Layout
from ..errors import AdapterError
from ..tokens import Namespace, Tokens, settings_digest
from .request import Request


@dataclass
class Sharing:
    """Where the prompts of one cache belong.

    `step` bounds a slice and `every` is the distance of its grid's cuts, both in tokens. `settings` change with
    the model's adapter, while no request is under way.
    """

    settings: str
    layout: Layout
    step: int
    every: int
    exact: bool

    def request(self, tokens: Tokens, salt: str, max_tokens: int, **asked: Any) -> Request:
        """What was asked, with where it belongs. `asked` are fields of `Request`."""
        detail = ""
        if self.layout.depends_on_slices(len(tokens)):
            detail = (
                f"beyond {self.layout.slicing_limit:,} tokens this model computes them by the slice "
                f"they are read in, so only what was read in the same slices of {self.step:,} is shared"
            )
        return Request(
            tokens,
            self.namespace(salt, len(tokens)),
            max_tokens,
            exact=self.is_exact(len(tokens)),
            detail=detail,
            **asked,
        )

    def check(self, request: Request) -> None:
        """Raises `AdapterError` where the adapter was changed between a request's making and its beginning."""
        if request.namespace not in self.namespaces(request.namespace.salt):
            raise AdapterError(
                "The model's adapter was changed before this request began. Change it when no request is made."
            )

    def is_exact(self, tokens: int) -> bool:
        """Whether so many tokens are read along the grid only: what is computed of them depends on it."""
        return self.exact or self.layout.depends_on_slices(tokens)

    def namespaces(self, salt: str) -> list[Namespace]:
        """Where `salt`'s prompts are stored: what can be cut anywhere, and what only the grid can."""
        plain = Namespace(self.settings, salt)
        if self.exact or self.layout.slicing_limit is None:
            return [plain]
        gridded = settings_digest(settings=self.settings, slices=self.step)
        return [plain, Namespace(gridded, salt)]

    def namespace(self, salt: str, tokens: int) -> Namespace:
        """The one for prompts of so many tokens."""
        return self.namespaces(salt)[-1 if self.layout.depends_on_slices(tokens) else 0]

    def stored_end(self, tokens: int) -> int:
        """How far a prompt of so many tokens is stored when it is stored to its end."""
        end = tokens - 1
        return max(1, end - end % self.every if self.is_exact(tokens) else end)
