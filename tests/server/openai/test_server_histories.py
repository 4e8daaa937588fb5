"""Histories as clients really send them, rendered by a lenient template, a strict one, and others."""

from __future__ import annotations

import itertools
import json
from functools import cache
from typing import Any

import bundled
import pytest
from long import forms
from mlx_hybridcache_server.errors import ApiError
from mlx_hybridcache_server.http.wire import read
from mlx_hybridcache_server.jsontext import without_halves
from mlx_hybridcache_server.prompts.abilities import Abilities
from mlx_hybridcache_server.prompts.chat import Renderer
from mlx_hybridcache_server.prompts.messages import arguments, for_template
from mlx_hybridcache_server.schema.requests import ChatBody
from mlx_lm.tokenizer_utils import TokenizerWrapper
from texts import histories, strict
from texts.histories import History, history, without_reasoning
from transformers import AutoTokenizer

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.tokenizing.turn_marks import learn_turn_marks

LOADS = {"bundled": bundled.load, "strict": strict.load}
SEEDS = range(300)


@cache
def renderer(name: str) -> Renderer:
    """A renderer of the bundled model under one of the two templates."""
    _, tokenizer = LOADS[name]()
    return Renderer(tokenizer, learn_turn_marks(tokenizer), 3072, {})


def tokens(name: str, messages: list[Any], **how: Any) -> list[int]:
    """A prompt as the server makes it of a body's bytes."""
    body = ChatBody.model_validate(read(json.dumps({"messages": messages}).encode()))
    steps = renderer(name).chat(body, **how)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value.tokens.tolist()


def text(name: str, messages: list[Any], **how: Any) -> str:
    """The same as text."""
    return str(LOADS[name]()[1].decode(tokens(name, messages, **how)))


def unopened(name: str, messages: list[Any]) -> str:
    """A prompt's text without the opener of its reply: quicker, as nothing is tokenized."""
    ready = for_template(without_halves(messages), renderer(name)._takes)
    return str(LOADS[name]()[1].apply_chat_template(ready, tokenize=False))


def said(role: str, content: Any = "x", **fields: Any) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content, **fields}


each_template = pytest.mark.parametrize("template", LOADS)
each_amount = pytest.mark.parametrize("seeds", forms(SEEDS[:60], SEEDS))

# 300 seeded histories


@cache
def seeded(seed: int) -> History:
    return history(seed)


@each_amount
@each_template
def test_every_history_renders_with_all_its_text(template: str, seeds: range) -> None:
    """All of them: nothing is refused, and every word is in the prompt, once at least."""
    for seed in seeds:
        found = seeded(seed)
        rendered = text(template, found.messages)
        missing = [word for words in found.words for word in words if word not in rendered]
        assert not missing, f"seed {seed}: {missing}"
        assert "\N{REPLACEMENT CHARACTER}" in rendered or "\\ud8" not in json.dumps(found.messages)


@each_amount
@each_template
def test_a_history_that_grows_begins_with_the_prompt_it_had(template: str, seeds: range) -> None:
    """Of every third: each time the client asks, the prompt but for its opener is how the next begins."""
    for seed in seeds[::3]:
        found = seeded(seed)
        messages = [without_reasoning(message) for message in found.messages]
        before = ""
        for count in found.questions():
            asked = unopened(template, messages[:count])
            assert asked.startswith(before), f"seed {seed}, {count} messages"
            before = asked


@each_template
def test_a_history_that_grows_stays_hot(template: str) -> None:
    """Five histories, reasoning and all, against a real cache: what is restored is counted.

    It is the whole prompt before, but for its opener; where the template has meanwhile taken the
    reasoning out of a finished turn, the last prompt that this one still begins with. Below 64 tokens
    nothing is stored.
    """
    model, tokenizer = LOADS[template]()
    grown = whole = 0
    sizes = ((seed, len(json.dumps(seeded(seed).messages))) for seed in SEEDS)
    short = itertools.islice((seed for seed, size in sizes if size < 2_500), 5)
    with HybridPromptCache(model, tokenizer, memory_budget="400MB", checkpoint_min_step=1) as cache:
        for seed in short:
            asked: list[list[int]] = []
            for count in seeded(seed).questions():
                messages = seeded(seed).messages[:count]
                prompt = tokens(template, messages)
                warming = cache.warm(prompt, cache_salt=str(seed))
                list(warming)
                assert warming.report is not None
                begun = [each for each in asked if prompt[: len(each)] == each]
                if begun and len(begun[-1]) >= 64:
                    assert warming.report.restored_tokens >= len(begun[-1]) - 1, f"seed {seed}"
                    grown, whole = grown + 1, whole + (begun[-1] is asked[-1])
                asked.append(tokens(template, messages, opens_reply=False))
    assert whole > grown * 2 / 3 > 5


