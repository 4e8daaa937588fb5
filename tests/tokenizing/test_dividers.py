"""Which tokens part a text, and which tokenizers are read as a whole because nothing shows it."""

import random

import pytest
from bundled import load
from texts.made_tokenizers import GPT_2, byte_level, metaspace, sentence_piece
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mlx_hybridcache.tokenizing.dividers import MOST, NotProvenError, dividers
from mlx_hybridcache.tokenizing.encoder import Encoder

FLAGS = ("lstrip", "single_word", "normalized")
TEXT = (
    "a",
    " ",
    "  ",
    "\n",
    "e",
    "\u0301",
    "\u0338",
    "<|im_end|>",
    "<x>",
    "<y>",
    "x",
    "<",
    ">",
    "中",
)


def with_token(content, made=None, **flags):
    """A tokenizer as Qwen's with one more added token."""
    made = made or byte_level(normalizer=normalizers.NFC())
    made.backend_tokenizer.add_tokens([AddedToken(content, **{"normalized": False, **flags})])
    return made


def mistakes(tokenizer, ids, count=400):
    """How many of so many texts have other tokens when they are cut at `ids` too."""
    encoder, rng, wrong = Encoder(tokenizer, ids), random.Random(5), 0
    for _ in range(count):
        said = "".join(rng.choices([*TEXT, *ids], k=rng.randrange(9)))
        for text in (said, said + "a", said):
            found = encoder.read(text, "").tolist()
            wrong += found != tokenizer.encode(text, add_special_tokens=False)
    return wrong


def test_the_bundled_models_markers_part_a_text():
    """Those of turns, of reasoning and of calls, special or not."""
    assert {"<|im_start|>", "<|im_end|>", "<think>", "<tool_call>"} <= set(dividers(load()[1]))


@pytest.mark.parametrize("flag", FLAGS)
def test_a_token_that_looks_at_its_neighbours_parts_nothing(flag):
    """It strips white space, wants a word's end, or is found in the normalized text: cut there, texts go wrong."""
    made = with_token("<x>", sentence_piece(prepends=True), **{flag: True})
    found = dividers(made)
    assert found
    assert "<x>" not in found
    assert mistakes(made, found) == 0
    assert mistakes(made, {**found, "<x>": made.backend_tokenizer.token_to_id("<x>")}) > 0


def test_a_token_that_strips_behind_itself_parts_a_text_before_it():
    """As Phi-3's: the white space goes to its own part, also before another one that strips."""
    made = with_token("<x>", with_token("<y>", rstrip=True, lstrip=True), rstrip=True)
    found = dividers(made)
    assert "<x>" in found
    assert "<y>" not in found
    assert mistakes(made, found) == 0


@pytest.mark.parametrize("other", ["<x><|im_end|>", "<x><|", "<|im_", "|>\n", "end"])
def test_tokens_that_overlap_part_nothing(other):
    """Which of two is found depends on what is before: here one begins, ends or lies in the other."""
    made = with_token(other)
    assert "<|im_end|>" not in dividers(made)
    assert mistakes(made, dividers(made)) == 0


@pytest.mark.parametrize("content", ["\n", "x", " <x>", "<x> ", "_x"])
def test_a_token_that_begins_or_ends_with_a_word_or_white_space_parts_nothing(content):
    """A neighbour that strips or wants a word's end would look at it."""
    assert content not in dividers(with_token(content))


def test_a_token_that_was_added_with_other_flags_before_is_found_out():
    """What it is told to be now is not how it is looked for."""
    made = with_token("<x>", special=True, normalized=True)
    made.backend_tokenizer.add_special_tokens([AddedToken("<x>", normalized=False)])
    found = Encoder.learn(made)
    assert found.whole or "<x>" not in found.ids or mistakes(made, found.ids) == 0


@pytest.mark.parametrize("made", [metaspace, lambda scheme: byte_level(GPT_2, prefix_space=True)])
def test_what_is_done_at_the_beginning_is_not_done_behind_a_divider(made):
    """A space goes before a text's first word; cut behind the token instead of before it, texts go wrong."""
    tokenizer = made("first")
    texts = [f"{a}<s>{b}" for a in ("", "a", " a") for b in ("", "b", " b", "<s>b")]
    encoder = Encoder.learn(tokenizer)
    for text in (*texts, *texts):
        assert encoder.read(text, "").tolist() == tokenizer.encode(text, add_special_tokens=False)


def test_a_space_before_the_first_word_is_not_put_before_a_later_one():
    """Cut behind `<s>`, "b" would be a first word."""
    tokenizer = metaspace("first")
    whole, left, right = (
        tokenizer.encode(text, add_special_tokens=False) for text in ("a<s>b", "a<s>", "b")
    )
    assert whole != left + right


def test_of_many_tokens_those_that_the_template_names_are_looked_for():
    """Llama 3 has 250 that nobody uses."""
    made = byte_level()
    made.add_tokens([AddedToken(f"<|r{n}|>", normalized=False) for n in range(100)])
    made.chat_template = "{{ '<|r77|>' }}"
    found = dividers(made)
    assert len(found) == MOST
    assert "<|r77|>" in found


class OfItsOwn(PreTrainedTokenizerFast):
    """A class that encodes in a way of its own."""

    def encode(self, text, **kwargs):
        """In pieces of a thousand letters."""
        return super().encode(text[:1_000], **kwargs)


def own_class():
    return OfItsOwn(tokenizer_object=byte_level().backend_tokenizer)


def dropping():
    made = byte_level()
    made.backend_tokenizer.model.dropout = 0.5
    return made


def truncating():
    made = byte_level()
    made.backend_tokenizer.enable_truncation(10)
    return made


def blind():
    made = byte_level()
    made.split_special_tokens = True
    return made


def fixed_length():
    made = byte_level()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.FixedLength(3)
    return made


def twice():
    made = byte_level()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A $A")
    return made


class InPython:
    """A normalizer that nobody can look into."""

    def normalize(self, normalized):
        """Whatever it does."""
        normalized.prepend("x")


def in_python():
    made = sentence_piece()
    made.backend_tokenizer.normalizer = normalizers.Normalizer.custom(InPython())
    return made


def markerless():
    return with_token("<x>", PreTrainedTokenizerFast(tokenizer_object=plain()), lstrip=True)


def plain():
    made = byte_level().backend_tokenizer
    bare = type(made)(made.model)
    bare.pre_tokenizer = made.pre_tokenizer
    return bare


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (object, "not a tokenizer of the tokenizers library"),
        (lambda: None, "not a tokenizer of the tokenizers library"),
        (own_class, "OfItsOwn encodes in a way of its own"),
        (dropping, "drops merges at random"),
        (truncating, "truncates or pads"),
        (blind, "reads special tokens as text"),
        (fixed_length, "pre-tokenizer FixedLength"),
        (twice, "post-processor that repeats a text"),
        (in_python, "normalizer"),
        (markerless, "no added token that surely parts a text"),
    ],
)
def test_where_nothing_shows_it_a_text_is_read_as_a_whole(make, why):
    """And it is said why."""
    made = make()
    with pytest.raises(NotProvenError, match=why):
        dividers(made)
    assert why in Encoder.learn(made).whole
