"""Clients that people use, as they are published, in conversations with one server process.

Only with `-m clients`: each is installed in an environment of its own, which takes minutes once; `--cache-clear`
has them made anew. Versions stand in `client_environments.py`. `-rA` shows what each request restored.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bundled import chat, load
from checkout import pages
from checkout.client_environments import Environment, NotInstallableError, environment
from places import ROOT
from servers import OURS, Server, running
from texts import strict

from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.demo.functions import FUNCTIONS

pytestmark = [pytest.mark.clients, pytest.mark.timeout(3600)]

SCRIPTS = ROOT / "tests" / "clients" / "scripts"
CLIENT_SECONDS = 600
FLAGS = ["--chat-template-args", '{"enable_thinking": false}', "--max-tokens", "200"]
"""No reasoning: the templates take it out of earlier turns, which would move the point of return. And an
end for each reply: not every client asks for one, and the small model does not always find it."""

QUESTIONS = ["Where is Omar?", "Where is Lena?", "Where is Hugo?"]
"""What the programs are asked; `scripts/task.py` has what the scripts ask."""

AIDER_QUIET = [
    *("--no-git", "--yes-always", "--no-pretty", "--no-fancy-input", "--no-check-update"),
    *("--no-show-model-warnings", "--no-show-release-notes", "--analytics-disable"),
    *("--no-detect-urls", "--map-tokens", "0", "--max-chat-history-tokens", "100000"),
]
AIDER = [
    *AIDER_QUIET,
    *("--model", "openai/default_model", "--openai-api-key", "none", "--chat-mode", "ask"),
]
"""One chat that asks nobody anything but the model, and does not sum its history up."""

OPENCODE = {
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1",
    "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
    "OPENCODE_DISABLE_SHARE": "1",
}

RESULT = {"room": "kitchen"}
"""What each tool of OpenCode's says. It has all functions that the model learnt to call: OpenCode cannot be told to
make it call one, and tells it today's date, so that which one it calls, and whether, may change from day to day."""

ALLOWED = {
    "find_person": [("person", "Omar"), ("person", "Lena")],
    "get_time": [("city", "Oslo"), ("city", "Lima")],
}
"""The arguments that `scripts/task.py` declares."""

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
    with running(OURS, *FLAGS) as server:
        yield server


@pytest.fixture(scope="module")
def strict_process():
    with running(OURS, *FLAGS, "--model", str(strict.directory())) as server:
        yield server


@pytest.fixture
def terse():
    """One whose replies end soon, for agents that set no end and whose prompts the small model cannot follow."""
    with running(OURS, *FLAGS[:2], "--max-tokens", "40") as server:
        yield Emptied(server)


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


def run(
    command: list[str], folder: Path, *, typed: str = "", may_fail: bool = False, **variables: str
) -> str:
    """What the client printed; it must end with status 0, unless it `may_fail`. It sees an empty home,
    and no key.
    """
    own = {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"}
    done = subprocess.run(
        command,
        input=typed,
        capture_output=True,
        text=True,
        timeout=CLIENT_SECONDS,
        cwd=folder,
        env={**own, **QUIET, **variables},
        check=False,
    )
    assert may_fail or done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def converse(client: Environment, script: str, server: Emptied, folder: Path) -> dict[str, Any]:
    """Run a script of `scripts/` to its end; what it told."""
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


def assert_grows(
    steps: list[tuple[int, int]], cached: list[int] | None = None, changing: int = 0
) -> None:
    """Each request restored the prompt before it up to the reply's opener.

    `cached` is what the client was told, where it says; `changing` are the tokens before the opener that it
    writes otherwise once a turn is history.
    """
    print("prompt, restored:", steps)
    assert cached in (None, [restored for _, restored in steps])
    assert steps[0][1] == 0
    for (prompt, _), (_, restored) in pairwise(steps):
        assert restored >= prompt - opener_tokens() - changing, steps


def tokens(text: str) -> int:
    """How many the bundled model's tokenizer makes of it."""
    return len(load()[1].encode(text, add_special_tokens=False))


# Conversations: three questions, each answered by way of a function


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("openai", "with_openai.py"),
        ("openai", "with_openai_responses.py"),
        ("anthropic", "with_anthropic.py"),
        ("openai-agents", "with_openai_agents.py"),
        ("langchain-openai", "with_langchain_openai.py"),
        ("langchain-anthropic", "with_langchain_anthropic.py"),
        ("litellm", "with_litellm.py"),
        ("ai", "with_ai.mjs"),
        ("ai-anthropic", "with_ai_anthropic.mjs"),
    ],
)
def test_a_conversation_with_functions_grows(name, script, installed, server, tmp_path):
    """Six requests, a call and an answer for each question; cached 0, 257, 303, 335, 383, 414."""
    told = converse(installed(name), script, server, tmp_path)
    assert_answered(told)
    assert_grows(server.steps(), told["cached"])


