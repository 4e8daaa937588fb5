"""One page that shows a run: its tables and pictures in a single file that needs no network."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .charts import charts
from .markdown import environment, markdown
from .results import Results
from .summary import notes, servers_sheet, sheets
from .verdict import verdicts


def report(results: Results) -> str:
    """The page as HTML. Whatever a server said is escaped; nothing in it runs or is fetched."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Matplotlib escapes the words in its pictures.
    pictures = [(chart, Markup(chart.svg())) for chart in charts(results)]
    return templates.get_template("report.html.jinja").render(
        created=results.created,
        verdicts=verdicts(results),
        in_turns=bool(results.settings.get("in_turns")),
        environment=environment(results),
        servers=servers_sheet(results),
        sheets=sheets(results),
        notes=list(notes(results)),
        pictures=pictures,
        markdown=markdown(results),
    )
