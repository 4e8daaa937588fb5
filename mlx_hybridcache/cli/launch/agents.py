"""Coding agents: what each has to be told so that it asks a server of ours, for one process alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..asking import KEY

MODEL = "default_model"
"""The server's name for whatever it serves."""

REPLY_TOKENS = 8192
"""What an agent is told that a reply may have; it asks for so many."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server listens, what it must be sent, and how many tokens it reads, if it says so."""

    url: str
    key: str
    context: int | None


@dataclass(frozen=True, slots=True)
class Agent:
    """A program, how to install it, and what it is started with."""

    program: str
    install: str
    environment: Callable[[Place], Mapping[str, str]]
    words: Callable[[Place], list[str]] = lambda place: []


def _claude(place: Place) -> Mapping[str, str]:
    return {
        "ANTHROPIC_BASE_URL": place.url,
        "ANTHROPIC_AUTH_TOKEN": place.key,
        "ANTHROPIC_API_KEY": "",  # one for Anthropic's own server would be sent too
        "ANTHROPIC_MODEL": MODEL,
        "ANTHROPIC_SMALL_FAST_MODEL": MODEL,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",  # the first line of every prompt, another in each
    }


def _codex(place: Place) -> list[str]:
    provider = {
        "name": "mlx-hybridcache",
        "base_url": f"{place.url}/v1",
        "env_key": KEY,
        "wire_api": "responses",
    }
    settings: dict[str, str | int] = {"model": MODEL, "model_provider": "mlx_hybridcache"}
    settings |= {f"model_providers.mlx_hybridcache.{name}": said for name, said in provider.items()}
    if place.context is not None:
        settings["model_context_window"] = place.context
    return [
        word for name, said in settings.items() for word in ("-c", f"{name}={json.dumps(said)}")
    ]


def _opencode(place: Place) -> Mapping[str, str]:
    limit = {} if place.context is None else {"limit": _limit(place.context)}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "mlx-hybridcache",
        "options": {"baseURL": f"{place.url}/v1", "apiKey": place.key, "includeUsage": True},
        "models": {MODEL: {"name": "the served model", **limit}},
    }
    settings = {
        "model": f"local/{MODEL}",
        "small_model": f"local/{MODEL}",
        "provider": {"local": provider},
    }
    return {"OPENCODE_CONFIG_CONTENT": json.dumps(settings)}


def _limit(context: int) -> dict[str, int]:
    return {"context": context, "output": min(REPLY_TOKENS, context // 4)}


AGENTS: Mapping[str, Agent] = MappingProxyType(
    {
        "claude": Agent("claude", "npm install -g @anthropic-ai/claude-code", _claude),
        "codex": Agent(
            "codex", "npm install -g @openai/codex", lambda place: {KEY: place.key}, _codex
        ),
        "opencode": Agent("opencode", "npm install -g opencode-ai", _opencode),
        "aider": Agent(
            "aider",
            "pip install aider-chat",
            lambda place: {
                "OPENAI_API_BASE": f"{place.url}/v1",
                "OPENAI_API_KEY": place.key,
            },
            lambda place: ["--model", f"openai/{MODEL}"],
        ),
    }
)
