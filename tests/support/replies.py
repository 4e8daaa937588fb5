"""What tests ask for, and read in replies."""

from __future__ import annotations

from typing import Any

from mlx_hybridcache.demo.functions import FUNCTIONS

FUNCTION = {function.name: function.declaration() for function in FUNCTIONS}
ENDLESS = {"logit_bias": {"700": 100}}
"""Makes the model write one token for ever."""


def tools(*names: str) -> list[dict[str, Any]]:
    return [FUNCTION[name] for name in names]


def content(reply: dict[str, Any], index: int = 0) -> str:
    return str(reply["choices"][index]["message"]["content"])


def cached(reply: dict[str, Any]) -> int:
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])
