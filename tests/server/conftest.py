"""Servers that the files of these folders share: one start for each worker of the test run."""

from __future__ import annotations

import openai
import pytest
from servers import (
    OURS,
    running,
)


@pytest.fixture(scope="session")
def server():
    with running(OURS) as server:
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


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
