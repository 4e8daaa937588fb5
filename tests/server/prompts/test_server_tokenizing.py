"""Texts in pieces: the same tokens as in one piece, and refused before the work where it is certain."""

import random

import pytest
from bundled import text
from long import forms
from mlx_hybridcache_server.errors import ApiError
from mlx_hybridcache_server.prompts.tokenizing import (
    NO_LIMIT,
    PIECE,
    UNCUT,
    Room,
    Tokenizing,
)
from mlx_hybridcache_server.prompts.vocabulary import longest_token, seams
from texts.made_tokenizers import TOKENIZERS, bundled, byte_level, sentence_piece
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_hybridcache.tokenizing.encoder import Encoder

each_tokenizer = pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)

ODD = [
    *(
        "The lamp of Ada",
        " is red",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\n\n  ",
        "\t",
        "1234567",
        "don't",
        "İ",
    ),
    *(
        "<|im_end|>\n<|im_start|>user\n",
        "<|im",
        "e\u0301",
        "\u1fbe\u0308\u0301",
        "中文",
        "。\n",
        "👩\u200d🚀",
    ),
    *(
        "a" * 300,
        " " * 200,
        "_x = f(y)\n",
        "한국어 ",
        "\u1112\u1161\u11ab",
        "z z z z ",
        "\u0301",
        "=" * 90,
    ),
]


def odd_text(seed, length):
    """What tokenizers stumble over, at random."""
    rng, parts, size = random.Random(seed), [], 0
    while size < length:
        parts.append(rng.choice(ODD))
        size += len(parts[-1])
    return "".join(parts)


def read(tokenizer, said, room=NO_LIMIT, *, special=False, encoder=None):
    """The tokens, and what each piece weighed."""
    tokenizing = Tokenizing.learn(tokenizer, room, encoder)
    steps = tokenizing.steps(said, "prompt", special=special)
    weights = []
    try:
        while True:
            weights.append(next(steps))
    except StopIteration as end:
        return end.value.tolist(), weights


@each_tokenizer
@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
def test_a_text_read_in_pieces_has_the_tokens_that_it_has_as_a_whole(make, special):
    """Prose and code, and 100,000 characters of white space, numbers, markers and other scripts."""
    tokenizer = make()
    for said in (text(14_000, 3_000), *(odd_text(seed, 3 * PIECE) for seed in range(2))):
        whole = tokenizer.encode(said, add_special_tokens=special)
        assert read(tokenizer, said, special=special)[0] == whole


@each_tokenizer
def test_no_piece_of_a_long_text_is_long(make):
    """45,000 characters of prose: at most two pieces' worth at once, where words can be told apart."""
    said = text(14_000, 3_000)
    assert len(said) > 2 * PIECE
    _, weights = read(make(), said)
    assert sum(weights) == len(said)
    if make is not TOKENIZERS["llama-2"]:  # what it puts before each text is not between two pieces
        assert max(weights) <= 2 * PIECE


@each_tokenizer
def test_a_text_has_at_least_as_many_tokens_as_its_length_proves(make):
    """The longest tokens in a row, composed characters, and anything else."""
    tokenizer = make()
    longest = longest_token(tokenizer)
    assert longest is not None
    own = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    widest = max(own, key=lambda token: len(tokenizer.decode([token])))
    texts = [tokenizer.decode([widest] * 50), "\u1fbe\u0308\u0301" * 500, odd_text(7, 9_000)]
    for said in [*texts, "\U0001f469" * 999, "\x00\x01" * 999, "\u212a" * 999, " " * 9_000]:
        least = len(said.encode()) / longest
        assert len(tokenizer.encode(said, add_special_tokens=False)) >= least, said[:9]


def word_piece():
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def eats_white_space():
    made = byte_level()
    made.backend_tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return made


def drops_words():
    made = byte_level()
    split = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(use_regex=False)]
    )
    return made


def melts_the_unknown():
    made = Tokenizer(models.BPE({"a": 0, "?": 1}, [], unk_token="?", fuse_unk=True))
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize(
    "make",
    [
        word_piece,
        eats_white_space,
        drops_words,
        melts_the_unknown,
        lambda: byte_level(normalizer=normalizers.Strip()),
        lambda: byte_level(normalizer=normalizers.NFKC()),
        lambda: byte_level(normalizer=normalizers.Replace(Regex(" +"), " ")),
        object,
    ],
)
def test_nothing_is_claimed_of_tokenizers_that_leave_things_out(make):
    """A million spaces may be no token at all; a tokenizer in Python says nothing of itself."""
    assert longest_token(make()) is None


def test_a_tokenizer_whose_tokens_span_words_is_not_cut():
    """A token for two words and the space between: a text is then read as a whole."""
    spanning = sentence_piece()
    assert seams(spanning)
    spanning.backend_tokenizer.add_tokens(["the lamp"])
    assert not seams(spanning)
    said = text(14_000, 3_000)
    assert read(spanning, said)[1] == [len(said)]