def test_langchains_lines_in_the_docs_run_as_they_stand(installed, bundled, tmp_path):
    """docs/clients.md, but for the address: a reply, and how much was restored."""
    blocks = pages.of_language(pages.DOCS / "clients.md", "python")
    (block,) = [each for each in blocks if "langchain" in each.text]
    typed = block.text.replace("http://localhost:8080", bundled.url)
    shown = run([installed("langchain-openai").command("python"), "-c", typed], tmp_path)
    assert shown.split()[-1].isdigit()


def test_an_agent_that_may_also_answer_at_once_grows(installed, bundled, tmp_path):
    """Pydantic AI leaves the choice to the model, which calls a function for each question."""
    told = converse(installed("pydantic-ai"), "with_pydantic_ai.py", bundled, tmp_path)
    assert_answered(told)
    assert_grows(bundled.steps(), told["cached"])


def test_without_tools_a_question_is_one_request(installed, bundled, tmp_path):
    """Pydantic AI asks again when it is told of a call that it did not offer: four requests for three questions."""
    told = converse(installed("pydantic-ai"), "with_pydantic_ai_plain.py", bundled, tmp_path)
    assert all(told["replies"])
    steps = bundled.steps()
    assert len(steps) == 3
    assert_grows(steps, told["cached"])


def test_objects_asked_for_one_after_the_other_grow(installed, bundled, tmp_path):
    """Instructor: three by a function that must be called, three by a schema: 0, 199, 236; 0, 68, 105."""
    told = converse(installed("instructor"), "with_instructor.py", bundled, tmp_path)
    assert len(told["replies"]) == 6
    for asked in told["replies"]:
        assert asked["name"] in ("Omar", "Oslo", "Lena")
        assert isinstance(asked["is_person"], bool)
    steps = bundled.steps()
    assert_grows(steps[:3], told["cached"][:3])
    assert_grows(steps[3:], told["cached"][3:])


def test_an_agent_that_writes_its_calls_as_text_grows(installed, bundled, tmp_path):
    """Smolagents tells of past calls in sentences; a call for each question: 0, 1547, 1662."""
    told = converse(installed("smolagents"), "with_smolagents.py", bundled, tmp_path)
    assert len(told["calls"]) == 3
    for (name, arguments), reply in zip(told["calls"], told["replies"], strict=True):
        assert tuple(*arguments.items()) in ALLOWED[name]
        assert json.loads(reply) in ({"room": "kitchen"}, {"hour": "10:15"})
    assert_grows(bundled.steps())


def test_a_model_class_for_mlx_goes_on_with_our_cache_beneath_it(installed, tmp_path):
    """Smolagents' MLXModel, its `stream_generate` exchanged for ours: the same replies, and restored."""
    python = installed("smolagents-mlx").command("python")
    script = str(SCRIPTS / "with_smolagents_mlx.py")
    printed = run([python, script, str(BUNDLED_MODEL)], tmp_path, PYTHONPATH=str(ROOT))
    told = json.loads(printed.splitlines()[-1])
    assert told["replies"]["through"] == told["replies"]["alone"]
    assert len(told["replies"]["alone"]) == 3
    assert_grows([(prompt, restored) for prompt, restored in told["cached"]])


# Programs


def test_aider_grows(installed, bundled, tmp_path):
    """Three questions typed into one chat. It ends the newest with a reminder, which history leaves out."""
    aider = [installed("aider").command("aider"), *AIDER, "--openai-api-base", f"{bundled.url}/v1"]
    run(aider, tmp_path, typed="\n".join(QUESTIONS))
    history = (tmp_path / ".aider.chat.history.md").read_text()
    asked = history.split("#### ")[1:]
    assert [turn.splitlines()[0].strip() for turn in asked] == QUESTIONS
    for turn in asked:
        assert [line for line in turn.splitlines()[1:] if line and not line.startswith(">")], turn
    steps = bundled.steps()
    assert len(steps) == 3
    # A checkpoint stands behind the words that open a turn; in this one the end differs.
    newest = max(tokens(f"{question}\n\nReply in English.\n<|im_end|>\n") for question in QUESTIONS)
    assert_grows(steps, changing=newest)


def launch(installed: Any, agent: str, server: Emptied, folder: Path, *words: str) -> str:
    """What `mlx-hybridcache launch` has an agent print, whose program is on the path for it alone."""
    program = Path(installed(LAUNCHED[agent]).command(agent))
    return run(
        [
            sys.executable,
            "-m",
            "mlx_hybridcache.cli",
            "launch",
            agent,
            "--url",
            server.url,
            "--",
            *words,
        ],
        folder,
        may_fail=True,
        PATH=f"{program.parent}:{os.environ['PATH']}",
        PYTHONPATH=str(ROOT),
        **TERSE,
    )


LAUNCHED = {
    "claude": "claude-code",
    "codex": "codex",
    "opencode": "opencode",
    "aider": "aider",
}
TERSE = {
    "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "40",
    "OPENCODE_EXPERIMENTAL_OUTPUT_TOKEN_MAX": "40",
    "DISABLE_AUTOUPDATER": "1",
    **OPENCODE,
}
"""These two set an end themselves: OpenCode that of its configuration, 8,192 tokens, which the small model fills."""

