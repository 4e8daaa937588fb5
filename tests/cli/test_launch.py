"""`mlx-hybridcache launch`: an agent finds a server of ours, and nothing of its own is changed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from servers import OURS, free_port, running

from mlx_hybridcache.cli.asking import KEY
from mlx_hybridcache.cli.launch import main as launch
from mlx_hybridcache.cli.launch.agents import AGENTS, Place
from mlx_hybridcache.cli.main import main

PLACE = Place("http://127.0.0.1:8080", "none", 131_072)

AGENT = f"""#!{sys.executable}
import json, os, sys, urllib.request
url = os.environ["ANTHROPIC_BASE_URL"]
healthy = json.load(urllib.request.urlopen(url + "/health"))["status"]
print(json.dumps([sys.argv[1:], dict(os.environ), healthy]), flush=True)
sys.exit(7)
"""
"""A program in place of an agent's: it tells how it was started, and asks the server."""


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A folder of programs, in which `claude` tells how it was started."""
    program = tmp_path / "claude"
    program.write_text(AGENT)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def keyed():
    with running(OURS, "--context-length", "5000", MLX_HYBRIDCACHE_API_KEY="a-key") as server:
        yield server


def told(capfd) -> tuple[list[str], dict[str, str], str]:
    words, variables, healthy = json.loads(capfd.readouterr().out.splitlines()[-1])
    return words, variables, healthy


def test_an_agent_gets_its_words_and_asks_the_server_that_runs(keyed, path, capfd, monkeypatch):
    """Everything behind `--`, the key, and its own status; nothing is started."""
    monkeypatch.setenv(KEY, "a-key")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "somebody else's")
    words = ["-p", "Hello.", "--model", "x", "--", "y"]
    assert main(["launch", "claude", "--url", f"{keyed.url}/", "--", *words]) == 7
    got, variables, healthy = told(capfd)
    assert (got, healthy) == (words, "ok")
    assert variables["ANTHROPIC_BASE_URL"] == keyed.url
    assert variables["ANTHROPIC_AUTH_TOKEN"] == "a-key"
    assert variables["ANTHROPIC_API_KEY"] == ""


def test_a_server_is_started_where_none_runs_and_ends_with_the_agent(path, capfd, monkeypatch):
    """At the address where the next one looks for it."""
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(launch, "URL", url)
    monkeypatch.delenv(KEY, raising=False)
    assert main(["launch", "claude"]) == 7
    words, variables, healthy = told(capfd)
    assert (words, healthy, variables["ANTHROPIC_BASE_URL"]) == ([], "ok", url)
    assert launch._look(url) is None


def test_what_stands_in_the_way_is_said(keyed, path, capfd, monkeypatch):
    """A program that is missing, a key, an address without a server, a server of another kind, two models."""
    monkeypatch.delenv(KEY, raising=False)
    nobody = f"http://127.0.0.1:{free_port()}"
    for words, said in (
        (["codex"], "codex is not installed. Install it: npm install -g @openai/codex"),
        (["claude", "--url", keyed.url], f"it wants a key: set {KEY}"),
        (["claude", "--url", nobody], f"No server answers at {nobody}"),
        (["claude", "--url", "localhost:8080"], "'localhost:8080' is no server's address"),
    ):
        assert main(["launch", *words]) == 2
        assert said in capfd.readouterr().err
    monkeypatch.setenv(KEY, "a-key")
    assert main(["launch", "claude", "--url", keyed.url, "--model", "x"]) == 2
    assert "leave out --model" in capfd.readouterr().err
    assert main(["launch", "claude", "--url", keyed.url, "--cache-dir", "x"]) == 2
    assert "--cache-dir, or stop it" in capfd.readouterr().err


class Another(BaseHTTPRequestHandler):
    """A server of somebody else's, which answers everything."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "x", "owned_by": "them"}]}')

    def log_message(self, *_: object) -> None: ...


def test_another_server_is_not_taken_for_ours(path, capfd, monkeypatch):
    """Nor is one started over it."""
    with HTTPServer(("127.0.0.1", 0), Another) as other:
        serving = Thread(target=other.serve_forever, daemon=True)
        serving.start()
        monkeypatch.setattr(launch, "URL", f"http://127.0.0.1:{other.server_port}")
        assert main(["launch", "claude"]) == 2
        other.shutdown()
        serving.join()
    assert "is no mlx_hybridcache.server" in capfd.readouterr().err


def test_a_model_that_cannot_be_loaded_is_said_in_the_servers_words(path, capfd, monkeypatch):
    """And the agent is not run."""
    monkeypatch.setattr(launch, "URL", f"http://127.0.0.1:{free_port()}")
    assert main(["launch", "claude", "--model", "/no/such/model"]) == 2
    printed = capfd.readouterr()
    assert "/no/such/model" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("name", AGENTS)
def test_what_is_shown_is_what_would_be_run(name, capsys, monkeypatch, keyed):
    """Lines for a shell: its variables, then its command with the words behind `--`, each as it was given."""
    monkeypatch.setenv(KEY, "a-key")
    assert main(["launch", name, "--print", "--url", keyed.url, "--", "it's", "$HOME"]) == 0
    *exports, command = capsys.readouterr().out.splitlines()
    place = Place(keyed.url, "a-key", 5000)
    agent = AGENTS[name]
    assert shlex.split(command) == [agent.program, *agent.words(place), "it's", "$HOME"]
    shown = dict(shlex.split(line)[1].split("=", 1) for line in exports)
    assert shown == dict(agent.environment(place))
    assert any(keyed.url in value for value in [command, *shown.values()])


def test_agents_are_told_how_much_fits_where_the_server_says_so():
    """A fourth of it at most is a reply's; a server without a limit leaves theirs."""
    settings = json.loads(AGENTS["opencode"].environment(PLACE)["OPENCODE_CONFIG_CONTENT"])
    (model,) = settings["provider"]["local"]["models"].values()
    assert model["limit"] == {"context": 131_072, "output": 8192}
    small = AGENTS["opencode"].environment(Place(PLACE.url, "none", 4000))
    assert '"output": 1000' in small["OPENCODE_CONFIG_CONTENT"]
    unlimited = Place(PLACE.url, "none", None)
    assert "limit" not in AGENTS["opencode"].environment(unlimited)["OPENCODE_CONFIG_CONTENT"]
    assert "model_context_window=131072" in AGENTS["codex"].words(PLACE)
    assert not any("context" in word for word in AGENTS["codex"].words(unlimited))


def test_ctrl_c_is_the_agents(path, tmp_path):
    """It goes on, and the server with it; when it ends, both have."""
    program = tmp_path / "claude"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, os, signal, sys, time, urllib.request\n"
        "signal.signal(signal.SIGINT, lambda *_: None)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "url = os.environ['ANTHROPIC_BASE_URL']\n"
        "print(json.load(urllib.request.urlopen(url + '/health'))['status'], flush=True)\n"
    )
    runner = (
        "from mlx_hybridcache.cli import main\n"
        "from mlx_hybridcache.cli.launch import main as launch\n"
        f"launch.URL = 'http://127.0.0.1:{free_port()}'\n"
        "raise SystemExit(main.main(['launch', 'claude']))"
    )
    environment = {**os.environ, "PATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", runner],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.2)
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ok\n"
        assert process.wait(60) == 0
