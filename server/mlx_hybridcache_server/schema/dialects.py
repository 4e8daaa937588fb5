"""What clients of other servers send: followed under our own names, said, or refused. Never ignored.

What changes nothing here, as `user`, `store` or `service_tier`, is in no list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import refuse

Fields = dict[str, Any]

SAME = {
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "repetition_context_size",
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "thinking_token_budget": "thinking_budget",
    "thinking_budget_tokens": "thinking_budget",
    "reasoning_budget": "thinking_budget",
}
"""Other servers' names for fields of ours. Where they write -1, for no limit, ours is left out."""

FORMS = ("guided_json", "json_schema", "format")
"""A schema, or `json`, as vLLM, llama.cpp and Ollama take it."""

REFUSED = {
    "grammar": "write a JSON schema in response_format",
    "guided_grammar": "write a JSON schema in response_format",
    "guided_regex": "write a JSON schema in response_format, which may have a pattern",
    "guided_choice": "write a JSON schema with enum in response_format",
    "documents": "put them into the messages",
    "chat_template": "start the server with --chat-template",
    "images": "this server reads text only",
    "image_data": "this server reads text only",
    "use_beam_search": "ask for n choices",
}
"""Without these the reply would be a wrong one."""

OFF: tuple[Any, ...] = (False, 0, "", [], {})

NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            *("audio", "options", "lora", "lora_request", "samplers"),
            *("mirostat", "dry_multiplier", "dynatemp_range", "smoothing_factor", "top_a"),
            *("xtc_special_tokens", "bad_words", "bad_words_ids", "allowed_token_ids"),
            *("logits_processors", "truncate_prompt_tokens", "prompt_logprobs", "n_probs"),
            *("include_stop_str_in_output", "return_token_ids", "return_tokens", "num_ctx"),
            *("t_max_predict_ms", "n_indent", "system", "template", "raw", "penalize_nl"),
            *("guided_whitespace_pattern", "continuous_usage_stats", "no_repeat_ngram_size"),
        ),
        OFF,
    ),
    **dict.fromkeys(("typical_p", "typical", "tfs_z", "tfs", "length_penalty"), (*OFF, 1)),
    "top_n_sigma": (*OFF, -1),
    "web_search_options": (False,),  # an empty object asks for a search
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_special_tokens": (False,),
    "verbosity": ("medium",),
}
"""Fields that are not followed, with the values that ask for nothing. The client is told."""


