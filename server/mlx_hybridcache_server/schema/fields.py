"""Names that a client knows, for messages about where a mistake is."""

from __future__ import annotations

from .explain import ExplainBody
from .messages import MessagesBody, OutputConfig, Thinking, ToolChoice
from .probes import DetokenizeBody, TemplateBody, TokenizeBody
from .requests import ChatBody, CompletionBody, PrefixBody, WatchBody
from .responses import Reasoning, ResponsesBody, TextConfig

FIELDS = frozenset(
    name
    for body in (
        *(ChatBody, CompletionBody, PrefixBody, WatchBody),
        *(MessagesBody, OutputConfig, Thinking, ToolChoice),
        *(DetokenizeBody, ExplainBody, TemplateBody, TokenizeBody),
        *(ResponsesBody, Reasoning, TextConfig),
    )
    for name in body.model_fields
) | {"include_usage", "type", "function", "name", "limit"}
