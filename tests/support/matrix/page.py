"""What is known of every family: the records beside this file, and the table of the docs that says them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from matrix.journeys import Record

KEPT = Path(__file__).with_name("records.json")
PAGE = Path(__file__).parents[3] / "docs" / "models.md"
BEGIN, END = "<!-- families: made by `python -m matrix` -->\n", "<!-- end of families -->\n"
HEAD = "| family | layers | resumes at | prompts | behind a reply | batches | bf16 | 4 bits |\n|---|---|---|---|---|---|---|---|\n"


def load() -> dict[str, Record]:
    """The records that are kept, by family."""
    return {each["family"]: Record(**each) for each in json.loads(KEPT.read_text())}


def save(records: Iterable[Record]) -> None:
    """Keep them, and say them on the page."""
    in_order = sorted(records, key=lambda record: record.family)
    KEPT.write_text(json.dumps([each.told() for each in in_order], indent=1) + "\n")
    page = PAGE.read_text()
    PAGE.write_text(page.replace(f"{BEGIN}{said(page)}{END}", f"{BEGIN}{table(in_order)}{END}"))


def said(page: str) -> str:
    """What stands between the two marks of the page."""
    return page.partition(BEGIN)[2].partition(END)[0]


def table(records: Iterable[Record]) -> str:
    """A line for each family."""
    return HEAD + "".join(f"{_line(each)}\n" for each in records)


def _line(record: Record) -> str:
    if record.refused:
        return f"| {record.family} | {record.refused} | | | | | | |"
    cells = (
        record.family,
        ", ".join(record.layers),
        _resumes(record),
        difference(record.found),
        difference(record.replied),
        _batches(record),
        _in_words(record.dtypes.get("bfloat16", "")),
        _in_words(record.dtypes.get("4 bits", "")),
    )
    return f"| {' | '.join(cells)} |"


def _resumes(record: Record) -> str:
    where = record.restores
    if record.alignment > 1:
        where += f", the grid's in whole {record.alignment}"
    if record.slicing_limit is not None:
        where += f"; beyond {record.slicing_limit} tokens the grid"
    return where


def _batches(record: Record) -> str:
    return (
        difference(record.batch_difference) if record.batched == "yes" else f"no: {record.batched}"
    )


def _in_words(found: str) -> str:
    return found.partition(":")[0]


def bound(off: float) -> float:
    """The next power of ten."""
    return 10.0 ** math.ceil(math.log10(off)) if off else 0.0


def difference(off: float) -> str:
    """Equal bits, or a power of ten that a logit differs by at most."""
    return f"{bound(off):.0e}" if off else "equal"
