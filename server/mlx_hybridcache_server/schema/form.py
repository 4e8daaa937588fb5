"""Whether a reply is held to a form, and to which schema. What compiles it is loaded for those alone."""

from __future__ import annotations

from typing import Any

from ..errors import refuse
from .requests import GenerationBody
from .tool_choice import is_forced, is_narrowed


def is_constrained(body: GenerationBody) -> bool:
    """Whether `body` asks for a form. Raises `ApiError` 400 when it does not say which."""
    return wanted_schema(body) is not None or is_forced(body) or is_narrowed(body)


def wanted_schema(body: GenerationBody) -> dict[str, Any] | None:
    """The JSON schema of the whole reply, if `body` names one. Raises `ApiError` as `is_constrained`."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        raise refuse(
            'A response_format of type json_schema needs {"json_schema": {"schema": {...}}}.',
            "response_format",
        )
    return wanted.json_schema.content
