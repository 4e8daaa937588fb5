"""Prompts, what a chat template says about turns, namespaces."""

from types import SimpleNamespace

import numpy as np
import pytest
from bundled import chat, load

from mlx_hybridcache.errors import PromptError
from mlx_hybridcache.tokenizing.turn_marks import learn_turn_marks
from mlx_hybridcache.tokens import TurnMarks, prompt_tokens, settings_digest


@pytest.mark.parametrize("ids", [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3]), iter([1, 2, 3])])
def test_token_ids_come_in_any_sequence(ids):
    """Lists, tuples, arrays and iterators give the same int32 array."""
    tokens = prompt_tokens(ids, 10)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "empty"),
        ([1, 10], "Token id 10 at position 1 is outside the model's vocabulary of 10"),
        ([-1], "Token id -1 at position 0"),
        ([2**31 + 5], "Token id 2147483653 at position 0"),
        ([3, 2**40], "Token id 1099511627776 at position 1"),
        ([2**80], "list of token ids"),
        (b"\xff\xff", "Token id 255"),
        (["a"], "list of token ids"),
        ([1.5], "list of token ids"),
        ([[1, 2]], "list of token ids"),
        (None, "list of token ids"),
    ],
)
def test_a_prompt_that_cannot_be_read_says_what_is_wrong(ids, said):
    """What was found stands in the message; it is a ValueError too."""
    with pytest.raises(PromptError, match=said):
        prompt_tokens(ids, 10)


def test_a_turn_starts_just_behind_its_opener():
    """Opener 7 at 0 and 3 starts turns at 1 and 4."""
    marks = TurnMarks(frozenset({7}))
    assert marks.starts(np.array([7, 1, 2, 7, 3], dtype=np.int32)) == [1, 4]
    assert TurnMarks().starts(np.array([7, 1], dtype=np.int32)) == []


def test_a_users_turn_starts_behind_its_whole_opener():
    """[7, 8, 9] opens it: behind the 9; behind the 7 where another role, or the end, follows."""
    marks = TurnMarks(frozenset({7}), (7, 8, 9))
    tokens = np.array([1, 7, 8, 9, 4, 7, 5, 5, 7, 8], dtype=np.int32)
    assert marks.starts(tokens) == [4, 6, 9]


def test_the_opener_is_learnt_from_the_chat_template():
    """The bundled ChatML template opens turns with <|im_start|>."""
    _, tokenizer = load()
    marks = learn_turn_marks(tokenizer)
    assert marks.openers == {tokenizer.convert_tokens_to_ids("<|im_start|>")}
    prompt = np.array(chat(("system", "S"), ("user", "U")), dtype=np.int32)
    opener = tokenizer.encode("<|im_start|>user\n", add_special_tokens=False)
    assert marks.user_opener == tuple(opener)
    starts = marks.starts(prompt)
    assert len(starts) == 3
    for before, at in zip(
        ("<|im_start|>", "<|im_start|>user\n", "<|im_start|>"), starts, strict=True
    ):
        assert tokenizer.decode(prompt[:at]).endswith(before)


def test_a_reply_whose_reasoning_is_stripped_is_known():
    """Reasoning goes from past turns, unless the reply calls a tool, where it stays."""
    _, tokenizer = load()
    marks = learn_turn_marks(tokenizer)

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False)

    assert marks.strips(ids("<think>\nso\n</think>\n\nYes."))
    assert not marks.strips(ids("Yes."))
    assert not marks.strips(ids("<think>\nso\n</think>\n\n<tool_call>\n{}\n</tool_call>"))


SPECIAL = {"<A>": 1, "<U>": 2, "<E>": 3, "[H]": 4, "[/H]": 5}


class Template:
    """A tokenizer of single characters and a few special tokens, with a template of its own."""

    chat_template = "as rendered"
    all_special_ids = tuple(SPECIAL.values())

    def __init__(self, render):
        self.render = render

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        return self.render(messages, add_generation_prompt)

    def encode(self, text, add_special_tokens):
        ids = []
        while text:
            name = next((name for name in SPECIAL if text.startswith(name)), text[0])
            ids.append(SPECIAL[name] if name in SPECIAL else 100 + ord(name) % 100)
            text = text[len(name) :]
        return ids


def headers(messages, reply):
    said = "".join(f"[H]{m['role']}[/H]{m['content']}<E>" for m in messages)
    return said + ("[H]assistant[/H]" if reply else "")


def names(messages, reply):
    opener = {"user": "<U>", "assistant": "<A>"}
    closer = {"user": "", "assistant": "<E>"}
    said = "".join(opener[m["role"]] + m["content"] + closer[m["role"]] for m in messages)
    return said + ("<A>" if reply else "")


def plain(messages, reply):
    return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + ("assistant:" * reply)


def broken(messages, reply):
    raise RuntimeError("roles must alternate")


@pytest.mark.parametrize(
    ("render", "openers", "user"),
    [(headers, {4}, 6), (names, {1, 2}, 1), (plain, set(), 0), (broken, set(), 0)],
)
def test_openers_of_other_templates(render, openers, user):
    """Llama 3's headers, DeepSeek's names; no mark without special tokens or when rendering fails."""
    marks = learn_turn_marks(Template(render))
    assert marks.openers == openers
    assert len(marks.user_opener) == user


def test_no_template_gives_no_marks():
    """Neither a missing tokenizer nor one without a chat template is an error."""
    assert learn_turn_marks(None) == TurnMarks()
    assert learn_turn_marks(SimpleNamespace(chat_template=None)) == TurnMarks()


def test_settings_differ_when_any_part_does():
    """The order of the parts does not matter, their values do."""
    assert settings_digest(model="m", salt="") == settings_digest(salt="", model="m")
    assert len({settings_digest(model=m, salt=s) for m in "ab" for s in "cd"}) == 4
