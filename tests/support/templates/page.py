"""What is known of every template: the records beside this file, and the table of the docs that says them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from templates.learnt import Record, learn
from templates.structures import STRUCTURES

KEPT = Path(__file__).with_name("records.json")
PAGE = Path(__file__).parents[3] / "docs" / "templates.md"
BEGIN, END = "<!-- templates: made by `python -m templates` -->\n", "<!-- end of templates -->\n"
HEAD = (
    "| template | turns open with | a user's with | past replies with | of it the model writes | "
    "reasoning of past replies | the next turn resumes |\n|---|---|---|---|---|---|---|\n"
)
WAYS = {"plain": "", "thought": "with reasoning: ", "off": "reasoning off: "}


def load() -> list[Record]:
    """The records that are kept, in their order."""
    return [Record(**each) for each in json.loads(KEPT.read_text())]


def save(records: Iterable[Record]) -> None:
    """Keep them, and say them on the page."""
    records = list(records)
    KEPT.write_text(json.dumps([each.told() for each in records], ensure_ascii=False) + "\n")
    page = PAGE.read_text()
    PAGE.write_text(page.replace(f"{BEGIN}{said(page)}{END}", f"{BEGIN}{table(records)}{END}"))


def structures() -> list[Record]:
    """What is learnt now of the templates here."""
    return [learn(name, template) for name, template in STRUCTURES.items()]


def published(folder: Path, source: str) -> list[Record]:
    """What is learnt of the `.jinja` files in a folder. Templates for training are for no server."""
    found = []
    for path in sorted(folder.rglob("*.jinja")):
        if "training" not in path.name:
            record = learn(path.stem, path.read_text(), source)
            if record.turns:
                found.append(record)
    return found


def said(page: str) -> str:
    """What stands between the two marks of the page."""
    return page.partition(BEGIN)[2].partition(END)[0]


def table(records: Iterable[Record]) -> str:
    """A line for each template."""
    return HEAD + "".join(f"{_line(each)}\n" for each in records)


def _line(record: Record) -> str:
    cells = (
        f"{record.name} ({record.source})" if record.source else record.name,
        ", ".join(map(_code, record.openers)),
        _code(record.user),
        _code(record.reply),
        _code(record.written),
        record.reasoning,
        "; ".join(f"{WAYS[way]}{_resumes(*each)}" for way, each in record.turns.items()),
    )
    return f"| {' | '.join(cells)} |"


def _resumes(shared: int, history: int, restored: int) -> str:
    if shared < history:
        return f"where its reply begins ({restored} of {shared})"
    if restored >= history:
        return f"behind the reply ({restored} of {history + 1})"
    return f"before the reply ({restored} of {history})"


def _code(text: str) -> str:
    shown = text.replace("\n", "↵").replace("|", "\\|")
    if shown != shown.strip():
        shown = shown.replace(" ", "␣")
    return f"`{shown}`" if shown else ""
