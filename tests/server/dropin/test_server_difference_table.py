"""The table that users read lists exactly the differences that are tested, and all defaults that differ."""

from __future__ import annotations

import test_server_differences
import test_server_reply_differences
from places import ROOT
from serving.differences import rows_of
from serving.parsers import flags_of, our_parser, their_parser

PAGE = ROOT / "docs" / "mlx-lm-differences.md"
ROWS = [
    *rows_of(test_server_differences.__name__),
    *rows_of(test_server_reply_differences.__name__),
]


def table() -> str:
    """The table of the page."""
    rows = [f"| {row.about} | {row.theirs} | {row.ours} |" for row in ROWS]
    return "\n".join(
        ["| | `mlx_lm.server` 0.32.2 | `mlx_hybridcache.server` |", "|---|---|---|", *rows]
    )


def test_the_page_lists_exactly_these_differences():
    """Between its markers, row by row; the text to put there is in the failure."""
    begin, end = "<!-- differences:begin -->", "<!-- differences:end -->"
    written = PAGE.read_text(encoding="utf-8")
    assert begin in written
    assert written.partition(begin)[2].partition(end)[0].strip() == table()


def test_defaults_agree_but_for_the_listed_ones():
    """A default that differs has a row in the table of differences."""
    parsers = their_parser(), our_parser()
    parsed = [vars(parser.parse_args([])) for parser in parsers]
    flags = [flags_of(parser) for parser in parsers]
    differing = {
        option
        for option in flags[0]
        if parsed[0][flags[0][option].dest] != parsed[1][flags[1][option].dest]
    }
    assert differing == {row.flag for row in ROWS if row.flag}
