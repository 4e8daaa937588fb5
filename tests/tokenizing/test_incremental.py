"""A text that begins, or goes on, like one that was read before has the tokens it has as a whole."""

import random

import pytest
from bundled import load
from hypothesis import given, settings
from hypothesis import strategies as st
from long import forms
from texts.made_tokenizers import KINDS

from mlx_hybridcache.tokenizing.encoder import Encoder

MARKERS = ("<|im_start|>", "<|im_end|>", "<s>")
ODD = (
    *("The lamp of Ada", " is red.", " ", "  ", "\n", "\n\n", "\r\n", "\t", "1234567", "don't"),
    *("e\u0301", "\u0301", "\u0338", "\u200d", "\u1fbe\u0308\u0301", "中文", "。\n", "👩\u200d🚀"),
    *(
        "<",
        "<|im_",
        "|>",
        "<s",
        "s>",
        "<<s>>",
        "\uff1cs\uff1e",
        "▁",
        "Ġ",
        "\u00a0",
        "\u3000",
        "\x00",
        "İ",
    ),
)
each_kind = pytest.mark.parametrize("kind", KINDS)


def whole(tokenizer, text):
    """What the tokenizer alone makes of a text."""
    return tokenizer.encode(text, add_special_tokens=False)


def odd_text(rng, most=12):
    """Markers between what tokenizers stumble over."""
    return "".join(
        rng.choice(MARKERS if rng.random() < 0.4 else ODD) for _ in range(rng.randrange(most))
    )


def odd_history(rng):
    """Texts in the order in which a client would send them: longer, cut, edited, repeated."""
    text = odd_text(rng)
    for _ in range(4):
        yield text
        at = rng.randrange(len(text) + 1)
        match rng.randrange(4):
            case 0:
                text += odd_text(rng, 6)
            case 1:
                text = text[:at]
            case 2:
                text = text[:at] + odd_text(rng, 4) + text[at:]
            case _:
                text = text[at:]


@each_kind
@pytest.mark.parametrize("count", forms(120, 5_000))
def test_seeded_histories_have_the_tokens_of_a_full_reading(kind, count):
    """120 histories of four texts for each tokenizer; the long form reads 20,000 texts with each."""
    tokenizer = KINDS[kind]()
    encoder = Encoder.learn(tokenizer)
    assert encoder.whole is None
    for seed in range(count):
        for text in odd_history(random.Random(seed)):
            assert encoder.read(text, "").tolist() == whole(tokenizer, text), (seed, text)
    assert len(encoder.remembered) > count


@each_kind
@settings(max_examples=30, deadline=None)
@given(
    parts=st.lists(
        st.one_of(st.sampled_from(MARKERS), st.sampled_from(ODD), st.text(max_size=4)), max_size=9
    ),
    at=st.integers(0, 9),
)
def test_any_text_has_the_tokens_of_a_full_reading(kind, parts, at):
    """Its beginning is read first, then all of it, then all of it again."""
    tokenizer = KINDS[kind]()
    encoder = Encoder.learn(tokenizer)
    for text in ("".join(parts[:at]), "".join(parts), "".join(parts)):
        assert encoder.read(text, "").tolist() == whole(tokenizer, text)


@each_kind
def test_what_opens_and_closes_a_text_is_put_around_it_once(kind):
    """Also around an empty one, and one that was read before."""
    tokenizer = KINDS[kind]()
    encoder = Encoder.learn(tokenizer)
    for text in ("", "The lamp", "<s>The lamp<|im_end|>", "<s>The lamp<|im_end|> of Ada"):
        for special in (True, False):
            expected = tokenizer.encode(text, add_special_tokens=special)
            assert list(encoder.prompt(text, "", special=special)) == expected


class Counted:
    """The bundled tokenizer, which writes down what it is asked to read."""

    def __init__(self):
        _, self.own = load()
        self.read = []

    def encode(self, text, **kwargs):
        """The own tokenizer's."""
        self.read.append(text)
        return self.own.encode(text, **kwargs)


def counted():
    """An encoder and the texts that its tokenizer reads from now on."""
    learnt, tokenizer = Encoder.learn(load()[1]), Counted()
    return Encoder(tokenizer, learnt.ids, frame=learnt.frame), tokenizer.read


def chat(*turns):
    """A conversation as a template renders it."""
    return "".join(f"<|im_start|>user\n{turn}<|im_end|>\n" for turn in turns)


def test_only_what_is_new_is_read():
    """Of a conversation that goes on the last turn, of one with an edit in its middle that turn, of one that is
    repeated or cut nothing.
    """
    encoder, read = counted()
    for text, new in (
        (chat("a", "b", "c"), chat("a", "b", "c")),
        (chat("a", "b", "c"), None),
        (chat("a", "b"), None),
        (chat("a", "b", "c", "d"), "<|im_start|>user\nd"),
        (chat("a", "x", "c", "d"), "<|im_start|>user\nx"),
    ):
        encoder.read(text, "")
        assert read == ([] if new is None else [new])
        read.clear()


def test_what_is_known_between_two_new_turns_does_not_part_them():
    """The end of a turn is known from the first one on; three new turns are read in one call nevertheless."""
    encoder, read = counted()
    encoder.read(chat("a"), "")
    read.clear()
    encoder.read(chat("p", "q", "r"), "")
    assert read == [chat("p", "q", "r").removesuffix("<|im_end|>\n")]


def test_a_salt_learns_nothing_of_another():
    """The same text is read once for each."""
    encoder, read = counted()
    for salt in ("", "a", "b", "a"):
        encoder.read(chat("a"), salt)
    assert len(read) == 3


def test_what_is_told_is_never_changed_by_its_reader():
    """A caller writes into the tokens it got; the next one gets them as they were."""
    encoder, _ = counted()
    first = encoder.read(chat("a"), "")
    expected = first.tolist()
    for _ in range(2):
        found = encoder.read(chat("a"), "")
        assert found.tolist() == expected
        found[:] = 0
