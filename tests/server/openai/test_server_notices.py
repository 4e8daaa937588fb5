"""Nothing that changes a reply is passed over in silence: the header and the log line that say so."""

from __future__ import annotations

import logging

from mlx_hybridcache_server.replies.notices import MOST_SHOWN, WARNING_HEADER, warning_headers
from mlx_hybridcache_server.schema.requests import ChatBody


def test_what_is_warned_of_is_one_header_and_a_line_each(caplog):
    """Two fields, the first of them twice: two lines, one header, in order."""
    body = ChatBody(messages=[{"role": "user", "content": "x"}])
    for field, sentence in [
        ("audio", "not spoken."),
        ("grammar", "left out."),
        ("audio", "not spoken."),
    ]:
        body.warn(field, sentence)
    with caplog.at_level(logging.WARNING):
        headers = warning_headers("/v1/chat/completions", body.warnings)
    assert headers == {WARNING_HEADER: "audio: not spoken. grammar: left out."}
    assert [record.getMessage() for record in caplog.records] == [
        "/v1/chat/completions: audio: not spoken.",
        "/v1/chat/completions: grammar: left out.",
    ]


def test_a_warning_is_always_a_header_that_http_has():
    """No line breaks, no letters beyond ASCII, no end in sight; and none without warnings."""
    (said,) = warning_headers("/", ["tool: ü\r\nX-Evil: 1" + "a" * 5000]).values()
    assert said.isascii()
    assert "\n" not in said
    assert "\r" not in said
    assert len(said) <= MOST_SHOWN + 3
    assert warning_headers("/", []) == {}
