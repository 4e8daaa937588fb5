"""What callers hand over, made plain or refused in a sentence: keywords, prompts, positions, settings."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from os import PathLike
from typing import Any, ParamSpec, SupportsIndex, TypeVar

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import ArgumentError, PromptError, SettingError
from ..tokens import is_compact

P = ParamSpec("P")
R = TypeVar("R")

SAMPLING = ("temp", "temperature", "top_p", "top_k", "min_p", "xtc_probability", "xtc_threshold")
"""What many expect to find on `stream_generate`, and mlx-lm takes in `make_sampler`."""


LONGEST_SECONDS = 1e9
"""Beyond it something is kept as for ever."""


def known_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, which names what was meant where a keyword is none of its own."""
    parameters = inspect.signature(function).parameters
    names = [name for name in parameters if name != "self"]
    called = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        check_keywords(called, kwargs, names)
        return function(*args, **kwargs)

    return checked


def check_keywords(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raises `ArgumentError` for the first keyword that is not `known`, with the nearest that is."""
    for name in given:
        if name in known:
            continue
        meant = get_close_matches(name, known, n=1)
        if name in SAMPLING:
            said = "It is said by a sampler: sampler=mlx_lm.sample_utils.make_sampler(temp=0.7)."
        elif meant:
            said = f"Did you mean {meant[0]}?"
        else:
            said = f"It knows {', '.join(sorted(known))}."
        raise ArgumentError(f"{function} has no keyword {name!r}. {said}")


def checked_tokenizer(model: Any, tokenizer: Any) -> TokenizerWrapper | None:
    """The tokenizer as mlx-lm's own. Raises as `check_model` does."""
    check_model(model, tokenizer)
    return (
        tokenizer if isinstance(tokenizer, TokenizerWrapper | None) else TokenizerWrapper(tokenizer)
    )


def check_model(model: Any, tokenizer: Any, name: str = "model") -> None:
    """Raises `ArgumentError` for what names or wraps a model or tokenizer and is none. `name` is the argument's."""
    load = "model, tokenizer = mlx_lm.load(...)"
    if isinstance(model, (str, PathLike)):
        raise ArgumentError(f"{name} is {str(model)!r}, a name. Load it first: {load}.")
    if isinstance(model, (tuple, list)):
        raise ArgumentError(f"{name} is {_kind(model)}. Take what is in it: {load}.")
    if not (callable(model) and hasattr(model, "modules") and hasattr(model, "layers")):
        raise ArgumentError(
            f"{name} is {_kind(model)}, which is no model of mlx-lm. {load} gives one."
        )
    if isinstance(tokenizer, (str, PathLike)):
        raise ArgumentError(f"tokenizer is {str(tokenizer)!r}, a name. Load it first: {load}.")


def check_counts(**counts: object) -> None:
    """Raises `SettingError` for what is no whole number of at least one."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise SettingError(f"{name} is {count!r}; a whole number of at least 1 is needed.")


def check_functions(**given: object) -> None:
    """Raises `ArgumentError` for what is there and cannot be called."""
    for name, value in given.items():
        if not (value is None or callable(value)):
            raise ArgumentError(f"{name} is {_kind(value)}; a function is needed.")


def check_processors(given: object) -> None:
    """Raises `ArgumentError` for logits processors that are no list of functions."""
    if given is not None and (callable(given) or not isinstance(given, Iterable)):
        raise ArgumentError(f"logits_processors is {_kind(given)}; a list of functions is needed.")
    for at, each in enumerate(given if isinstance(given, list | tuple) else ()):
        check_functions(**{f"logits_processors[{at}]": each})


def check_seed(seed: object) -> None:
    """Raises `ArgumentError` for what MLX's random numbers cannot begin at."""
    if seed is None or (isinstance(seed, SupportsIndex) and 0 <= operator.index(seed) < 2**64):
        return
    said = seed if isinstance(seed, SupportsIndex) else _kind(seed)
    raise ArgumentError(f"seed is {said}; a whole number from 0 to 2**64 - 1 is needed.")


def check_text(name: str, value: object) -> None:
    """Raises `ArgumentError` for what is no text."""
    if not isinstance(value, str):
        raise ArgumentError(f"{name} is {_kind(value)}; text is needed.")


def check_whole(prompt: str) -> None:
    """Raises `PromptError` for half a surrogate pair, which no tokenizer reads."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"The prompt has half a surrogate pair at position {error.start}, which is no character."
        ) from error


def token_ids(prompt: Any) -> Iterable[int]:
    """The token ids in `prompt`: a list, an array, or what a tokenizer of transformers returns for one text.

    Raises `PromptError` for several texts at once, for padded ones, and for what holds no ids.
    """
    if isinstance(prompt, Mapping):
        if "input_ids" not in prompt:
            raise PromptError(f"The prompt is {_kind(prompt)} without input_ids. {_WANTED}")
        mask = _plain(prompt.get("attention_mask"))
        if mask is not None and not all(_flat(mask)):
            raise PromptError("The prompt is padded; tokenize it with padding=False.")
        prompt = prompt["input_ids"]
    found = _ids_as_given(prompt)
    if isinstance(found, (bytes, bytearray, memoryview)):
        raise PromptError("The prompt is bytes. Decode it: prompt.decode().")
    if not isinstance(found, Iterable):
        raise PromptError(f"The prompt is {_kind(found)}. {_WANTED}")
    if not isinstance(found, (list, tuple)) or not found:
        return found
    if isinstance(found[0], Mapping) and "role" in found[0]:
        raise PromptError(
            "The prompt is a list of messages. Render it: tokenizer.apply_chat_template(messages, "
            "add_generation_prompt=True)."
        )
    nested = isinstance(found[0], (list, tuple)) or hasattr(found[0], "tolist")
    if nested and getattr(found[0], "ndim", 1) > 0:
        if len(found) > 1:
            raise PromptError(
                f"The prompt has {len(found)} sequences; one is read at a time. Call once for each."
            )
        return token_ids(found[0])
    return found


_WANTED = "Text or a list of token ids is needed."


def _ids_as_given(value: Any) -> Any:
    """What is compact already as it is: a long prompt is made no list of."""
    return value if is_compact(value) else _plain(value)


def _plain(value: Any) -> Any:
    """Arrays of any library as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _flat(value: Any) -> Iterable[Any]:
    value = _plain(value)
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def positions(boundaries: Any, length: int, name: str = "boundaries") -> Sequence[int]:
    """Positions in a prompt of `length` tokens.

    Raises `ArgumentError` for what is no list of whole numbers, `PromptError` for one outside the prompt.
    """
    try:
        found = [operator.index(each) for each in _plain(boundaries)]
    except TypeError as error:
        raise ArgumentError(
            f"{name} is {boundaries!r}; a list of positions is needed, in tokens."
        ) from error
    for each in found:
        if not 0 <= each <= length:
            raise PromptError(
                f"{name} names position {each:,}; the prompt has {length:,} tokens. "
                "Positions are counted in tokens from its beginning, special ones too."
            )
    return found


def lifetimes_of(given: Any, length: int) -> dict[int, float]:
    """Positions in a prompt of `length` tokens with the seconds for which they are to be kept.

    The last token is read anew for each reply, so the end means the position before it. Raises `ArgumentError`
    for what maps no positions to seconds above 0, `PromptError` for one outside the prompt.
    """
    if not isinstance(given, Mapping):
        raise ArgumentError(
            f"lifetimes is {_kind(given)}; positions with seconds are needed: {{512: 300}}."
        )
    found: dict[int, float] = {}
    for at, seconds in zip(positions([*given], length, "lifetimes"), given.values(), strict=True):
        is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not (is_number and 0 < seconds < math.inf):
            raise ArgumentError(
                f"lifetimes keeps {at:,} for {seconds!r}; seconds above 0 are needed."
            )
        before = min(at, length - 1)
        found[before] = max(float(min(seconds, LONGEST_SECONDS)), found.get(before, 0.0))
    found.pop(0, None)  # nothing is needed to begin
    return found


def _kind(value: object) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
