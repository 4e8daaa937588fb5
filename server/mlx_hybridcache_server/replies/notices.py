"""What a reply is told beside itself: fields that were not followed to the letter.

Any code that has a request's body says so with `body.warn("field", "what was done about it")`, before
the response begins. The client finds it in a header, and the log has a line.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..log import CLIENTS

log = logging.getLogger(CLIENTS)

WARNING_HEADER = "X-Mlx-Hybridcache-Warning"

MOST_SHOWN = 1000
"""Characters of the header: proxies refuse long ones."""


def warning_headers(path: str, warnings: Sequence[str]) -> dict[str, str]:
    """The header that carries `warnings`, each of which is logged. None without any."""
    for warning in warnings:
        log.warning("%s: %s", path, warning)
    if not warnings:
        return {}
    said = " ".join(" ".join(warnings).split())
    shown = said if len(said) <= MOST_SHOWN else f"{said[:MOST_SHOWN]}..."
    return {WARNING_HEADER: shown.encode("ascii", "replace").decode()}
