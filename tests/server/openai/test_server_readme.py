"""What the README and docs/clients.md show to be pasted: curl lines, Python, configurations."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from places import ROOT

README = ROOT / "README.md"
CLIENTS = README.parent / "docs" / "clients.md"
READERS = {"json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def settings(language: str, *keys: str) -> object:
    """What stands under these keys in the only configuration in that language that has the first."""
    found = [READERS[language](block) for block in blocks(CLIENTS, language)]
    (value,) = [each for each in found if keys[0] in each]
    for key in keys:
        value = value[key]
    return value


def curl_lines() -> list[str]:
    """The commands of all sh and console blocks that begin with `curl`, continued lines joined."""
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", README.read_text("utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?curl ", line)]


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


PYTHON = blocks(README, "python")


def pasted(block: str, port: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What it prints as it stands, but for the port, among no names that it does not make itself."""
    exec(compile(block.replace(":8080", f":{port}"), "pasted", "exec"), {"__name__": "__main__"})
    return capsys.readouterr().out


def test_there_are_python_blocks():
    """A client, the library, and the library for who runs the model."""
    for block, name in zip(PYTHON, ("OpenAI(", "stream_generate(", "prefill("), strict=True):
        assert name in block


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: re.findall(r"\w+\(", block)[0])
def test_python_runs_as_it_stands(server, block, capsys):
    """Each for itself: whatever it names it has made, and the model is there."""
    assert pasted(block, server.port, capsys).strip()


def test_the_librarys_blocks_show_what_is_restored(server, capsys):
    """The second reply's prompt parts ways at its last words; what was saved restores the prompt."""
    library, framework = PYTHON[1:]
    shown = pasted(library, server.port, capsys)
    assert re.findall(r"(\w+) of \w+ tokens restored.*\((\w+)\)", shown)[0] == ("0", "cold")
    assert re.search(
        r"[1-9]\d\d of \d+ tokens restored, \d+ read in \d+ forwards? \(branch\)", shown
    )
    restored, of, tokens = pasted(framework, server.port, capsys).split()[:3]
    assert (int(restored), of) == (int(tokens) - 1, "of")


@pytest.mark.skipif(find_spec("langchain_openai") is None, reason="LangChain is not installed")
def test_langchains_lines_run_as_they_stand(server, capsys):
    """It says how much was restored."""
    (block,) = blocks(CLIENTS, "python")
    assert pasted(block, server.port, capsys).split()[-1].isdigit()


def test_configurations_can_be_read_and_fit_together():
    """OpenCode's model is one of its provider's, aider's has its prefix, Codex asks the proxy's model."""
    provider = settings("json", "provider", "local")
    assert provider["options"]["baseURL"] == "http://localhost:8080/v1"
    assert settings("json", "model") == f"local/{next(iter(provider['models']))}"
    assert settings("json", "openai/default_model", "litellm_provider") == "openai"
    (proxied,) = settings("yaml", "model_list")
    assert proxied["litellm_params"]["api_base"] == provider["options"]["baseURL"]
    assert settings("toml", "model") == proxied["model_name"]
    chosen = settings("toml", "model_providers", settings("toml", "model_provider"))
    assert (chosen["wire_api"], chosen["base_url"]) == ("responses", "http://localhost:4000/v1")
    assert all(compile(block, "clients.md", "exec") for block in blocks(CLIENTS, "python"))
    assert "docs/clients.md" in README.read_text("utf-8")
