"""Tokenizers of every kind, made here: what published models have around a small vocabulary."""

from functools import cache

from bundled import load
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from transformers import PreTrainedTokenizerFast

GPT_2 = r"'s|'t| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SAMPLE = [
    "The lamp of Ada is red.\n\nIt stands\tnear the door, and 1234 more.   Été à Zoë's. 中文。\n"
]


def byte_level(pattern=QWEN, normalizer=None, *, prefix_space=False):
    """As GPT-2, Llama 3 and Qwen: words by a pattern, spelled in bytes."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(made, BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))


def sentence_piece(prepends=False):
    """As Gemma, or with a space before each text as Llama 2: one word, bytes for what is unknown."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence([*[normalizers.Prepend("▁")] * prepends, *steps])
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    split = pre_tokenizers.Split("▁", "merged_with_next")
    made.pre_tokenizer = split  # while it learns, so that no token spans words
    wrapped = trained(made, BpeTrainer(vocab_size=600, special_tokens=names, show_progress=False))
    wrapped.backend_tokenizer.pre_tokenizer = None
    return wrapped


def metaspace(scheme):
    """As Mistral and Llama 2 of today, which put a space before the first word of a text, or of each part."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return trained(made, BpeTrainer(vocab_size=600, special_tokens=names, show_progress=False))


def unigram():
    """As T5: the likeliest pieces, of text in compatibility form."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    names = ["<unk>"]
    trainer = UnigramTrainer(
        vocab_size=120, special_tokens=names, unk_token="<unk>", show_progress=False
    )
    return trained(made, trainer)


def word_piece():
    """As BERT."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ["[UNK]"]
    return trained(
        made, WordPieceTrainer(vocab_size=200, special_tokens=names, show_progress=False)
    )


def trained(made, trainer):
    made.train_from_iterator(SAMPLE * 3, trainer)
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


def bundled():
    _, tokenizer = load()
    return tokenizer


TOKENIZERS = {
    "bundled": bundled,
    "qwen": cache(lambda: byte_level(normalizer=normalizers.NFC())),
    "gpt-2": cache(lambda: byte_level(GPT_2)),
    "gemma": cache(sentence_piece),
    "llama-2": cache(lambda: sentence_piece(prepends=True)),
}

KINDS = {
    **TOKENIZERS,
    "llama-3": cache(lambda: byte_level(LLAMA_3)),
    "o200k": cache(lambda: byte_level(O200K)),
    "prefix-space": cache(lambda: byte_level(GPT_2, prefix_space=True)),
    "mistral": cache(lambda: metaspace("first")),
    "llama-2-hf": cache(lambda: metaspace("always")),
    "t5": cache(unigram),
    "bert": cache(word_piece),
}
"""Those, and such whose seams nobody needs to know."""