def test_the_histories_are_what_they_say() -> None:
    """Of 300 each oddity is in twenty at least."""
    written = [json.dumps(seeded(seed).messages) for seed in SEEDS]
    roles = [{message["role"] for message in seeded(seed).messages} for seed in SEEDS]
    for role in ("developer", "function", "critic", "system", "tool"):
        assert sum(role in each for each in roles) >= 20, role
    for sign in ('"arguments": ""', '"null"', '"arguments": null', '"[]"', "image_url", "thinking"):
        assert sum(sign in each for each in written) >= 20, sign
    assert histories.history(7) == histories.history(7)


# Instances

HELLO = said("user", "Hello")
ENDS = {
    "bundled": "<|im_end|>\n<|im_start|>assistant\n",
    "strict": "<|im_end|>\n<|im_start|>assistant\n<think>\n",
}


@each_template
@pytest.mark.parametrize("second", ["system", "developer"])
def test_what_comes_first_is_one_system_message(template: str, second: str) -> None:
    """Two of them, the one from a developer or not."""
    messages = [said("system", "Be brief."), said(second, [{"text": "Be kind."}]), HELLO]
    begins = "<|im_start|>system\nBe brief.\n\nBe kind.<|im_end|>\n<|im_start|>user\nHello"
    assert text(template, messages) == begins + ENDS[template]


@each_template
@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_late_system_message_is_a_turn_in_its_place(template: str, role: str) -> None:
    """The user's, with a mark, where the template has no place for it."""
    messages = [HELLO, said("assistant", "Yes?"), HELLO, said(role, "Be kind.")]
    late = {
        "bundled": "<|im_start|>system\nBe kind.",
        "strict": "<|im_start|>user\n<system>\nBe kind.\n</system>",
    }[template]
    assert text(template, messages) == unopened(template, messages[:3]) + late + ENDS[template]


@each_template
def test_a_function_s_result_is_a_tool_s(template: str) -> None:
    """OpenAI's older form of a call and its result is rendered as the newer one."""
    call = {"name": "f", "arguments": '{"a": "b"}'}
    older = [HELLO, said("assistant", None, function_call=call), said("function", "4", name="f")]
    newer = [
        HELLO,
        said("assistant", "", tool_calls=[{"id": "1", "type": "function", "function": call}]),
        said("tool", "4", tool_call_id="1"),
    ]
    assert text(template, older) == text(template, newer)


def test_a_conversation_that_no_user_begins_renders() -> None:
    """A system message alone, a greeting: with an empty question, which stays when it goes on."""
    alone = [said("system", "Be brief.")]
    empty = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert text("strict", alone) == empty + ENDS["strict"]
    assert text("strict", [*alone, said("assistant", "Yes?"), HELLO]).startswith(empty)
    assert text("bundled", alone) == "<|im_start|>system\nBe brief." + ENDS["bundled"]