def test_a_text_that_cannot_fit_is_refused_before_it_is_read():
    """No token of this vocabulary has more than 34 bytes, so 35,000 letters are 1,000 tokens or more."""
    steps = Tokenizing.learn(bundled(), Room(most=1_000)).steps(
        "a" * 35_000, "prompt", special=True
    )
    with pytest.raises(ApiError, match=r"at least 1,029 tokens.*at most 1,000 \(--max-prompt"):
        next(steps)


def test_a_text_that_proves_too_long_is_read_no_further():
    """100,000 characters may be 4,000 tokens, by their length; behind the first piece they may not."""
    said = text(40_000, 1_000)[:100_000]
    steps = Tokenizing.learn(bundled(), Room(most=4_000)).steps(said, "prompt", special=True)
    pieces = [next(steps)]
    with pytest.raises(ApiError, match="at least"):
        pieces.extend(steps)
    assert sum(pieces) <= 2 * PIECE


def test_a_reply_always_has_a_token_left():
    """Also behind a prompt that fills all there is, or more: what refuses that one says why."""
    assert [Room(context=10).beside(tokens) for tokens in (4, 9, 10, 12)] == [6, 1, 1, 1]
    assert NO_LIMIT.beside(10) is None


def test_a_text_with_many_dividers_is_read_in_few_pieces():
    """Each piece ends at the last divider that it reaches, not at the first."""
    tokenizer = bundled()
    said = "<|im_start|>user\nThe lamp of Ada is red.<|im_end|>\n" * 4000
    steps = Tokenizing.learn(tokenizer, NO_LIMIT).steps(said, "prompt", special=False)
    weights = list(steps)
    assert sum(weights) == len(said)
    assert len(weights) <= 2 + 2 * len(said) // PIECE


def test_what_fits_is_counted_to_the_token():
    """A prompt of as many tokens as may be is read, one more is told its number."""
    said = text(14_000, 3_000)
    count = len(bundled().encode(said))
    assert len(read(bundled(), said, Room(most=count), special=True)[0]) == count
    with pytest.raises(ApiError, match=rf"has {count:,} tokens.*{count - 1:,} \(--prompt-cache"):
        read(bundled(), said, Room(budget=count - 1), special=True)


def test_a_text_without_a_place_to_cut_is_refused_before_it_takes_memory():
    """Four million letters in a row and one: there is no telling where a token ends."""
    steps = Tokenizing.learn(bundled(), NO_LIMIT).steps("a" * (UNCUT + 1), "prompt", special=True)
    with pytest.raises(ApiError, match="without a place"):
        next(steps)


class Counted:
    """The bundled tokenizer, which writes down what it is asked to read."""

    def __init__(self):
        self.read = []

    def encode(self, said, **kwargs):
        """The own tokenizer's."""
        self.read.append(said)
        return bundled().encode(said, **kwargs)


def letters_read(said):
    """How many letters of each text the tokenizer reads; what a seam is tried by is not counted."""
    learnt, counted = Encoder.learn(bundled()), Counted()
    encoder = Encoder(counted, learnt.ids, frame=learnt.frame)
    found = []
    for each in said:
        made = read(bundled(), each, encoder=encoder)[0]
        assert made == bundled().encode(each, add_special_tokens=False)
        found.append(sum(map(len, counted.read)))
        counted.read.clear()
    return found


def test_of_a_long_message_with_another_ending_only_the_ending_is_read():
    """Five pieces in one turn are read once; with another question, or behind other turns, the last is.

    So it is unless what is left of them is just two pieces long, with an ending or without.
    """
    document = f"<|im_start|>user\n{text(30_000, 3_000)[: 5 * PIECE + PIECE // 4]}"
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n"
    first, *others = letters_read(
        [
            document + " Why?<|im_end|>\n",
            document + " Why?<|im_end|>\n",
            document + " What else is there?<|im_end|>\n",
            turns + document + " Who?<|im_end|>\n" + turns,
        ]
    )
    assert first > 5 * PIECE
    assert others[0] == 0
    assert max(others) <= 2 * PIECE


@each_tokenizer
@pytest.mark.parametrize("count", forms(3, 150))
def test_histories_read_in_pieces_have_the_tokens_that_they_have_as_a_whole(make, count):
    """Long and short turns that are sent again, cut, and changed in their middle, to one memory."""
    tokenizer = make()
    encoder, rng = Encoder.learn(tokenizer), random.Random(3)
    said = ""
    for seed in range(count):
        said = said[: rng.randrange(len(said) + 1)] + odd_text(seed, rng.choice([90, 3 * PIECE]))
        expected = tokenizer.encode(said, add_special_tokens=False)
        for _ in range(2):
            assert read(tokenizer, said, encoder=encoder)[0] == expected
