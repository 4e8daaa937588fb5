"""What is recognised as volatile in a text: what it is, where, and what is left alone."""

from __future__ import annotations

import random
import uuid
from itertools import pairwise

import pytest
from mlx_hybridcache_server.prompts.volatile import KINDS, VolatileSpan, volatile_spans

UUID = "7b1f6a1e-1234-4abc-9def-0123456789ab"

LINES = {
    "billing": {
        "x-anthropic-billing-header: cc_version=2.1.197.c3f; cc_entrypoint=cli; cch=0a1b2;": None,
    },
    "uuid": {f"The run {UUID} goes on.": UUID, f'"{UUID.upper()}"': UUID.upper()},
    "date": {
        "Today's date: 2026-11-29": "2026-11-29",
        "Today is Sunday, November 29, 2026.": "Sunday, November 29, 2026",
        "Today's date: Sun Nov 29 2026": "Sun Nov 29 2026",
        "Date: Sun Nov 29 03:14:29 UTC 2026": "Sun Nov 29 03:14:29 UTC 2026",
        "Now: 2026-11-29T03:14:29.123+01:00": "2026-11-29T03:14:29.123+01:00",
        "Now: 2026-11-29 03:14:29Z": "2026-11-29 03:14:29Z",
        "Current Time: 11/29/2026, 3:14:29 AM": "11/29/2026, 3:14:29 AM",
        "Heute ist der 29.11.2026": "29.11.2026",
        "It is 29 November 2026, 03:14.": "29 November 2026, 03:14",
        "The current month is November 2026.": "November 2026",
        "It was Nov 3rd": "Nov 3rd",
    },
    "time": {
        "It is 03:14:29 UTC.": "03:14:29 UTC",
        "The time is 3:14 pm": "3:14 pm",
        "started 1764386069": "1764386069",
        "started 1764386069123": "1764386069123",
    },
    "path": {
        f"Write to /tmp/agent-1000/{UUID}/scratchpad": f"/tmp/agent-1000/{UUID}/scratchpad",
        "cwd: ~/.cache/sandbox/x1 now": "~/.cache/sandbox/x1",
        r"in C:\Users\me\AppData\Local\Temp\f00": r"C:\Users\me\AppData\Local\Temp\f00",
        "at /private/var/folders/zz/8n/T": "/private/var/folders/zz/8n/T",
    },
    "id": {
        "session_id: V1StGXR8_Z5jdHi6B": None,
        '{"sessionID": "ses_4f9cd1c26ffe"}': 'sessionID": "ses_4f9cd1c26ffe',
        "the conversation ses_4f9cd1c26ffe": "ses_4f9cd1c26ffe",
        f"hash {'0123456789abcdef' * 2}": "0123456789abcdef" * 2,
    },
    "git": {
        "Current branch: main": None,
        "abc1234 Server: lines that change": None,
        "HEAD is at abc1234": None,
    },
}
"""By kind: lines, and what is found in each; None for all of it."""

EACH = [(kind, line, found) for kind, lines in LINES.items() for line, found in lines.items()]

PLAIN = [
    "You may use at most 3 tools; march on, and see chapter 4 of may be.",
    "Rule 12: the lamp of Ada is red, at 16:9 or 3:1.",
    "Ask http://127.0.0.1:8080/v1 or localhost:8080, version 1.2.3, 10.20.30.40.",
    "Read /usr/lib/python3.11/os.py, src/main2.py and a/b.",
    "The session is over; the request is refused; session_start and task_runner_name.",
    "Task: refactoring. run/compile-all. decade facade 1000000000",
]


@pytest.mark.parametrize(("kind", "line", "found"), EACH)
def test_a_volatile_thing_is_found_where_it_stands(kind, line, found):
    """One span, of that kind, whatever is before and behind its line."""
    text = f"You are an agent.\n{line}\nBe brief."
    (span,) = volatile_spans(text)
    assert (span.kind, text[span.start : span.end]) == (kind, found or line)


@pytest.mark.parametrize("line", PLAIN)
def test_what_stays_as_it_is_is_left_alone(line):
    """Numbers, versions, addresses, and words that are also names of months."""
    assert list(volatile_spans(line)) == []


def test_every_kind_is_found_by_a_line():
    """A new kind needs lines."""
    assert LINES.keys() == KINDS.keys()


@pytest.mark.parametrize("seed", range(20))
def test_spans_come_in_order_and_apart_and_none_crosses_a_line(seed):
    """Among 40 plain and volatile lines, shuffled: each planted thing is covered, nothing else is."""
    chance = random.Random(seed)
    lines = [line for _, line, _ in chance.sample(EACH, 15)] + chance.choices(PLAIN, k=25)
    lines.append(f"run {uuid.UUID(int=chance.getrandbits(128))} and 2026-01-0{1 + seed % 9}")
    chance.shuffle(lines)
    text = "\n".join(lines)
    spans = list(volatile_spans(text))
    assert all(a.end <= b.start for a, b in pairwise(spans))
    assert not any("\n" in text[span.start : span.end] for span in spans)
    assert len(spans) == 15 + 2


def test_what_comes_first_is_found_first():
    """Without reading on: a caller who needs the first one pays for no more."""
    spans = volatile_spans("Now: 2026-11-29\n" + "session " * 10 + "\nid 2026-11-30")
    assert next(spans) == VolatileSpan(5, 15, "date")


HOSTILE = [
    *("/", "a", "0", "1", "-", " ", "x-", "\nx-a1", ":", "/a1", "12:", "2026-", "1.", "_1", "\n1"),
    *("abcdef01-", "0123abcd", "session_1", "session: 1", "May 1 ", "Mon, May ", "1 May ", "'1"),
    *("branch ", "branch:", "\nbranch ", "~/1", "C:\\1", "commit 1", "head at 1", "\n1234567 "),
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_no_text_takes_longer_than_it_is_long(unit):
    """100,000 characters of each: what grew with their square would not end today."""
    text = unit * (100_000 // len(unit))
    spans = list(volatile_spans(text))
    assert sum(span.end - span.start for span in spans) <= len(text)
