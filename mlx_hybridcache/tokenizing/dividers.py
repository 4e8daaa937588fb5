"""Where a text may be cut so that its parts have the tokens that they have in the whole.

A *divider* is an added token of a `tokenizers` tokenizer that is found in the text as it was written,
before anything is normalized or split into words. Whatever is done then is done to each stretch
between two such tokens by itself, and knows of the others only whether it stands at position 0. So the
tokens of `a` and those of `divider + b` are together those of `a + divider + b`. What must hold for
that is asked of the tokenizer's own parts, and tried on it once.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerFast

BYTE = re.compile("<0x[0-9A-F]{2}>")

MOST = 32
"""Dividers that are looked for: a template knows fewer, and Llama 3 alone has 250 that nobody uses."""

LOCAL_NORMALIZERS = frozenset(
    {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Replace", "Prepend"}
    | {"BertNormalizer", "Nmt", "Precompiled", "ByteLevel", "Sequence"}
)
"""Those that act on each stretch by itself."""

LOCAL_PRE_TOKENIZERS = frozenset(
    {"ByteLevel", "Metaspace", "Split", "Punctuation", "Digits", "Whitespace", "WhitespaceSplit"}
    | {"BertPreTokenizer", "CharDelimiterSplit", "UnicodeScripts", "Sequence"}
)
"""The same. Metaspace may treat position 0 apart, which no stretch behind a divider has."""

FRAMES = frozenset(
    {"ByteLevel", "BertProcessing", "RobertaProcessing", "TemplateProcessing", "Sequence"}
)
"""Post-processors that leave the tokens of a text as they are and put the same around every one."""

LOCAL_MODELS = frozenset({"BPE", "WordPiece", "WordLevel", "Unigram"})
"""Those whose tokens of a word are always the same."""

OPENS = frozenset(string.punctuation) - {"_"}
"""What a divider may begin with: no word for its left neighbour, and no white space to strip."""

BEFORE = ("", "a", "a ", "1\n", "e\u0301\r", " \u3042")
BEHIND = ("", "b", " b", "\u0338c", "\n\n", "\u200d\u3044")
"""What a divider is tried between: words, white space, and what would join its last letter."""

PARTS = ("normalizers", "pretokenizers", "processors")
"""Where a sequence keeps what it is made of."""

ENCODING = ("encode", "_encode_plus")
"""The methods of transformers between a text and the Rust tokenizer."""


class NotProvenError(Exception):
    """Why this tokenizer reads every text as a whole."""


def dividers(tokenizer: Any) -> dict[str, int]:
    """The dividers of a tokenizer and their ids, those that its chat template names first.

    Raises `NotProvenError` with a reason, as a sentence without its end.
    """
    backend = _backend(tokenizer)
    _check_parts(backend)
    template = str(getattr(tokenizer, "chat_template", None) or "")
    apart = sorted(_apart(backend), key=lambda each: each[0] not in template)[:MOST]
    found = {content: token for content, token in apart if _parts(backend, content, token)}
    if not found:
        raise NotProvenError("it has no added token that surely parts a text")
    return found


def pattern(contents: Iterable[str]) -> re.Pattern[str]:
    """Finds each divider. They do not overlap, so their order does not matter."""
    return re.compile("|".join(map(re.escape, contents)))


def _backend(tokenizer: Any) -> Any:
    """The Rust tokenizer, if nothing between it and a caller has a say."""
    inner = getattr(
        getattr(tokenizer, "encode", None), "__self__", None
    )  # mlx-lm's wrapper hands it on
    if not isinstance(inner, PreTrainedTokenizerFast):
        raise NotProvenError("it is not a tokenizer of the tokenizers library")
    own = type(inner)
    if any(getattr(own, each) is not getattr(PreTrainedTokenizerFast, each) for each in ENCODING):
        raise NotProvenError(f"{own.__name__} encodes in a way of its own")
    backend = inner.backend_tokenizer
    if inner.split_special_tokens:
        raise NotProvenError("it reads special tokens as text")
    if backend.truncation or backend.padding:
        raise NotProvenError("it truncates or pads")
    return backend


def _check_parts(backend: Any) -> None:
    kinds = (
        ("normalizer", set(_types(backend.normalizer)), LOCAL_NORMALIZERS),
        ("pre-tokenizer", set(_types(backend.pre_tokenizer)), LOCAL_PRE_TOKENIZERS),
        ("post-processor", set(_types(backend.post_processor)), FRAMES),
        ("model", {type(backend.model).__name__}, LOCAL_MODELS),
    )
    for what, found, known in kinds:
        if unknown := sorted(found - known):
            raise NotProvenError(
                f"its {what} {unknown[0]} is not known to treat each part by itself"
            )
    if getattr(backend.model, "dropout", None):
        raise NotProvenError("its model drops merges at random")


def _types(part: Any) -> Iterator[str]:
    """The types that a normalizer or a pre-tokenizer is made of."""
    if part is None:
        return
    try:
        states = [json.loads(part.__getstate__())]
    except Exception:  # what is written in Python cannot be saved, and says so in several ways
        yield type(part).__name__
        return
    while states:
        state = states.pop()
        pieces = [piece for piece in state.get("single", []) if "Sequence" in piece]
        yield "that repeats a text" if len(pieces) > 1 else str(state["type"])
        states += [each for parts in PARTS for each in state.get(parts, [])]


def _apart(backend: Any) -> list[tuple[str, int]]:
    """The added tokens that are taken out of the text as written, wherever they stand in it.

    One that could overlap with another is none of them: which of two is found would depend on what
    is before. Nor is one that the model itself writes for what it does not know. One that strips white
    space behind it does so in its own part, as none begins with any.
    """
    added = backend.get_added_tokens_decoder()
    contents = [token.content for token in added.values()]
    inside = {part for each in contents for part in _proper_parts(each)}
    heads = {each[:end] for each in contents for end in range(1, len(each) + 1)}
    tails = {each[start:] for each in contents for start in range(len(each))}

    def overlaps(content: str) -> bool:
        cuts = range(1, len(content))
        return content in inside or any(
            content[at:] in heads or content[:at] in tails for at in cuts
        )

    return [
        (token.content, number)
        for number, token in added.items()
        if not (token.lstrip or token.single_word or token.normalized)
        and token.content[:1] in OPENS
        and token.content == token.content.strip()
        and token.content != getattr(backend.model, "unk_token", None)
        and not BYTE.fullmatch(token.content)
        and not any(part in contents for part in _proper_parts(token.content))
        and not overlaps(token.content)
    ]


def _proper_parts(content: str) -> Iterator[str]:
    length = len(content)
    for start in range(length):
        for end in range(start + 1, length + 1):
            if end - start < length:
                yield content[start:end]


def _parts(backend: Any, content: str, token: int) -> bool:
    """Whether `token` stands for this content alone, as far as the texts show by which it is tried.

    Raises `NotProvenError` where it does not part one of them: a token may have been added again with
    other flags than those that are told, and only trying shows.
    """

    def ids(text: str) -> list[int]:
        found: list[int] = backend.encode(text, add_special_tokens=False).ids
        return found

    for before, behind in zip(BEFORE, BEHIND, strict=True):
        for left, right in ((before, behind), (behind, before)):
            part = ids(content + right)
            if ids(left + content + right) != ids(left) + part:
                raise NotProvenError(f"{content} does not part every text")
            if part.count(token) != 1:
                return False
    return True
