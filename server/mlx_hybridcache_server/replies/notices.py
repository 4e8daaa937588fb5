"""What a reply is told beside itself: fields that were not followed to the letter.

Any code that has a request's body says so with `body.warn("field", "what was done about it")`, before
the response begins. The client finds it in a header, and the log has a line.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence

from ..log import CLIENTS

log = logging.getLogger(CLIENTS)

WARNING_HEADER = "X-Mlx-Hybridcache-Warning"

MOST_SHOWN = 1000
"""Characters of the header: proxies refuse long ones."""

MOST_NAMED = 8
"""Kinds of things that one notice lists."""

NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
"""What may be a kind of thing. Anything else is a text of the client's, which the log must not have."""

NOT_PRINTED = re.compile(r"[^ -~]+")


def named(kinds: Iterable[object]) -> str:
    """The kinds of what was left out, as a notice lists them: the first few, and only what are names."""
    found = sorted({_name(kind) for kind in kinds})
    more = [f"{len(found) - MOST_NAMED:,} more"] if len(found) > MOST_NAMED else []
    return ", ".join([*found[:MOST_NAMED], *more])


def _name(kind: object) -> str:
    return kind if isinstance(kind, str) and NAME.fullmatch(kind) else "of no known type"


def warning_headers(path: str, warnings: Sequence[str]) -> dict[str, str]:
    """The header that carries `warnings`, each of which is logged. None without any."""
    for warning in warnings:
        log.warning("%s: %s", path, warning)
    if not warnings:
        return {}
    said = NOT_PRINTED.sub("?", " ".join(" ".join(warnings).split()))
    shown = said if len(said) <= MOST_SHOWN else f"{said[:MOST_SHOWN]}..."
    return {WARNING_HEADER: shown}
