"""Turn starts and what a history keeps of a reply, learnt from chat templates of every build."""

import copy
from itertools import chain, repeat

import mlx.core as mx
import numpy as np
import pytest
from bundled import load
from long import mostly_long
from templates import learnt, page
from templates.structures import STRUCTURES

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.tokenizing.turn_marks import learn_turn_marks
from mlx_hybridcache.tokens import TurnMarks

KNOWN = {each.name: each for each in page.load() if not each.source}
ALWAYS = (
    "Qwen3",
    "Qwen3, reasoning by field",
    "GPT-OSS (harmony)",
    "DeepSeek V3.1",
    "GLM 4.5",
    "Command A",
    "Alpaca",
    "Phi 3",
)


@pytest.mark.parametrize("name", mostly_long(STRUCTURES, ALWAYS))
def test_a_template_is_what_the_table_says(name):
    """Its openers, what is kept of replies, and the tokens that a next turn restores."""
    assert learnt.learn(name, STRUCTURES[name]).told() == KNOWN[name].told()


def test_the_page_says_what_was_found():
    """Its table is made from the records, and has each template that is written here."""
    assert page.said(page.PAGE.read_text()) == page.table(page.load())
    assert [*KNOWN] == [*STRUCTURES]


@pytest.mark.parametrize("record", page.load(), ids=lambda each: f"{each.name} {each.source}")
def test_a_reply_is_kept_where_the_next_turn_has_it(record):
    """What is said of each reply agrees with what the template renders; the first and the last turn have openers."""
    assert record.openers
    for way, (shared, history, restored) in record.turns.items():
        assert record.kept[way] == (shared >= history - 1), way
        assert restored <= shared + 1


@pytest.mark.parametrize("name", ALWAYS)
def test_a_turn_starts_behind_each_opener(name):
    """Of a conversation of three questions: those of users, and where the prompt ends."""
    talk = learnt.Talk(STRUCTURES[name])
    prompt = talk.ids(talk.prompt("Is it red?", "The lamp is.", "And near?", "It is.", "More?"))
    starts = talk.marks.starts(np.array(prompt, dtype=np.int32))
    behind = [talk.tokenizer.decode(prompt[at:]) for at in starts]
    for question in ("Is it red?", "And near?", "More?"):
        assert any(text.lstrip().startswith(question) for text in behind), (question, behind)


def test_a_phrase_opens_a_turn():
    """[8, 9] is one: behind each of them, and not behind an 8 alone."""
    marks = TurnMarks(phrases=((8, 9),))
    assert marks.starts(np.array([8, 9, 1, 8, 2, 8, 9], dtype=np.int32)) == [2, 7]


def test_a_reply_must_open_as_the_history_does():
    """Behind opener 7 the model writes [5, 6] itself; what opens with anything else, or twice, is rendered anew."""
    marks = TurnMarks(frozenset({7}), reply_opener=(7, 5, 6), written=(5, 6))
    prompt = np.array([7, 1, 7], dtype=np.int32)
    assert not marks.strips([5, 6, 2], prompt)
    assert marks.strips([4, 2], prompt)
    assert marks.strips([5, 6, 2, 7, 3], prompt)
    assert not marks.strips([6, 2], np.array([7, 5], dtype=np.int32)), (
        "the prompt has its beginning"
    )


def test_reasoning_that_the_prompt_has_closed_stays_where_past_replies_open_so():
    """9 closes it. An empty block [8, 9] behind the opener is kept only where the history has it too."""
    prompt = np.array([1, 7, 8, 9], dtype=np.int32)
    assert TurnMarks(frozenset({7}), reply_opener=(7,), thinking_end=(9,)).strips([2], prompt)
    assert not TurnMarks(
        frozenset({7}), reply_opener=(7, 8, 9), thinking_end=(9,), strips_thinking=True
    ).strips([2], prompt)


def test_a_reply_that_ends_otherwise_than_the_history_is_known():
    """Of the ends 3 and 4 the history has 3."""
    marks = TurnMarks(other_ends=frozenset({4}))
    assert marks.ends_otherwise([1, 4])
    assert not marks.ends_otherwise([1, 3])
    assert not marks.ends_otherwise([])


@pytest.mark.parametrize(("name", "is_kept"), [("ChatML", True), ("GPT-OSS (harmony)", False)])
def test_no_checkpoint_is_spent_on_an_end_that_no_history_has(name, is_kept):
    """Behind <|im_end|> there is one; none behind <|return|>, where a history has <|end|>."""
    talk = learnt.Talk(STRUCTURES[name])
    _, prompt, reply, _ = next(talk.ways())
    end = talk.tokenizer.eos_token_id
    with HybridPromptCache(
        learnt.model(), talk.tokenizer, memory_budget="50MB", memory_reserve=0
    ) as cache:
        drawn = chain(reply, repeat(end))
        for _ in cache.stream_generate(prompt, 99, sampler=lambda _: mx.array([next(drawn)])):
            pass
        found = cache.lookup([*prompt, *reply, end, 1])
    assert (found.restored_tokens > len(prompt)) == is_kept


def test_a_space_before_a_reply_melts_into_it():
    """Jamba's prompts end with a space, which a vocabulary of words has in the reply's first token."""
    tokenizer = copy.deepcopy(load()[1])
    tokenizer.chat_template = STRUCTURES["Jamba"]
    marks = learn_turn_marks(tokenizer)
    assert marks.melts
    marks = TurnMarks(frozenset({7}), melts=(7, 5))
    assert marks.strips([2], np.array([1, 7, 5], dtype=np.int32))
    assert not marks.strips([2], np.array([1, 7], dtype=np.int32))
