"""Bodies and queries as models, and what is said of those that cannot be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from ..errors import ApiError, refuse
from ..http.wire import read

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

M = TypeVar("M", bound=BaseModel)

MOST_MISTAKES = 3
"""Mistakes that one error message lists; a prompt of wrong token ids has thousands."""


async def body_of(request: Request, model: type[M]) -> M:
    """The body, which must be an object with the model's fields. Raises `ApiError` 400 for another."""
    try:
        sent = await request.body()
    except ClientDisconnect as error:
        raise refuse("The body did not come to its end.") from error
    if not sent:
        raise refuse("The body is missing: send a JSON object.")
    value = read(sent)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _refusal(error) from error


def query_of(request: Request, model: type[M]) -> M:
    """The query's fields, each by the last value it was given. Raises `ApiError` 400."""
    try:
        return model.model_validate(dict(request.query_params))
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> ApiError:
    from ..schema.fields import FIELDS  # every API's, of which a server is asked one or two

    mistakes = [_mistake(one, FIELDS) for one in error.errors(include_url=False)]
    shown = list(dict.fromkeys(f"{where}: {what}" if where else what for where, what in mistakes))
    more = f"; and {len(shown) - MOST_MISTAKES} more" if len(shown) > MOST_MISTAKES else ""
    return refuse("; ".join(shown[:MOST_MISTAKES]) + more + ".", mistakes[0][0] or None)


def _mistake(found: ErrorDetails, fields: frozenset[str]) -> tuple[str, str]:
    # Between the fields stand pydantic's names for the branches of a union.
    parts = [str(part) for part in found["loc"] if isinstance(part, int) or part in fields]
    if not parts and found["type"] in ("model_type", "dict_type"):
        return "", "The body must be a JSON object"
    return ".".join(parts), found["msg"].removeprefix("Value error, ")
