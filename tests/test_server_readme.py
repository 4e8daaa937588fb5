"""The README's curl lines, against a running server."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from servers import OURS, running

README = Path(__file__).parents[1] / "README.md"


def curl_lines() -> list[str]:
    """The commands of all sh and console blocks that begin with `curl`, continued lines joined."""
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", README.read_text("utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?curl ", line)]


@pytest.fixture(scope="module")
def server():
    with running(OURS) as server:
        yield server


def test_there_are_curl_lines():
    """A chat, and the cache's own endpoint."""
    lines = "\n".join(curl_lines())
    assert "/v1/chat/completions" in lines
    assert "/v1/cache" in lines


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_each_answers_with_200_and_json_or_events(server):
    """As they are written and in their order, but for the port."""
    for line in curl_lines():
        local = re.sub(r"(localhost|127\.0\.0\.1):\d+", rf"\1:{server.port}", line)
        assert str(server.port) in local, f"which server does this ask? {line}"
        told = ["--silent", "--show-error", "--write-out", "\n%{http_code} %{content_type}"]
        ended = subprocess.run(
            [*shlex.split(local), "--noproxy", "*", *told],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        body, _, last = ended.stdout.rpartition("\n")
        status, _, kind = last.partition(" ")
        assert status == "200", f"{line}\n{body}"
        if kind.startswith("application/json"):
            assert json.loads(body)
        elif kind.startswith("text/event-stream"):
            assert body.rstrip().endswith("data: [DONE]"), line
        else:
            assert kind.startswith("text/plain"), line
