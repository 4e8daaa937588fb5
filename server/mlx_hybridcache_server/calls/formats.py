"""How a model writes calls: the formats that are read here, under the names of mlx-lm's parsers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from . import gemma_formats as gemma
from . import xml_formats as markup
from .argument_types import offered
from .json_formats import (
    Format,
    Offered,
    json_tools,
    kimi_k2,
    mistral,
)
from .mlx_lm_formats import read
from .pythonic_formats import pythonic
from .reader_process import Calls, Parser

FORMATS: dict[str, Format] = {
    "json_tools": json_tools,
    "kimi_k2": kimi_k2,
    "mistral": mistral,
    "function_gemma": gemma.reader("<escape>"),
    "gemma4": gemma.reader('<|"|>'),
    "glm47": markup.reader(markup.GLM47),
    "kimi_k3": markup.reader(markup.KIMI_K3),
    "laguna": markup.reader(markup.GLM47),
    "longcat": markup.reader(markup.LONGCAT),
    "minicpm5": markup.reader(markup.MINICPM5),
    "minimax_m2": markup.reader(markup.MINIMAX_M2),
    "muse_spark": markup.reader(markup.MUSE_SPARK),
    "pythonic": pythonic,
    "qwen3_coder": markup.reader(markup.QWEN3_CODER),
}
"""What is missing is read by mlx-lm's own parser, when its text is complete."""


@dataclass(frozen=True)
class ToolFormat:
    """A model's markers of calls, mlx-lm's parser of what stands between them, and what was offered."""

    start: str
    end: str
    parse: Parser
    tools: list[dict[str, Any]]

    @cached_property
    def offered(self) -> Offered:
        """The functions that may be called."""
        return offered(self.tools)

    @property
    def read(self) -> Format | None:
        """Reads calls as they are written; None for a format that `others` must read."""
        return FORMATS.get(self.parse.__module__.rpartition(".")[2])

    async def others(self, text: str) -> Calls | None:
        """What mlx-lm's parser makes of a complete text; None when it calls nothing that was offered."""
        found = await read(self.parse, text, self.tools)
        if found is None or any(call["name"] not in self.offered for call in found):
            return None
        return [
            {**call, "arguments": self.offered[call["name"]].reread(call["arguments"])}
            for call in found
        ]
