"""From a request's fields to the replies that it wants: defaults filled in, and refused what can be."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..adapter import Sampling
from ..errors import refuse
from ..generation.limits import Limits
from ..generation.models import DEFAULT_NAME, Loaded
from ..generation.serving import ReplyRequest
from ..prompts.chat import Rendered
from ..prompts.stable import StablePrefix
from ..schema.requests import ChatBody, CompletionBody, GenerationBody
from ..schema.tool_choice import is_silent
from ..settings import Settings
from .notices import named as listed

if TYPE_CHECKING:
    from ..calls.formats import ToolFormat
    from ..grammar.constrain import Constraint

LONGEST_REPLY = 2**31 - 1
"""Where neither the model's configuration nor the memory says how much fits."""

MOST_DIGITS = 19
"""Of a token id, leading zeros included."""


def check(body: GenerationBody, settings: Settings) -> None:
    """Refuse, before any work, what this server cannot do. Raises `ApiError` 400."""
    own = (None, DEFAULT_NAME, settings.draft_model)
    if body.draft_model not in own and not settings.allow_model_switching:
        raise refuse(
            "draft_model can name only the server's own (--draft-model), which is used anyway. Start the "
            "server with --allow-model-switching to let requests load others.",
            "draft_model",
        )
    if body.suffix:
        raise refuse("suffix is not supported: the model writes behind a prompt.", "suffix")
    if (body.best_of or 1) > (body.n or 1):
        raise refuse("best_of beyond n is not supported; ask for n choices.", "best_of")
    if isinstance(body, CompletionBody) and body.echo and _top_logprobs(body) is not None:
        raise refuse("echo cannot be combined with logprobs.", "echo")


def parse(
    body: GenerationBody,
    rendered: Rendered,
    settings: Settings,
    loaded: Loaded,
    constraint: Constraint | None,
    tools: ToolFormat | None = None,
) -> list[ReplyRequest]:
    """The `n` replies that are wanted to one prompt."""
    sampling = _sampling(body, settings, loaded.renderer.vocabulary)
    if is_silent(body):
        sampling = replace(sampling, logit_bias=(*sampling.logit_bias, *loaded.without_calls()))
    seed = secrets.randbits(63) if body.seed is None else body.seed
    named = body.max_completion_tokens or body.max_tokens or settings.max_tokens or LONGEST_REPLY
    fitting = loaded.renderer.room.beside(len(rendered.tokens)) or LONGEST_REPLY
    limits = _limits(body, settings, loaded, constraint)
    return [
        ReplyRequest(
            tokens=rendered.tokens,
            max_tokens=min(named, fitting),
            best_effort=named >= fitting,
            sampling=sampling,
            seed=(seed + index) % 2**64,
            stops=body.stops(),
            top_logprobs=_top_logprobs(body),
            state=rendered.state,
            endpoint=body.endpoint,
            is_chat=isinstance(body, ChatBody),
            goes_on=not isinstance(body, ChatBody) or bool(body.continue_final_message),
            tools=tools,
            one_tool_call=isinstance(body, ChatBody) and body.parallel_tool_calls is False,
            constraint=constraint,
            limits=limits,
            cache_salt=body.cache_salt,
            use_cache=_uses_cache(body, settings),
            stable=rendered.stable,
            options=_drafting(body, settings, loaded, use_cache=_uses_cache(body, settings)),
        )
        for index in range(body.n or 1)
    ]


def _limits(
    body: GenerationBody, settings: Settings, loaded: Loaded, constraint: Constraint | None
) -> Limits:
    """Of the reply's length. What the model's template or vocabulary cannot follow is said."""
    least = 2**31 if body.ignore_eos else body.min_tokens
    if least and constraint is not None:
        raise refuse(
            "A reply that is held to a form ends where the form does: leave out min_tokens and "
            "ignore_eos, or response_format and tool_choice.",
            "min_tokens" if body.min_tokens else "ignore_eos",
        )
    thinking = settings.max_thinking_tokens
    if body.thinking_budget is not None:
        thinking = min(body.thinking_budget, 2**31 if thinking is None else thinking)
        if not loaded.tokenizer.has_thinking:
            body.warn("thinking_budget", "this model does not reason in a block of its own.")
    return Limits(least, frozenset(body.stop_token_ids or ()), thinking)


