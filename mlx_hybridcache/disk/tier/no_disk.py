"""The disk tier of a cache without a directory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ...caches.layout import Layout
from ...caches.memory import MemoryFound, MemoryNode
from ...store.budget import Claim
from ...store.outline import Outline
from ...tokens import Namespace, Tokens
from ...worker.turns import Job, Pause

if TYPE_CHECKING:
    from ..parts import FileFound
    from .arrays import RestoreBuffers
    from .tier import DiskStats


T = TypeVar("T")


class NoDisk:
    """The disk tier of a cache without a directory: nothing is found there, and nothing kept."""

    summary = None
    outlines: ClassVar[Mapping[Namespace, Outline]] = {}

    def find(self, namespace: Namespace, tokens: Tokens, beyond: int) -> FileFound | None:
        """As `DiskTier.find`; so are the others."""
        return None

    def promote(
        self,
        layout: Layout,
        found: MemoryFound,
        deeper: FileFound,
        capacity: int,
        claim: Claim,
        job: Job,
    ) -> Generator[Pause, None, RestoreBuffers | None]:
        yield from ()
        return None

    def with_room(
        self, tried: Callable[[], Generator[Pause, None, T]], job: Job
    ) -> Generator[Pause, None, T]:
        return (yield from tried())

    def learn(self, layout: Layout, model: Any, settings: Iterable[str]) -> None: ...

    def offer(self, namespace: Namespace, node: MemoryNode) -> None: ...
    def hold(
        self, namespace: Namespace, tokens: Tokens, lifetimes: Mapping[int, float]
    ) -> None: ...
    def materialized(self) -> None: ...
    def tick(self) -> None: ...
    def publish(self, now: float | None) -> None: ...
    def clear(self) -> None: ...
    def drop(self, namespace: Namespace, tokens: Tokens, start: int) -> None: ...
    def pin(self, namespace: Namespace, tokens: Tokens, *, is_pinned: bool) -> None: ...

    def shared(self, namespace: Namespace, tokens: Tokens) -> tuple[int, int]:
        return 0, 0

    def pins(self, namespace: Namespace, tokens: Tokens, start: int) -> int:
        return 0

    def is_writing(self) -> bool:
        return False

    def is_written(self) -> bool:
        return True

    def stats(self) -> DiskStats | None:
        return None