@dataclass(slots=True)
class Dialect:
    """How one request was read: what is to be said of it, and what its reply must look like."""

    warnings: list[tuple[str, str]] = field(default_factory=list)
    switches_thinking: bool = False
    wants_function_call: bool = False

    def followed(self, sent: Mapping[str, Any]) -> Fields:
        """The fields of a request under our own names.

        Raises `ApiError` 400 for what the reply would be wrong without.
        """
        fields = {name: value for name, value in sent.items() if value is not None}
        _refuse(fields)
        for name, own in SAME.items():
            if fields.get(name, -1) != -1:
                fields.setdefault(own, fields[name])
        _follow_form(fields)
        if "messages" in fields:
            self._follow_thinking(fields)
            self._follow_functions(fields)
            if fields.get("echo"):
                self._warn("echo", "not followed in chats.")
        for name in sorted(NOT_FOLLOWED.keys() & fields.keys()):
            if fields[name] not in NOT_FOLLOWED[name]:
                self._warn(name, "not followed by this server.")
        if fields.get("min_tokens") and fields.get("stop"):
            self._warn("min_tokens", "a stop text ends the reply before it, too.")
        return fields

    def _warn(self, name: str, sentence: str) -> None:
        self.warnings.append((name, sentence))

    def _follow_thinking(self, fields: Fields) -> None:
        """Switches go to the template as `enable_thinking`, budgets become `thinking_budget`."""
        switch = None
        for name in ("thinking", "think", "reasoning"):
            value = fields.get(name)
            if isinstance(value, bool):
                switch = value
            elif isinstance(value, str):  # Ollama's levels
                fields.setdefault("reasoning_effort", value)
            elif isinstance(value, dict):
                switch = _switch_of(value, switch)
                _take(
                    fields, "thinking_budget", value.get("budget_tokens", value.get("max_tokens"))
                )
                _take(fields, "reasoning_effort", value.get("effort"))
                if value.get("exclude"):
                    self._warn(name, "exclude is not followed; reasoning is in a field of its own.")
        if fields.get("reasoning_effort") == "none":
            switch = False
        own = fields.get("enable_thinking", switch)
        if own is not None and not isinstance(own, bool):
            raise refuse("enable_thinking must be true or false.", "enable_thinking")
        switch = own
        given = fields.get("chat_template_kwargs", {})
        if switch is not None and isinstance(given, dict):
            self.switches_thinking = True
            # DeepSeek's templates call the same switch `thinking`.
            fields["chat_template_kwargs"] = {"enable_thinking": switch, "thinking": switch} | given

    def _follow_functions(self, fields: Fields) -> None:
        """OpenAI's first form of tools, whose reply has one `function_call`."""
        functions, choice = fields.get("functions", []), fields.get("function_call")
        if fields.get("tools"):
            return
        if not isinstance(functions, list) or not all(map(_is_function, functions)):
            raise refuse("functions must be a list of objects, each with a name.", "functions")
        if not functions:
            if isinstance(choice, dict):
                raise refuse(
                    "function_call asks for a call, but there are no functions.", "function_call"
                )
            return
        self.wants_function_call = True
        fields["tools"] = [{"type": "function", "function": each} for each in functions]
        fields["parallel_tool_calls"] = False
        if isinstance(choice, dict):
            choice = {"type": "function", "function": choice}
        _take(fields, "tool_choice", choice)


def _is_function(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str)


def _take(fields: Fields, name: str, value: Any) -> None:
    if value not in (None, -1):
        fields.setdefault(name, value)


def _switch_of(value: Fields, otherwise: bool | None) -> bool | None:
    """Of Anthropic's and DeepSeek's `{"type": "enabled"}`, and OpenRouter's `{"enabled": true}`."""
    if isinstance(value.get("enabled"), bool):
        return bool(value["enabled"])
    return {"enabled": True, "disabled": False}.get(str(value.get("type")), otherwise)


def _refuse(fields: Fields) -> None:
    for name, instead in REFUSED.items():
        if fields.get(name, False) not in OFF:
            raise refuse(f"{name} is not supported: {instead}.", name)
    modalities = fields.get("modalities")
    if isinstance(modalities, list) and "audio" in modalities:
        raise refuse("This server writes text only; leave audio out of modalities.", "modalities")


def _follow_form(fields: Fields) -> None:
    """A schema under any name becomes a `response_format`, unless there is one."""
    structured = fields.get("structured_outputs")
    for name, value in structured.items() if isinstance(structured, dict) else ():
        if name == "json":
            _take(fields, "guided_json", value)
        elif name in ("regex", "choice", "grammar", "structural_tag") and value:
            raise refuse(
                f"structured_outputs.{name} is not supported: write a JSON schema in json.",
                "structured_outputs",
            )
    for name in FORMS:
        if fields.get(name, "") != "":
            fields.setdefault("response_format", _as_format(fields[name], name))
    if fields.get("guided_json_object"):
        fields.setdefault("response_format", {"type": "json_object"})


def _as_format(value: Any, name: str) -> Fields:
    if value == "json":
        return {"type": "json_object"}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise refuse(f"{name} must be a JSON schema.", name) from error
    if not isinstance(value, dict):
        raise refuse(f"{name} must be a JSON schema.", name)
    return {"type": "json_schema", "json_schema": {"name": name, "schema": value}}
