"""Every path that is served, with what answers it. Nothing of it is imported before it is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class ServedPath:
    """A method of a path, and `module:function`, whose parameters are what is read of a request.

    `answers` and `failures`, the meaning of statuses that only this one has, are for the description.
    A path that is not `is_listed` is served and not spoken of.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    function: str
    answers: Literal["json", "json or events", "text"] = "json"
    failures: Mapping[int, str] = field(default_factory=dict)
    is_listed: bool = True


SERVED_PATHS = (
    ServedPath("GET", "/v1/cache", "watching.cache_routes:cache"),
    ServedPath("DELETE", "/v1/cache", "watching.cache_routes:clear"),
    ServedPath("GET", "/v1/cache/recent", "watching.cache_routes:recent"),
    ServedPath("POST", "/v1/cache/warm", "watching.cache_routes:warm"),
    ServedPath("POST", "/v1/cache/pin", "watching.cache_routes:pin"),
    ServedPath("DELETE", "/v1/cache/pin", "watching.cache_routes:unpin"),
    ServedPath("POST", "/v1/cache/drop", "watching.cache_routes:drop"),
    ServedPath("POST", "/v1/cache/explain", "explaining.routes:explain"),
    ServedPath("POST", "/chat/completions", "openai.routes:chat", "json or events"),
    ServedPath("POST", "/v1/chat/completions", "openai.routes:chat", "json or events"),
    ServedPath("POST", "/v1/completions", "openai.routes:completions", "json or events"),
    ServedPath("GET", "/health", "openai.listing:health", failures={503: "The worker has ended"}),
    ServedPath("GET", "/v1/models", "openai.listing:list_models"),
    ServedPath("GET", "/v1/models/{name:path}", "openai.listing:one_model"),
    ServedPath("GET", "/metrics", "openai.listing:metrics", "text"),
    ServedPath("POST", "/v1/messages", "anthropic.routes:messages", "json or events"),
    ServedPath("POST", "/v1/messages/count_tokens", "anthropic.routes:count_tokens"),
    ServedPath("POST", "/v1/responses", "responses.routes:responses", "json or events"),
    ServedPath("GET", "/v1/responses/{name}", "responses.routes:kept"),
    ServedPath("GET", "/v1/responses/{name}/input_items", "responses.routes:items"),
    ServedPath("DELETE", "/v1/responses/{name}", "responses.routes:forget"),
    ServedPath("POST", "/v1/responses/{name}/cancel", "responses.routes:cancel"),
    ServedPath("GET", "/props", "probes.routes:props"),
    ServedPath("GET", "/slots", "probes.routes:slots"),
    ServedPath("POST", "/tokenize", "probes.routes:tokenize"),
    ServedPath("POST", "/detokenize", "probes.routes:detokenize"),
    ServedPath("POST", "/apply-template", "probes.routes:apply_template"),
    ServedPath("POST", "/embedding", "probes.routes:embeddings", is_listed=False),
    ServedPath("POST", "/embeddings", "probes.routes:embeddings", is_listed=False),
    ServedPath("POST", "/v1/embeddings", "probes.routes:embeddings", is_listed=False),
    ServedPath("GET", "/", "watching.page_routes:page", is_listed=False),
    ServedPath("GET", "/page/{name}", "watching.page_routes:page_file", is_listed=False),
    ServedPath("POST", "/v1/cache/watch", "watching.page_routes:watching", is_listed=False),
)
"""In the order in which they are tried, listed and described."""
