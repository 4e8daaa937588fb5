"""Whether two requests may share anything at all, whatever their prompts are."""

from __future__ import annotations

from ..generation.models import DEFAULT_NAME, Named
from ..settings import Settings
from .asked import Asked
from .kinds import Kind


def apart(one: Asked, other: Asked, settings: Settings | None = None) -> Kind | None:
    """Why they share nothing; None where they may. Without a server's settings one model serves both."""
    if (one.cache_salt or "") != (other.cache_salt or ""):
        return Kind.OTHER_SALT
    if other.cache_prompt is False:
        return Kind.NOT_CACHED
    if settings is None or not settings.allow_model_switching:
        return None
    return Kind.OTHER_MODEL if _model(one, settings) != _model(other, settings) else None


def _model(asked: Asked, settings: Settings) -> Named:
    return Named(asked.model or DEFAULT_NAME, asked.adapters).resolved(settings)
