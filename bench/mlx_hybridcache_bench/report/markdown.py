"""The figures as Markdown, ready to paste into an issue."""

from __future__ import annotations

from mlx_hybridcache.sizes import format_bytes

from ..kit.tables import size_text
from .results import Measured, Results
from .sheet import Sheet
from .summary import notes, sheets
from .verdict import verdicts


def markdown(results: Results) -> str:
    """The environment as mlx-lm issue 1162 lists it, its table for each server, then the rest."""
    machine, *others = environment(results)
    listed = [machine, *(_server(each) for each in results.servers), *others]
    said = [line for each in verdicts(results) for line in (f"**{_plain(each)}**", "")]
    lines = [*said, "### Environment", "", *(f"- {_plain(each)}" for each in listed), ""]
    for sheet in sheets(results):
        lines += _table(sheet)
    if remarks := list(notes(results)):
        lines += ["### Notes", "", *(f"- {_plain(each)}" for each in remarks), ""]
    return "\n".join(lines).rstrip() + "\n"


def environment(results: Results) -> list[str]:
    """The machine, the method and the software: a line each."""
    found = results.machine
    hardware = [found.get("model"), found.get("chip"), f"{found['cores']} cores"]
    hardware.append(f"{found['memory_bytes'] / 1024**3:.0f} GiB")
    settings = results.settings
    sizes = ", ".join(size_text(each) for each in settings["sizes"])
    runs = "1 run" if settings["repeats"] == 1 else f"{settings['repeats']} runs"
    method = (
        "Streaming POST to `/v1/chat/completions`, TTFT to the first token of any kind; sizes "
        f"{sizes}; median of {runs}; fresh nonces; warm-up excluded"
    )
    software = (
        f"`mlx-hybridcache bench ttft` {found['mlx_hybridcache']}, MLX {found['mlx']} on "
        f"{found['device']}, Python {found['python']}, {results.created[:10]}"
    )
    return [
        f"{', '.join(each for each in hardware if each)}, {found['os']}",
        method,
        software,
    ]


def _server(server: Measured) -> str:
    model = server.model
    about = [str(model.get("name", "")), str(model.get("quantization") or "")]
    if weights := model.get("bytes"):
        about.append(format_bytes(weights))
    flags = f", flags `{' '.join(server.flags)}`" if server.flags else ""
    told = ", ".join(each for each in about if each)
    return f"{' '.join(each for each in (server.name, server.version) if each)}: {told}{flags}"


def _table(sheet: Sheet) -> list[str]:
    columns = [_cell(each) for each in sheet.columns]
    rule = ["---", *("---:" for _ in columns[1:])]
    rows = [[_cell(each) for each in row] for row in sheet.rows]
    table = [f"| {' | '.join(each)} |" for each in (columns, rule, *rows)]
    caption = [sheet.caption, ""] if sheet.caption else []
    return [f"### {_plain(sheet.title)}", "", *table, "", *caption]


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """One line, in which nothing that a server said is read as HTML."""
    return " ".join(text.split()).replace("<", "&lt;")
