"""What a tokenizer's vocabulary proves of any text: how few tokens it can be, and where it may be cut."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ..adapter import byte_letters

NFC_SHRINKS = 4
"""Canonical composition makes at most 7 bytes into 2 (U+1FBE U+0308 U+0301 is U+0390)."""

SEAMS = {
    r"[^\W\d_] [^\W\d_]": r"(?<=[^\W\d_])(?= [^\W\d_])",
    r"\n\S": r"(?<=\n)(?=\S)",
}
"""Where tokenizers cut anyway, between a word and the space before the next one and behind a line, by
what a token looks like that goes on from one to the other."""

BYTES = 256


def longest_token(tokenizer: Any) -> int | None:
    """Bytes of text (UTF-8) that one token stands for at most; None where nothing proves a bound.

    A text of n bytes then has n / this many tokens or more. What a tokenizer may leave out or melt
    into one token, as white space around some added tokens and unknown characters, has no bound.
    """
    backend = _backend(tokenizer)
    if backend is None or not _keeps_every_character(backend):
        return None
    shrinks = _shrinks(_state(backend.normalizer))
    if shrinks is None or not _keeps(_state(backend.pre_tokenizer)):
        return None
    added = backend.get_added_tokens_decoder()
    if any(token.lstrip or token.rstrip for token in added.values()):
        return None
    is_bytes = _is_byte_level(backend)  # where each letter of a token stands for a byte
    own = backend.get_vocab(with_added_tokens=False)
    lengths = [len(token) if is_bytes else len(token.encode()) for token in own]
    lengths += [len(token.content.encode()) for token in added.values()]
    return max([1, *lengths]) * shrinks


def seams(tokenizer: Any) -> re.Pattern[str] | None:
    """Where a text may be cut because no token goes on from there; None where that is not known."""
    backend = _backend(tokenizer)
    if backend is None or type(backend.model).__name__ != "BPE":
        return None
    texts = list(_texts(backend))
    found = [
        seam for spanning, seam in SEAMS.items() if not any(map(re.compile(spanning).search, texts))
    ]
    return re.compile("|".join(found)) if found else None


def _backend(tokenizer: Any) -> Any | None:
    """The Rust tokenizer; those that are written in Python have none."""
    return getattr(tokenizer, "backend_tokenizer", None)


def _texts(backend: Any) -> Iterator[str]:
    """Every token as the text that it stands for, as far as spaces and line ends go."""
    for token in backend.get_vocab(with_added_tokens=True):
        yield token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")


def _state(part: Any) -> dict[str, Any] | None:
    return None if part is None else json.loads(part.__getstate__())


def _shrinks(normalizer: dict[str, Any] | None) -> int | None:
    """How many bytes become one at most; None where that is not known."""
    if normalizer is None:
        return 1
    match normalizer["type"]:
        case "Sequence":
            total = 1
            for each in normalizer["normalizers"]:
                factor = _shrinks(each)
                if factor is None:
                    return None
                total *= factor
            return total
        case "NFC":
            return NFC_SHRINKS
        case "Prepend" | "NFD":
            return 1
        case "Replace":
            found, put = normalizer["pattern"].get("String", ""), normalizer["content"]
            return -(-len(found.encode()) // len(put.encode())) if found and put else None
    return None


def _keeps(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether splitting into words leaves nothing out."""
    if pre_tokenizer is None:
        return True
    match pre_tokenizer["type"]:
        case "Sequence":
            return all(_keeps(each) for each in pre_tokenizer["pretokenizers"])
        case "Split" | "Punctuation":
            return str(pre_tokenizer["behavior"]) != "Removed"
        case "ByteLevel" | "Metaspace" | "Digits":
            return True
    return False


def _keeps_every_character(backend: Any) -> bool:
    """Whether each unknown character is a token at least: spelled in bytes, or one by one."""
    model = backend.model
    if type(model).__name__ != "BPE":
        return False
    if _is_byte_level(backend) or (model.unk_token is not None and not model.fuse_unk):
        return True
    names = (f"<0x{byte:02X}>" for byte in range(BYTES))
    return bool(model.byte_fallback) and all(
        backend.token_to_id(name) is not None for name in names
    )


def _is_byte_level(backend: Any) -> bool:
    """Whether its words are spelled in letters that each stand for a byte, and it has all of them."""
    state = json.dumps([_state(backend.normalizer), _state(backend.pre_tokenizer)])
    if '"ByteLevel"' not in state:
        return False
    return byte_letters() <= set(backend.get_vocab(with_added_tokens=False))
