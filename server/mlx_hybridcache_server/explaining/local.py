"""Two requests explained without a server: with a model's tokenizer and template, and none of its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer

from mlx_hybridcache import models
from mlx_hybridcache.errors import HybridCacheError, ModelError, SettingError
from mlx_hybridcache.tokenizing.turn_marks import learn_turn_marks

from ..errors import ApiError
from ..http import wire
from ..prompts.chat import Renderer
from ..prompts.tokenizing import Steps
from .asked import apart, read
from .comparison import Comparison, compared
from .explanation import of_two


def explained(requests: list[dict[str, Any]], endpoint: str | None, model: str) -> dict[str, Any]:
    """What parts the second of two requests from the first for a model, a directory or a repository.

    Raises `HybridCacheError` for a model that cannot be read, and for what its server would refuse.
    """
    try:
        both = wire.read(json.dumps({"requests": requests}).encode())["requests"]
        one, other = (read(sent, endpoint) for sent in both)
        found = _done(compared(one, other, renderer(model), apart(one, other)))
    except RecursionError as error:
        raise SettingError("The requests are nested too deeply.") from error
    except ApiError as error:
        raise HybridCacheError(str(error.detail)) from error
    return of_two(found, model)


def renderer(model: str) -> Renderer:
    """Renders as a server does that was started with this model and no flags. Raises `ModelError`."""
    path = models.local_directory(model)
    try:
        tokenizer: Any = load_tokenizer(model if path is None else Path(path))
    except Exception as error:  # the loader and the hub raise whatever they meet
        raise ModelError(f"The tokenizer of {model} could not be read: {error}") from error
    return Renderer(tokenizer, learn_turn_marks(tokenizer), 2**31 - 1, {})


def _done(steps: Steps[Comparison]) -> Comparison:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: Comparison = end.value
            return found
