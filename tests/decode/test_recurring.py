"""Drafts from what is stored: where they come from, what they weigh, how many are made."""

import random

import numpy as np
import oracle
import pytest
from odd_models.drafters import new_cache

from mlx_hybridcache.decode.speculate.pace import LONGEST_REST, Pace
from mlx_hybridcache.decode.speculate.passages import Passages
from mlx_hybridcache.decode.speculate.recurring import RecurringDrafter, RecurringText
from mlx_hybridcache.tokens import as_tokens

GREEDY = {"sampler": oracle.never_ending, "seed": 0}


def random_tokens(count, seed, words=50_000):
    generator = random.Random(seed)
    return [generator.randrange(words) for _ in range(count)]


def drafter_of(prompt, others=(), ahead=()):
    passages = Passages(tuple(as_tokens(each) for each in others), as_tokens(list(ahead)))
    return RecurringDrafter(as_tokens(prompt), passages)


def replayed(prompt, reply, most=8, **stored):
    """How many forwards it takes to write `reply`, when each takes what was drafted right and one more."""
    drafter, history, forwards = drafter_of(prompt, **stored), [*prompt], 0
    while len(history) < len(prompt) + len(reply):
        history.append(reply[len(history) - len(prompt)])
        for token in drafter.propose(history, most):
            if [token] != reply[len(history) - len(prompt) :][:1]:
                break
            history.append(token)
        forwards += 1
    return forwards


def test_a_file_that_is_quoted_with_edits_is_drafted_around_them():
    """400 tokens of the prompt with one changed in 40: a forward for nine, and four more for each edit."""
    file = random_tokens(400, seed=1)
    edited = [7 if at % 40 == 20 else token for at, token in enumerate(file)]
    assert replayed([*random_tokens(50, seed=2), *file, 1, 2], edited) <= 400 / 9 + 10 * 4 + 4


def test_a_reply_that_is_written_again_is_drafted_from_its_first_token_on():
    """It lies behind the prompt, whose end has a likelier continuation in the prompt itself."""
    opener = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    prompt = [*opener, *random_tokens(40, seed=1), *opener]
    reply = random_tokens(90, seed=2)
    assert replayed(prompt, reply, ahead=reply) == 10
    assert replayed(prompt, reply, others=[reply]) <= 14, (
        "another path takes three tokens to be found"
    )


def test_a_place_that_was_right_is_left_only_for_one_that_agrees_better():
    """Three tokens were the same at one place, and the next one is right: another place that came later and agrees in
    three is no better.
    """
    one, other = [11, 12, 13, 14, 15, 16], [90, 12, 13, 14, 70, 71]
    prompt = [*one, *random_tokens(20, seed=1), *other, *random_tokens(20, seed=2), 11, 12]
    drafter = drafter_of(prompt)
    assert drafter.propose([*prompt, 13], 3) == [14, 15, 16]
    assert drafter.propose([*prompt, 13, 14], 2) == [15, 16]


def test_nothing_is_drafted_where_nothing_repeats():
    prompt, reply = random_tokens(3000, seed=1), random_tokens(600, seed=2)
    assert replayed(prompt, reply) == 600


def test_what_repeats_itself_is_drafted_beyond_its_end():
    """A run of four that was written twice goes on in fours."""
    drafter = drafter_of([*random_tokens(20, seed=1), 1, 2, 3, 4, 1, 2, 3])
    assert (
        drafter.propose([*random_tokens(20, seed=1), 1, 2, 3, 4, 1, 2, 3, 4], 8) == [1, 2, 3, 4] * 2
    )


@pytest.mark.parametrize("length", [100, 5_000, 70_000])
def test_the_longest_of_the_last_places_is_found_whatever_the_text_has_grown_by(length):
    """Against a search through all of the text: what was put in at once, and token by token."""
    text = random_tokens(length, seed=3, words=length // 10)
    known = RecurringText(np.array(text[: length // 2], dtype=np.int32))
    known.extend(text[length // 2 : -40])
    for token in text[-40:]:
        known.extend([token])
    place, agreed = known.find()
    ends = [at for at in range(3, length) if text[at - 3 : at] == text[-3:]]
    assert (place in ends) if ends else (place, agreed) == (0, 0)
    assert text[place - agreed : place] == text[length - agreed :]


@pytest.mark.parametrize("length", [2_000, 10_000, 40_000, 100_000, 131_072])
def test_the_index_weighs_at_most_16_bytes_a_token(length):
    drafter = drafter_of(random_tokens(length, seed=1))
    assert drafter.nbytes <= 16 * length + 16 * 512
    history = [*random_tokens(length, seed=1)]
    for token in random_tokens(3_000, seed=2):
        history.append(token)
        drafter.propose(history, 8)
    assert drafter.nbytes <= 16 * len(history) + 16 * 512


def test_the_stored_texts_of_other_salts_are_never_drafted():
    """One wrote this reply already; another one that asks for the same is drafted nothing of it."""
    prompt = oracle.prompt(60, seed=3)
    drafted = []
    with new_cache("qwen3_next") as cache:
        for salt in ("one", "two", "one"):
            reply = cache.stream_generate(
                prompt, 40, cache_salt=salt, draft_from_cache=True, **GREEDY
            )
            list(reply)
            drafted.append(reply.report.drafted_tokens)
    assert drafted[:2] == [0, 0]
    assert drafted[2] > 30


def test_what_was_dropped_is_drafted_no_more():
    prompt = oracle.prompt(60, seed=3)
    with new_cache("qwen3_next") as cache:
        tokens = [each.token for each in cache.stream_generate(prompt, 40, **GREEDY)]
        cache.drop([*prompt, *tokens])
        reply = cache.stream_generate(prompt, 40, draft_from_cache=True, **GREEDY)
        assert [each.token for each in reply] == tokens
        assert reply.report.drafted_tokens == 0


def test_the_pace_follows_how_often_drafts_are_right():
    """Eight at a time while all are right, one at a time and ever more seldom while none is."""
    pace = Pace(8)
    for _ in range(20):
        width = pace.width()
        pace.note(width, width)
    assert pace.width() == 8
    tried = 0
    for _ in range(10_000):
        if width := pace.width():
            tried += 1
            pace.note(width, 0)
    assert tried <= 20 + 10_000 / LONGEST_REST
    for _ in range(LONGEST_REST + 20):
        if width := pace.width():
            pace.note(width, width)
    assert pace.width() > 4, "it comes back"
