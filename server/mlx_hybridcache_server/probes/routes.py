"""The endpoints: llama.cpp's shapes for what a server is, and for text as tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request

from ..errors import ApiError, refuse
from ..generation.admission import Admitted
from ..generation.models import Loaded
from ..generation.serving import RunningReply, Serving, serving_of
from ..http.wire import JsonRoute
from ..replies.answer import worked
from ..schema.probes import DetokenizeBody, TemplateBody, TokenizeBody

router = APIRouter(route_class=JsonRoute)


@router.get("/props", response_model=None)
async def props(request: Request) -> dict[str, Any]:
    """What is served, and within what."""
    serving = serving_of(request)
    settings, loaded = serving.settings, serving.loaded
    samplers = {name: getattr(settings, name) for name in ("top_p", "top_k", "min_p")}
    return {
        "default_generation_settings": {
            "n_ctx": loaded.renderer.room.longest,
            "params": {
                "temperature": settings.temp,
                **samplers,
                "n_predict": settings.max_tokens or -1,
            },
        },
        "total_slots": settings.decode_concurrency,
        "model_alias": loaded.id,
        "model_path": loaded.source,
        "chat_template": str(loaded.tokenizer.chat_template or ""),
        "modalities": {"vision": False, "audio": False},
        "is_sleeping": serving.slot.state == "unloaded",
    }


@router.get("/slots", response_model=None)
async def slots(request: Request) -> list[dict[str, Any]]:
    """The replies that run, one to a slot. Nothing of their prompts."""
    serving = serving_of(request)
    runs = [run for run in serving.runs if isinstance(run, RunningReply)]
    return [_slot(at, run, serving) for at, run in enumerate(runs)]


def _slot(at: int, run: RunningReply, serving: Serving) -> dict[str, Any]:
    return {
        **run.progress(),
        "id": at,
        "id_task": run.reply_id,
        "n_ctx": serving.loaded.renderer.room.longest,
        "is_processing": True,
    }


@router.post("/tokenize", response_model=None)
async def tokenize(body: TokenizeBody, request: Request) -> dict[str, Any]:
    """The tokens of a text, with what each stands for if `with_pieces`."""
    return {"tokens": await worked(request, partial(_tokenize, body))}


@router.post("/detokenize", response_model=None)
async def detokenize(body: DetokenizeBody, request: Request) -> dict[str, Any]:
    """The text of tokens."""
    return {"content": await worked(request, partial(_detokenize, body))}


@router.post("/apply-template", response_model=None)
async def apply_template(body: TemplateBody, request: Request) -> dict[str, Any]:
    """The prompt of a chat, as text."""
    return {"prompt": await worked(request, partial(_template, body))}


@router.post("/v1/embeddings", response_model=None, include_in_schema=False)
@router.post("/embeddings", response_model=None, include_in_schema=False)
@router.post("/embedding", response_model=None, include_in_schema=False)
async def embeddings() -> dict[str, Any]:
    """Refused: clients that ask here need another server for it."""
    raise ApiError(
        501,
        "This server makes no embeddings; it serves a language model. Point your client's embedding "
        "model at a server for them, such as llama-server --embedding or Ollama.",
        code="not_implemented",
    )


async def _tokenize(
    body: TokenizeBody, serving: Serving, admitted: Admitted, weight: int
) -> list[Any]:
    if not body.content:
        return []
    loaded = await serving.slot.model(admitted.held, body.model)
    special = bool(body.add_special)
    steps = loaded.renderer.text(body.content, "content", special=special, salt=body.cache_salt)
    tokens: list[int] = (await serving.rendering.steps(steps, weight)).tokens.tolist()
    if not body.with_pieces:
        return tokens
    return await serving.rendering.call(partial(_pieces, tokens, loaded), len(tokens))


def _pieces(tokens: list[int], loaded: Loaded) -> list[dict[str, Any]]:
    """As llama.cpp has them: text, or a list of bytes where a token is part of a character."""
    return [{"id": token, "piece": _piece(loaded.token_bytes(token))} for token in tokens]


def _piece(spelled: bytes) -> str | list[int]:
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return list(spelled)


async def _detokenize(
    body: DetokenizeBody, serving: Serving, admitted: Admitted, weight: int
) -> str:
    loaded = await serving.slot.model(admitted.held, body.model)
    if not body.tokens:
        return ""
    if max(body.tokens) >= loaded.renderer.vocabulary:
        raise refuse(
            f"tokens has an id beyond this model's, which are 0 to {loaded.renderer.vocabulary - 1}.",
            "tokens",
        )
    return str(await serving.rendering.call(partial(loaded.tokenizer.decode, body.tokens), weight))


async def _template(body: TemplateBody, serving: Serving, admitted: Admitted, weight: int) -> str:
    loaded = await serving.slot.model(admitted.held, body.model)
    opens = body.add_generation_prompt is not False
    render = partial(loaded.renderer.prompt, body, opens_reply=opens)
    return str(await serving.rendering.call(render, weight))
