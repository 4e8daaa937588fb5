"""Arrays of a model that its own forward replaces by new ones, which are lazy until somebody needs them.

Gemma 3n converts and clips the weights of its routers in each forward, Kimi K3 multiplies two of its
weights in the first. A prefill evaluates its caches only, which do not need all of that, and a lazy array
cannot be evaluated on another thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

Attribute = tuple[Any, str]
"""A module, and the name under which it keeps one array or several."""


class Rewritten:
    """The attributes that changed since this was made, once they are `learnt`."""

    def __init__(self, model: Any):
        # The arrays themselves, so that no new one gets the identity of an old one.
        self._before: dict[tuple[int, str], list[mx.array]] | None = {
            (id(module), name): _arrays(module, name) for module, name in _attributes(model)
        }
        self._attributes: list[Attribute] = []

    def learn(self, model: Any) -> Rewritten:
        """A forward has run: what is different now is rewritten by each."""
        before, self._before = self._before or {}, None
        for module, name in _attributes(model):
            old, new = before.get((id(module), name), []), _arrays(module, name)
            if [*map(id, old)] != [*map(id, new)]:
                self._attributes.append((module, name))
        return self

    def arrays(self) -> list[mx.array]:
        """What stands in those now: to be evaluated with whatever a forward is run for."""
        return [array for module, name in self._attributes for array in _arrays(module, name)]


def _attributes(model: Any) -> Iterator[Attribute]:
    for module in model.modules():
        yield from ((module, name) for name in [*vars(module), *module])


def _arrays(module: Any, name: str) -> list[mx.array]:
    """What the module itself holds under that name, without what its children hold."""
    held = module[name] if name in module else vars(module).get(name)
    leaves: Any = tree_flatten([held], is_leaf=lambda each: isinstance(each, nn.Module))
    return [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]
