"""A chat that is asked for in any protocol: rendered, held to its form, and handed to the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mlx_hybridcache.store.tree import common_length
from mlx_hybridcache.tokens import Tokens

from ..errors import ApiError
from ..generation.admission import Admitted
from ..generation.models import Loaded
from ..generation.serving import ReplyRequest, RunningReply, Serving
from ..prompts.chat import Rendered, Renderer
from ..prompts.tokenizing import Steps
from ..schema.form import is_constrained
from ..schema.requests import ChatBody, Conversation, GenerationBody
from ..schema.tool_choice import callable_tools
from .parse import parse, warn_of_moved, warn_of_switches

if TYPE_CHECKING:
    from ..calls.formats import ToolFormat
    from ..grammar.constrain import Constraint

BAD_REQUEST = 400


RETENTIONS = {"24h": 24 * 3600.0, "in_memory": None, "in-memory": None}
"""OpenAI's `prompt_cache_retention` in seconds; in memory a prompt stays like everything else."""


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """A beginning of a conversation, or with None all of it, that its client wants kept for `seconds`.

    `is_boundary`: it ends within a message; between two of them there is a checkpoint anyway.
    """

    beginning: Conversation | None
    seconds: float
    is_boundary: bool = False


@dataclass(frozen=True, slots=True)
class Chat:
    """The replies that are wanted to one conversation, and how the model writes calls in them."""

    wanted: list[ReplyRequest]
    calls: ToolFormat | None
    loaded: Loaded
    serving: Serving
    admitted: Admitted

    def runs(self, reply_id: str) -> list[RunningReply]:
        """Each of them, about to begin."""
        serving, loaded, admitted = self.serving, self.loaded, self.admitted
        return [RunningReply(serving, loaded, each, reply_id, admitted) for each in self.wanted]


def rendering(body: ChatBody, renderer: Renderer, *, opens_reply: bool = True) -> Steps[Rendered]:
    """The prompt of a conversation as it is asked for: up to its reply, or, unless it `opens_reply`, its end."""
    return renderer.chat(
        body,
        continues=opens_reply and bool(body.continue_final_message),
        opens_reply=opens_reply and body.add_generation_prompt is not False,
        salt=body.cache_salt,
    )


async def chat(
    body: ChatBody,
    loaded: Loaded,
    serving: Serving,
    admitted: Admitted,
    weight: int,
    breakpoints: Sequence[Breakpoint] = (),
) -> Chat:
    """Render a conversation that weighs so many bytes. Raises `ApiError` 400 for what cannot be.

    At the ends of `breakpoints` the client wants checkpoints, and to have them kept for a time.
    """
    may_call = callable_tools(body)
    warn_of_switches(body, loaded.tokenizer.chat_template)
    rendered = await serving.rendering.steps(rendering(body, loaded.renderer), weight)
    ends, lifetimes = set(), _retention(body, len(rendered.tokens))
    for each in breakpoints:
        end = await _end(each.beginning, rendered.tokens, body.cache_salt, loaded, serving, weight)
        if end is not None:
            lifetimes[end] = max(each.seconds, lifetimes.get(end, 0.0))
            ends.update([end] if each.is_boundary else [])
    if (stable := rendered.stable) is not None:
        ends.update(stable.boundaries)
        warn_of_moved(body, stable)
    held_to = await constraint(body, rendered, serving, loaded)
    tools = (held_to and held_to.tools) or may_call
    calls = loaded.tool_format(tools, calls=body.tool_choice != "none")
    wanted = parse(body, rendered, serving.settings, loaded, held_to, calls)
    for one in wanted:
        one.options.update({"boundaries": sorted(ends), "lifetimes": lifetimes})
    return Chat(wanted, calls, loaded, serving, admitted)


def _retention(body: ChatBody, tokens: int) -> dict[int, float]:
    """For how long all of a prompt of so many tokens is to be kept, if the client says so."""
    wanted = body.prompt_cache_retention
    if wanted is None:
        return {}
    seconds = RETENTIONS.get(wanted, 0.0) if isinstance(wanted, str) else 0.0
    if seconds == 0.0:
        body.warn("prompt_cache_retention", "not followed: it is 24h or in_memory.")
    return {tokens: seconds} if seconds else {}


async def _end(
    beginning: Conversation | None,
    tokens: Tokens,
    salt: str | None,
    loaded: Loaded,
    serving: Serving,
    weight: int,
) -> int | None:
    """How many tokens a prompt has in common with all that begin like `beginning`.

    None where that cannot be rendered, though all of the conversation can: it may end with a picture,
    or be too long with what is put behind it.
    """
    if beginning is None:
        return len(tokens)
    steps = loaded.renderer.prefix(beginning, salt=salt)
    try:
        prefix = await serving.rendering.steps(steps, weight)
    except ApiError as error:
        if error.status_code != BAD_REQUEST:
            raise
        return None
    return common_length(prefix, tokens)


async def constraint(
    body: GenerationBody, rendered: Rendered, serving: Serving, loaded: Loaded
) -> Constraint | None:
    """What a reply is held to, if it is held to anything."""
    if not is_constrained(body):
        return None
    return await serving.rendering.compile(partial(loaded.constraints.of, body, rendered))
