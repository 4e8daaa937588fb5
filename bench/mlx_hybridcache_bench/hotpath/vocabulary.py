"""Tokenizers of two sizes: the bundled model's 3,072 entries, and 150,000 as in models that people use."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
import sysconfig
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.errors import SettingError

BUNDLED, QWEN, TRAINED = "bundled", "qwen", "trained"
VOCABULARIES = (BUNDLED, QWEN, TRAINED)

ENTRIES = 150_000
TEXT = 2**26
"""Characters that a vocabulary is trained on, if there are as many."""

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizer splits text into words, from its own package."""


def write_tokenizer(vocabulary: str, directory: Path) -> int:
    """The files of one of `VOCABULARIES`, with the bundled chat template; how many entries it has.

    Raises `SettingError` where Qwen's is not installed.
    """
    for name in FILES:
        shutil.copyfile(BUNDLED_MODEL / name, directory / name)
    file = directory / FILES[0]
    if vocabulary != BUNDLED:
        made = _qwen() if vocabulary == QWEN else _trained()
        made.add_tokens(_markers())
        made.save(str(file))
    entries: int = Tokenizer.from_file(str(file)).get_vocab_size()
    return entries


def _markers() -> list[AddedToken]:
    """What the chat template writes, which every vocabulary has."""
    told = json.loads((BUNDLED_MODEL / FILES[0]).read_text(encoding="utf-8"))
    return [
        AddedToken(each["content"], special=each["special"], normalized=False)
        for each in told["added_tokens"]
    ]


def _trained() -> Any:
    """On the Python sources that are installed, words split as the bundled tokenizer does."""
    made: Any = Tokenizer(BPE())
    bundled: Any = Tokenizer.from_file(str(BUNDLED_MODEL / FILES[0]))
    made.pre_tokenizer, made.decoder = bundled.pre_tokenizer, bundled.decoder
    trainer = BpeTrainer(
        vocab_size=ENTRIES,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_installed(TEXT), trainer)
    return made


def _installed(characters: int) -> Iterator[str]:
    """About so many characters of Python sources: the standard library alone has 50,000 entries' worth."""
    for folder in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_path(folder)).rglob("*.py")):
            if characters <= 0:
                return
            text = path.read_text(encoding="utf-8", errors="replace")
            yield text
            characters -= len(text)


def _qwen() -> Any:
    """Qwen's, of the ranks that its package `dashscope` carries."""
    found = importlib.util.find_spec("dashscope")
    if found is None or found.origin is None:
        raise SettingError(
            "Qwen's vocabulary comes with the package dashscope, which is not installed: "
            f"`pip install dashscope`, or --vocabulary {TRAINED} for one of that size made here."
        )
    ranks = Path(found.origin).parent / "resources" / "qwen.tiktoken"
    return byte_level(ranks_of(ranks.read_bytes()), QWEN_WORDS)


def ranks_of(content: bytes) -> dict[bytes, int]:
    """A file of tiktoken's: a token in base64 and its rank in each line."""
    lines = (line.split() for line in content.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def byte_level(ranks: dict[bytes, int], words: str) -> Any:
    """A byte-level BPE with these ranks, for text that `words` splits and that is normalized as NFC.

    transformers converts such files too, by way of tiktoken, which nothing else here needs.
    """
    letters = _letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[each] for each in token)

    pairs = (merge_of(token, ranks) for token in sorted(ranks, key=ranks.__getitem__))
    merges = [(spelled(a), spelled(b)) for a, b in filter(None, pairs)]
    made: Any = Tokenizer(BPE({spelled(token): rank for token, rank in ranks.items()}, merges))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made


def merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that it is merged of: what is left of its bytes when all lower ranks have merged."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        at = min(range(len(joined)), key=joined.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _letters() -> dict[int, str]:
    """The letter that stands for each byte, as GPT-2 numbered them: itself where it can be seen."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [each for each in range(256) if each not in seen]
    return {**{each: chr(each) for each in seen}, **{b: chr(256 + n) for n, b in enumerate(others)}}
