"""What docs/clients.md shows to be pasted: configurations that fit together, and LangChain's lines."""

from __future__ import annotations

import json
import tomllib

from checkout import pages

CLIENTS = pages.DOCS / "clients.md"
READERS = {"json": json.loads, "toml": tomllib.loads}


def settings(language: str, *keys: str) -> object:
    """What stands under these keys in the only configuration in that language that has the first."""
    found = [READERS[language](block.text) for block in pages.of_language(CLIENTS, language)]
    (value,) = [each for each in found if keys[0] in each]
    for key in keys:
        value = value[key]
    return value


def test_configurations_can_be_read_and_fit_together():
    """OpenCode's model is one of its provider's, aider's has its prefix, Codex asks for the same one."""
    provider = settings("json", "provider", "local")
    assert provider["options"]["baseURL"] == "http://localhost:8080/v1"
    assert settings("json", "model") == f"local/{next(iter(provider['models']))}"
    assert settings("json", "openai/default_model", "litellm_provider") == "openai"
    assert settings("toml", "model") == next(iter(provider["models"]))
    chosen = settings("toml", "model_providers", settings("toml", "model_provider"))
    assert chosen["wire_api"] == "responses"
    assert chosen["base_url"] == provider["options"]["baseURL"]


def test_every_librarys_lines_are_whole_and_ask_this_server():
    """Eight in Python, each with its imports, of which `pytest -m clients` installs what is not the SDKs'."""
    blocks = pages.of_language(CLIENTS, "python")
    assert len(blocks) == 8
    for block in blocks:
        compile(block.text, str(block), "exec")
        assert "http://localhost:8080" in block.text
