"""Servers that the files of these folders share: one start for each worker of the test run."""

from __future__ import annotations

import openai
import pytest
from servers import (
    OURS,
    running,
)


@pytest.fixture(scope="session")
def process():
    with running(OURS) as server:
        yield server


@pytest.fixture(scope="module")
def server(process):
    """With nothing stored: what one file's tests leave behind is nothing that another's find."""
    process.client.delete("/v1/cache").raise_for_status()
    return process


@pytest.fixture(scope="session")
def instant():
    """One whose model answers without reasoning first, for protocols that have no switch for it."""
    with running(OURS, "--chat-template-args", '{"enable_thinking": false}') as server:
        yield server


@pytest.fixture(scope="session")
def strict():
    """With a key, an origin, small limits, and leave to load other models."""
    flags = ["--max-prompt-tokens", "60", "--max-body-bytes", "4KiB", "--show-prompts"]
    flags += ["--allowed-origins", "https://app.example", "--cache-ram", "64"]
    flags += ["--allow-model-switching"]
    with running(OURS, *flags, MLX_HYBRIDCACHE_API_KEY="a-key") as server:
        server.client.headers["Authorization"] = "Bearer a-key"
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
