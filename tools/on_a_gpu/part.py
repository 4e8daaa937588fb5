"""One part in a process of its own: what it finds, a line of JSON each, into a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .exactly import replies
from .proofs import KINDS, STORED_AS, Found, bundled, kind
from .recurrences import recurrence

PARTS: dict[str, Callable[[], Found]] = {
    **{f"bundled {how}": partial(bundled, how) for how in STORED_AS},
    **{f"kind {family}": partial(kind, family) for family in KINDS},
    **{f"replies {how}": partial(replies, how) for how in STORED_AS},
    "recurrence": recurrence,
}


def main(name: str, file: str) -> None:
    """Append to `file` as it goes: a part that is stopped has said what it found."""
    with Path(file).open("a", encoding="utf-8") as lines:
        for found in PARTS[name]():
            print(json.dumps(found), file=lines, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
