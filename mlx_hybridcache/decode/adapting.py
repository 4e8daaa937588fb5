"""Another adapter in the model: what goes with it are namespaces, and whether replies decode together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.lora import Adapters
from ..caches.layout import Layout
from ..request.sharing import Sharing
from ..tokens import settings_digest
from ..worker.mlx_thread import wired_mlx_thread
from . import batch_check as batching
from .decoder import Decoder


@dataclass(eq=False)
class Adapting:
    """The adapters of one engine's model. Used between two turns, while no request is under way."""

    model: Any
    layout: Layout
    sharing: Sharing
    decoder: Decoder
    _adapters: Adapters = field(init=False)
    _own: str = field(init=False)
    _batches: dict[str, bool] = field(default_factory=dict, init=False)
    """Whether replies decode together, by what each adapter makes of the settings."""

    def __post_init__(self) -> None:
        self._adapters, self._own = Adapters(self.model), self.sharing.settings

    @contextmanager
    def mlx_thread(self) -> Iterator[None]:
        """For the thread that serves the model. At its end no request is left that an adapter belongs to."""
        with wired_mlx_thread(self.model), self._adapters.serving():
            yield

    def use(self, path: str | Path | None) -> None:
        """Put in the adapter in a directory, None for the model as it came.

        What was stored stays where it is: each adapter has namespaces of its own. Raises `AdapterError`
        for what cannot be used.
        """
        sharing, batches = self.sharing, self._batches
        batches[sharing.settings] = self.decoder.batches
        self._adapters.use(path)
        digest = self._adapters.digest
        sharing.settings = settings_digest(model=self._own, adapter=digest) if digest else self._own
        if sharing.settings not in batches:  # what the model as it came cannot, none can
            can = batches.get(self._own, False)
            batches[sharing.settings] = can and batching.shown(self.model, self.layout)
        self.decoder.batches = batches[sharing.settings]