@pytest.mark.parametrize(
    ("given", "read_as"),
    [
        *[(empty, {}) for empty in ("", " ", "null", None, "[]", "{}", [], '""', '"null"')],
        ('{"a": 9007199254740993}', {"a": 2**53 + 1}),
        ({"a": [None]}, {"a": [None]}),
        (json.dumps(json.dumps({"a": "null"})), {"a": "null"}),
        ('{"a": "b', {"arguments": '{"a": "b'}),
        ("Oslo", {"arguments": "Oslo"}),
        ('"Oslo"', {"arguments": "Oslo"}),
        ("[1, 2]", {"arguments": [1, 2]}),
        ("0", {"arguments": 0}),
        ('{"a": "\\ud800"}', {"a": "\N{REPLACEMENT CHARACTER}"}),
        ("[" * 5000, {"arguments": "[" * 5000}),
        ("[" * 101 + "]" * 101, {"arguments": "[" * 101 + "]" * 101}),
        ("9" * 5000, {"arguments": "9" * 5000}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_past_arguments_are_an_object(given: Any, read_as: dict[str, Any]) -> None:
    """What is none is kept under a key; exact integers, the word null and text stay what they are."""
    assert arguments(given) == read_as


@each_template
@pytest.mark.parametrize("role", ["system", "assistant", "tool", "user"])
def test_what_is_no_text_leaves_a_sentence_in_a_history(template: str, role: str) -> None:
    """An image in an old result or an old question; nothing is fetched."""
    image = {"type": "image_url", "image_url": {"url": "http://localhost:1/x.png"}}
    old = said(role, [image, {"type": "text", "text": "Look."}])
    rendered = text(template, [HELLO, old, said("assistant", "Yes?"), HELLO])
    assert "'image_url'; this server reads text only.]Look." in rendered
    assert "localhost" not in rendered


@each_template
@pytest.mark.parametrize("part", [{"type": "image_url"}, {"type": "thinking", "text": "x"}, {}, 5])
def test_what_is_no_text_is_refused_in_the_question_to_be_answered(
    template: str, part: Any
) -> None:
    """In each user message behind the last reply, and only there."""
    odd = said("user", [part])
    for behind in ([], [HELLO], [said("tool", [part])], [said("system", [part])]):
        with pytest.raises(ApiError, match="cannot be read"):
            tokens(template, [HELLO, said("assistant"), odd, *behind])
    assert tokens(template, [HELLO, said("assistant"), HELLO, said("tool", [part])])


@each_template
def test_thoughts_among_the_parts_of_a_reply_are_reasoning(template: str) -> None:
    """Of an open turn they are rendered as such."""
    thought = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "So:"}]
    call = {"function": {"name": "f", "arguments": "{}"}}
    rendered = text(template, [HELLO, said("assistant", thought, tool_calls=[call]), said("tool")])
    assert "<think>\nhm\n</think>\n\nSo:" in rendered


# Templates of other kinds

ALTERNATING = """
{%- for message in messages -%}
  {%- if message.role not in ('user', 'assistant') or (message.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('Conversation roles must alternate user/assistant.') -}}
  {%- endif -%}
  {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endfor -%}
"""
"""As Gemma 2's: no system message, no tools, nothing but taking turns."""

NINE_LETTERS = """
{%- for message in messages -%}
  {%- for call in message.tool_calls or [] -%}
    {%- if call.id | length != 9 or message.tool_calls | length > 1 -%}
      {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}
    {%- endif -%}
    {{- call.id + call.function.name + call.function.arguments | tojson -}}
  {%- endfor -%}
  {{- message.tool_call_id + ':' if message.role == 'tool' -}}
  {{- message.content + '<|im_end|>\n' -}}
{%- endfor -%}
"""
"""As Mistral's, of the ids; and as Llama's, of a single call in a message."""


def of_template(template: str) -> tuple[Any, Abilities]:
    """A tokenizer with this template, and what it takes."""
    tokenizer = TokenizerWrapper(AutoTokenizer.from_pretrained(BUNDLED_MODEL))
    tokenizer.chat_template = template
    return tokenizer, Renderer(tokenizer, learn_turn_marks(None), 3072, {})._takes


def test_what_a_template_takes_is_learnt_by_asking_it() -> None:
    """Nothing is known by name."""
    assert renderer("bundled")._takes == Abilities()
    assert renderer("strict")._takes == Abilities(
        late_system=False, other_roles=False, no_question=False
    )
    assert of_template("{{ raise_exception('never') }}")[1] == Abilities()
    assert of_template(NINE_LETTERS)[1] == Abilities(any_id=False, several_calls=False)


@pytest.mark.parametrize("template", [ALTERNATING, NINE_LETTERS], ids=["alternating", "ids"])
@pytest.mark.parametrize("seeds", forms(SEEDS[:20], SEEDS[:100]))
def test_other_templates_render_every_history_too(template: str, seeds: range) -> None:
    """Every word of the seeded ones."""
    tokenizer, takes = of_template(template)
    for seed in seeds:
        found = seeded(seed)
        ready = for_template(without_halves(found.messages), takes)
        rendered = tokenizer.apply_chat_template(ready, tokenize=False)
        missing = [word for words in found.words for word in words if word not in rendered]
        assert not missing, f"seed {seed}: {missing}"


def test_calls_and_results_keep_their_ids_apart() -> None:
    """Where a template takes nine letters only, the same id becomes the same nine."""
    tokenizer, takes = of_template(NINE_LETTERS)
    calls = [{"id": f"call_{at}", "function": {"name": "f", "arguments": ""}} for at in (1, 2)]
    results = [said("tool", f"result{at}", tool_call_id=f"call_{at}") for at in (2, 1)]
    asked = for_template([HELLO, said("assistant", tool_calls=calls), *results], takes)
    ids = [call["id"] for turn in asked for call in turn.get("tool_calls", ())]
    assert [turn["tool_call_id"] for turn in asked if turn["role"] == "tool"] == ids[::-1]
    assert len(set(ids)) == 2
    assert tokenizer.apply_chat_template(asked, tokenize=False).count(ids[0]) == 2
