"""The endpoints: parse, hand over, shape the reply."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from ..generation.admission import Admitted
from ..generation.models import Loaded
from ..generation.serving import RunningReply, Serving
from ..replies import chat as chats
from ..replies.answer import answered
from ..replies.message import ChatMessage
from ..replies.parse import parse
from ..schema.requests import ChatBody, CompletionBody, GenerationBody
from .choices import ChatChoice, Choice, TextChoice
from .envelope import Envelope
from .functions import FunctionChoice
from .logprobs import TokenNames
from .reply import STREAM, Reply


async def chat(body: ChatBody, request: Request) -> Response:
    """A reply to a conversation."""
    return await answered(body, request, body.n or 1, partial(_chat, body), STREAM)


async def completions(body: CompletionBody, request: Request) -> Response:
    """A continuation of each prompt."""
    replies = len(body.prompts()) * (body.n or 1)
    return await answered(body, request, replies, partial(_completions, body), STREAM)


async def _model(body: GenerationBody, serving: Serving, admitted: Admitted) -> Loaded:
    """The one that the body names, with the draft model that it names."""
    return await serving.slot.model(admitted.held, body.model, body.adapters, body.draft_model)


async def _chat(body: ChatBody, serving: Serving, admitted: Admitted, weight: int) -> Reply:
    loaded = await _model(body, serving, admitted)
    begun = await chats.chat(body, loaded, serving, admitted, weight)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    envelope = Envelope.new("chatcmpl", kind, body.model or loaded.id)
    choices: list[Choice] = [
        ChatChoice(index, run, ChatMessage(begun.calls), TokenNames(loaded.token_bytes))
        for index, run in enumerate(begun.runs(envelope.id))
    ]
    if body.wants_function_call:
        choices = [FunctionChoice(choice) for choice in choices]
    return Reply(serving, envelope, [choices], body.wants_usage())


async def _completions(
    body: CompletionBody, serving: Serving, admitted: Admitted, weight: int
) -> Reply:
    loaded = await _model(body, serving, admitted)
    envelope = Envelope.new("cmpl", "text_completion", body.model or loaded.id)
    groups: list[list[TextChoice]] = []
    for prompt in body.prompts():
        steps = loaded.renderer.text(prompt, salt=body.cache_salt)
        rendered = await serving.rendering.steps(steps, len(prompt))
        constraint = await chats.constraint(body, rendered, serving, loaded)
        wanted = parse(body, rendered, serving.settings, loaded, constraint)
        echo = ""
        if body.echo:
            echo = await serving.rendering.call(partial(_text_of, prompt, loaded), len(prompt))
        first = len(groups) * len(wanted)
        groups.append(
            [
                TextChoice(
                    first + i,
                    RunningReply(serving, loaded, each, envelope.id, admitted),
                    TokenNames(loaded.token_bytes),
                    echo,
                )
                for i, each in enumerate(wanted)
            ]
        )
    return Reply(serving, envelope, groups, body.wants_usage())


def _text_of(prompt: str | list[int], loaded: Loaded) -> str:
    return prompt if isinstance(prompt, str) else str(loaded.tokenizer.decode(prompt))
