"""Clients that people use, as they are published, in conversations with one server process.

Only with `-m long`: each is installed in an environment of its own, which takes minutes once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import strict
from bundled import chat
from client_environments import Environment, NotInstallableError, environment
from servers import OURS, Server, running

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

SCRIPTS = Path(__file__).parent / "clients"
CLIENT_SECONDS = 600
INSTANT = ["--chat-template-args", '{"enable_thinking": false}']
"""No reasoning: the templates take it out of earlier turns, which would move the point of return."""

ALLOWED = {
    "find_person": [("person", "Omar"), ("person", "Lena")],
    "get_time": [("city", "Oslo"), ("city", "Lima")],
}
"""The arguments that `clients/task.py` declares."""

QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NO_PROXY": "*",
}
"""Keeps clients from telling anybody, or fetching anything, while they are tried."""


class Emptied:
    """A server that had its cache emptied, and what it was asked since."""

    def __init__(self, server: Server) -> None:
        self.url = server.url
        self._client = server.client
        self._client.delete("/v1/cache")
        self._earlier = {report["id"] for report in self._recent()}

    def _recent(self) -> list[dict[str, Any]]:
        recent: list[dict[str, Any]] = self._client.get("/v1/cache/recent").json()["data"]
        return recent

    def steps(self) -> list[tuple[int, int]]:
        """Tokens of the prompt and tokens restored, of each request in order."""
        new = [report for report in self._recent() if report["id"] not in self._earlier]
        return [(report["prompt_tokens"], report["restored_tokens"]) for report in reversed(new)]


@pytest.fixture(scope="module")
def bundled_process():
    with running(OURS, *INSTANT) as server:
        yield server


@pytest.fixture(scope="module")
def strict_process():
    with running(OURS, *INSTANT, "--model", str(strict.directory())) as server:
        yield server


@pytest.fixture
def bundled(bundled_process):
    return Emptied(bundled_process)


@pytest.fixture(params=["bundled", "strict"])
def server(request):
    """Under either template."""
    return Emptied(request.getfixturevalue(f"{request.param}_process"))


@pytest.fixture
def installed(pytestconfig):
    """Makes environments, or skips and says why it cannot."""
    kept = pytestconfig.cache.mkdir("clients")

    def make(name: str) -> Environment:
        try:
            return environment(name, kept)
        except NotInstallableError as error:
            pytest.skip(f"{name} cannot be installed: {error}")

    return make


def run(command: list[str], folder: Path, **variables: str) -> str:
    """What the client printed; it must end with status 0. It sees an empty home, and no key."""
    own = {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"}
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=CLIENT_SECONDS,
        cwd=folder,
        env={**own, **QUIET, **variables},
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def converse(client: Environment, script: str, server: Emptied, folder: Path) -> dict[str, Any]:
    """Run a script of `clients/` to its end; what it told."""
    path = SCRIPTS / script
    if path.suffix == ".mjs":  # node looks for packages above the script, nowhere else
        path = Path(shutil.copy(path, client.path))
        command = ["node", str(path), server.url]
    else:
        command = [client.command("python"), str(path), server.url]
    told: dict[str, Any] = json.loads(run(command, folder).splitlines()[-1])
    return told


def assert_answered(told: dict[str, Any]) -> None:
    """A call for each question, with arguments that the schema allows, and a plain answer behind it."""
    assert len(told["calls"]) == len(told["replies"]) == 3, told
    for name, arguments in told["calls"]:
        assert arguments.popitem() in ALLOWED[name], told
        assert not arguments, told
    for reply in told["replies"]:
        assert reply.strip(), told
        assert "<" not in reply, told


@cache
def opener_tokens() -> int:
    """What opens a reply without reasoning; where the reply is history, it is opened otherwise."""
    asked = ("user", "Hi")
    return len(chat(asked, enable_thinking=False)) - len(chat(asked, reply=False))


def assert_grows(told: dict[str, Any], steps: list[tuple[int, int]]) -> None:
    """Each request restored the prompt before it up to the reply's opener, and the client knows."""
    print("prompt, restored:", steps)
    assert told["cached"] == [restored for _, restored in steps]
    assert steps[0][1] == 0
    for (prompt, _), (_, restored) in pairwise(steps):
        assert restored >= prompt - opener_tokens(), steps


# Conversations: three questions, each answered by way of a function


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("openai", "with_openai.py"),
        ("openai-agents", "with_openai_agents.py"),
        ("langchain-openai", "with_langchain_openai.py"),
        ("litellm", "with_litellm.py"),
        ("ai", "with_ai.mjs"),
    ],
)
def test_a_conversation_with_functions_grows(name, script, installed, server, tmp_path):
    """Six requests, a call and an answer for each question; cached 0, 257, 303, 335, 383, 414."""
    told = converse(installed(name), script, server, tmp_path)
    assert_answered(told)
    assert_grows(told, server.steps())


def test_an_agent_that_may_also_answer_at_once_grows(installed, bundled, tmp_path):
    """Pydantic AI leaves the choice to the model, which calls a function for each question."""
    told = converse(installed("pydantic-ai"), "with_pydantic_ai.py", bundled, tmp_path)
    assert_answered(told)
    assert_grows(told, bundled.steps())