def warn_of_switches(body: ChatBody, template: object) -> None:
    """Say which ways to make the model think, or not, its chat template does not know."""
    known = str(template or "")
    if body.switches_thinking and "thinking" not in known:
        body.warn("thinking", "this model's chat template has no switch for it.")
    if body.reasoning_effort not in (None, "none") and "reasoning_effort" not in known:
        body.warn("reasoning_effort", "this model's chat template knows no efforts.")


def warn_of_moved(body: ChatBody, stable: StablePrefix) -> None:
    """Say what stands elsewhere in the prompt than it was sent."""
    if stable.moved:
        lines = f"{len(stable.moved)} line{'s' * (len(stable.moved) > 1)}"
        kinds = listed(stable.moved)
        body.warn(
            "stable_prefix", f"{lines} of the system prompt ({kinds}) moved to the prompt's end."
        )


def _top_logprobs(body: GenerationBody) -> int | None:
    """How many alternatives to name; None when no log-probabilities are asked for."""
    asked = getattr(body, "logprobs", None)
    if asked is not None and not isinstance(asked, bool):  # the legacy number of alternatives
        return int(asked)
    top = max(body.top_logprobs or 0, 0)
    return top if asked or top else None


def _sampling(body: GenerationBody, settings: Settings, vocabulary: int) -> Sampling:
    own = {
        "temperature": settings.temp,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": settings.min_p,
    }
    asked = {
        name: value
        for name in Sampling.__dataclass_fields__
        if name != "logit_bias" and (value := getattr(body, name)) is not None
    }
    chosen = {**own, **asked, "logit_bias": _bias(body.logit_bias or {}, vocabulary)}
    if chosen["top_k"] >= vocabulary:  # leaves nothing out, which mlx-lm would call a mistake
        chosen["top_k"] = 0
    return Sampling(**chosen)


def _bias(bias: dict[str, float], vocabulary: int) -> tuple[tuple[int, float], ...]:
    found = []
    for key, value in bias.items():
        if not (_is_number(key) and int(key) < vocabulary):
            raise refuse(
                f"logit_bias names {key!r}; this model's token ids are 0 to {vocabulary - 1}.",
                "logit_bias",
            )
        found.append((int(key), value))
    return tuple(found)


def _is_number(key: str) -> bool:
    """Whether `key` is an id at all. Python reads `²` as a digit, and no number of 5,000 of them."""
    return key.isascii() and key.isdigit() and len(key) <= MOST_DIGITS


def _uses_cache(body: GenerationBody, settings: Settings) -> bool:
    return settings.uses_cache and body.cache_prompt is not False


def _drafting(
    body: GenerationBody, settings: Settings, loaded: Loaded, *, use_cache: bool
) -> dict[str, Any]:
    """How the reply is drafted. A request that asks for no tokens at once has no drafts.

    Without the cache mlx-lm drafts, on caches of its own, where it can.
    """
    asked = body.num_draft_tokens
    by_model = settings.num_draft_tokens if asked is None else asked
    options: dict[str, Any] = {}
    if asked == 0:
        return options
    if settings.draft_from_cache and use_cache:
        options["draft_from_cache"] = True
    if loaded.draft is not None and by_model and (use_cache or loaded.cache.info.goes_back):
        around = {} if use_cache else settings.generation_options()
        return {**options, **around, "draft_model": loaded.draft, "num_draft_tokens": by_model}
    if loaded.head is not None and by_model and use_cache:
        return {**options, "draft_mtp": loaded.head, "num_draft_tokens": by_model}
    return options if asked is None or not options else {**options, "num_draft_tokens": asked}