ASKED = {
    "claude": (["-p"], ["-p", "-c"]),
    "codex": (
        ["exec", "--skip-git-repo-check"],
        ["exec", "--skip-git-repo-check", "resume", "--last"],
    ),
    "opencode": (["run", "--pure", "--title", "A"], ["run", "--pure", "-c"]),
    "aider": (
        [*AIDER_QUIET, "--message"],
        [*AIDER_QUIET, "--restore-chat-history", "--message"],
    ),
}
"""How each is asked once, and how a new process of it goes on."""


@pytest.mark.parametrize(
    ("agent", "least", "changing"),
    [("claude", 20_000, 200), ("codex", 5_000, 50), ("opencode", 5_000, 50), ("aider", 500, 400)],
)
def test_an_agent_that_is_launched_grows(agent, least, changing, installed, terse, tmp_path):
    """Two questions, each asked by a process of its own. Of Claude Code's 28,943 tokens 28,939 are restored
    for the second, of Codex's 9,377 it is 9,368, of OpenCode's 10,247 it is 10,240; of aider's 880 it is 512, as
    it ends its newest message with a reminder. Some take a reply that is cut for a failure, and ask for more.
    """
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    for question, words in zip(QUESTIONS[:2], ASKED[agent], strict=True):
        launch(installed, agent, terse, tmp_path, *words, question)
    steps = terse.steps()
    print("prompt, restored:", steps)
    assert len(steps) >= 2
    (first, _), *others = steps
    assert first >= least
    assert all(restored >= first - changing for _, restored in others), steps


def test_codexs_lines_in_the_docs_are_its_settings(installed, terse, tmp_path):
    """docs/clients.md, but for the address."""
    home = tmp_path / ".codex"
    home.mkdir()
    (block,) = pages.of_language(pages.DOCS / "clients.md", "toml")
    (home / "config.toml").write_text(block.text.replace("http://localhost:8080", terse.url))
    program = installed("codex").command("codex")
    command = [program, "exec", "--skip-git-repo-check", QUESTIONS[0]]
    run(command, tmp_path, may_fail=True, LOCAL_KEY="none")
    assert terse.steps()[0][0] > 5_000


def opencode(installed: Any, server: Emptied, folder: Path, agent: str) -> list[dict[str, Any]]:
    """The events of one session with three questions, each asked by a process of its own."""
    program = installed("opencode").command("opencode")
    (folder / "opencode.json").write_text(json.dumps(opencode_settings(server.url)))
    tools = folder / ".opencode" / "tool"
    tools.mkdir(parents=True)
    for function in FUNCTIONS:
        (tools / f"{function.name}.js").write_text(opencode_tool(function.purpose))
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    events = []
    for question, session in zip(QUESTIONS, (["--title", "A"], ["-c"], ["-c"]), strict=True):
        how = ["run", "--pure", "--format", "json", "--agent", agent, *session]
        # As words: what holds a space is sent in quotation marks.
        printed = run([program, *how, *question.split()], folder, **OPENCODE)
        events += [json.loads(line) for line in printed.splitlines()]
    return events


def opencode_tool(purpose: str) -> str:
    """Without parameters: those would need a package of OpenCode's. The name is the file's."""
    said = json.dumps(json.dumps(RESULT))
    return f"export default {{description: {json.dumps(purpose)}, args: {{}}, execute: async () => {said}}};"


def opencode_settings(url: str) -> dict[str, Any]:
    """A provider, and beside OpenCode's own agents one with a short prompt and the tools of `opencode`."""
    ours = {function.name: True for function in FUNCTIONS}
    short = {"mode": "primary", "prompt": "Be kind.", "tools": {"*": False, **ours}}
    model = {"name": "bundled", "limit": {"context": 32_768, "output": 64}}
    return {
        "model": "local/default_model",
        "small_model": "local/default_model",
        "snapshot": False,
        "agent": {"short": short},
        "provider": {
            "local": {
                "npm": "@ai-sdk/openai-compatible",
                "options": {"baseURL": f"{url}/v1", "apiKey": "none", "includeUsage": True},
                "models": {"default_model": model},
            }
        },
    }


@pytest.mark.parametrize("agent", ["short", "build"])
def test_opencode_grows(agent, installed, bundled, tmp_path):
    """A session of three processes; the agent that it ships begins with 10,000 tokens, which are read once."""
    events = opencode(installed, bundled, tmp_path, agent)
    parts = [event["part"] for event in events]
    assert {event["type"] for event in events} <= {"step_start", "tool_use", "text", "step_finish"}
    assert sum(part["type"] == "text" for part in parts) >= 3
    if agent == "short":
        used = [part["state"] for part in parts if part["type"] == "tool"]
        assert {state["status"] for state in used} <= {"completed"}
        assert {state["output"] for state in used} <= {json.dumps(RESULT)}
    cached = [part["tokens"]["cache"]["read"] for part in parts if part["type"] == "step-finish"]
    assert_grows(bundled.steps(), cached)
