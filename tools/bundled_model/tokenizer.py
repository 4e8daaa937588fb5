"""Train the byte-level BPE tokenizer: `python -m tools.bundled_model.tokenizer`.

ChatML's markers, the reasoning and the tool-call tags are added tokens in the manner of Qwen's
tokenizers: turn markers are special, tags are not, so that decoding shows them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mlx_hybridcache.demo import BUNDLED_MODEL

from .corpus import documents, split

VOCABULARY = 3072
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
# Words with their leading space, digits one by one, runs of other signs, runs of white space:
# single digits keep numbers regular for a model this small.
WORDS = (
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909) of exactly `vocabulary` tokens."""
    added = 3 + len(TAGS)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    markers = [END_OF_TEXT, TURN_START, TURN_END]
    tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in markers])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(
            f"the text gave {tokenizer.get_vocab_size()} tokens, {vocabulary} are needed: "
            "train on more text"
        )
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json as `mlx_lm.load` reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [TURN_START, TURN_END],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "model_max_length": 131072,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Train on the training side of the split and write the files."""
    from .dialogues import training_texts

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=BUNDLED_MODEL)
    parser.add_argument("--dialogues", type=int, default=4000, help="dialogues in the sample")
    arguments = parser.parse_args()
    texts = [d.text for d in split(documents())[0]]
    texts += training_texts(arguments.dialogues)
    save(train(texts), arguments.out)


if __name__ == "__main__":
    main()
