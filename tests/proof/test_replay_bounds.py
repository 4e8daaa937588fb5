"""How much is replayed when a prompt changes as people's prompts do: counts on the bundled model."""

import mlx.core as mx
import pytest
from bundled import chat, load, text, text_tokens

from mlx_hybridcache import HybridPromptCache, Reason
from mlx_hybridcache.demo import workloads

STEP = 2048


@pytest.fixture(scope="module")
def warm():
    """A cache that has read the demo's document once: one long user message and raw text."""
    model, tokenizer = load()
    with HybridPromptCache(model, tokenizer, memory_budget="1GB") as cache:
        cache.prefill(DOCUMENT).release()
        cache.prefill(RAW).release()
        yield cache


IM_START = load()[1].convert_tokens_to_ids("<|im_start|>")
ENDING = "What is this text about?"
DOCUMENT = chat(("user", text(4096) + "\n\n" + ENDING))
RAW = list(text_tokens(4096))


def replayed_of_shared(report):
    """Tokens read again although they were stored."""
    return report.matched_tokens - report.restored_tokens


def test_an_exact_repeat_replays_one_token(warm):
    """4,113 tokens: everything but the last is restored, for chat and for raw text."""
    for prompt in (DOCUMENT, RAW):
        report = warm.lookup(prompt)
        assert report.reason is Reason.EXACT
        assert report.replayed_tokens == 1


def test_a_next_turn_behind_the_reply_replays_only_what_is_new():
    """The reply as it was generated, of which the template strips nothing, then a question: the state at its end is
    restored. Six tokens close no reasoning; behind an empty block of it the history would be another one.
    """
    model, tokenizer = load()
    with HybridPromptCache(model, tokenizer, memory_budget="1GB") as cache:
        first = chat(("user", text(600)))
        reply = [r.token for r in cache.stream_generate(first, 6)]
        assert cache.last_report.reason is Reason.COLD
        said = tokenizer.encode("\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n")
        following = [*first, *reply, *said]
        report = cache.lookup(following)
        assert report.restored_tokens == len(first) + len(reply)
        assert report.replayed_tokens == len(said)


def test_with_reasoning_stripped_only_the_reply_and_the_new_turn_are_replayed():
    """The history renders without what was thought; the cut at the reply's opener is restored."""
    model, tokenizer = load()
    with HybridPromptCache(model, tokenizer, memory_budget="1GB") as cache:
        question = ("user", text(600))
        first = chat(question)
        thought = tokenizer.encode("<think>\nIt is about Python.\n</think>\n\nPython.<|im_end|>")
        ready = cache.prefill(first)
        for token in [*ready.rest, *thought]:
            model(mx.array([[token]]), cache=ready.prompt_cache)
        following = chat(question, ("assistant", "Python."), ("user", "Why?"))
        opener = max(i for i, t in enumerate(first) if t == IM_START) + 1
        report = cache.lookup(following)
        assert report.restored_tokens >= opener
        assert report.replayed_tokens <= len(following) - opener


@pytest.mark.parametrize("distance", [1, 10, 40, 63])
def test_an_ending_changed_within_64_tokens(warm, distance):
    """At most 64 + d of the shared part are read again."""
    changed = [*RAW[: len(RAW) - distance], *text_tokens(distance, 9000)]
    assert replayed_of_shared(warm.lookup(changed)) <= 64 + distance


@pytest.mark.parametrize("distance", [64, 200, 511])
def test_an_ending_changed_within_512_tokens(warm, distance):
    """At most 512 + d of the shared part are read again."""
    changed = [*RAW[: len(RAW) - distance], *text_tokens(distance, 9000)]
    assert replayed_of_shared(warm.lookup(changed)) <= 512 + distance


@pytest.mark.parametrize("distance", [513, 1500, 3000])
def test_an_ending_changed_further_back_costs_at_most_a_stride(warm, distance):
    """Grid cuts are at most a step apart."""
    changed = [*RAW[: len(RAW) - distance], *text_tokens(distance, 9000)]
    assert replayed_of_shared(warm.lookup(changed)) <= STEP


@pytest.mark.parametrize("length", [3596, 2049, 600, 100])
def test_a_shorter_prompt_replays_at_most_a_stride(warm, length):
    """Raw text cut short, all of it known."""
    assert warm.lookup(RAW[:length]).replayed_tokens <= STEP


def test_longer_raw_text_replays_what_is_new_and_one_token(warm):
    """4,596 tokens behind 4,096 known ones: restored at 4,095."""
    longer = list(text_tokens(4596))
    assert warm.lookup(longer).replayed_tokens <= 501


def test_the_second_request_of_a_family_replays_only_its_own_ending():
    """Endings A, B, C behind one document: C resumes exactly where B parted from A."""
    model, tokenizer = load()
    with HybridPromptCache(model, tokenizer, memory_budget="1GB") as cache:
        shared = list(text_tokens(1300))
        a, b, c = (shared + list(text_tokens(200, 5000 + 300 * i)) for i in range(3))
        assert len({a[1300], b[1300], c[1300]}) == 3
        cache.prefill(a).release()
        second = cache.prefill(b)
        assert replayed_of_shared(second.report) <= 512 + 200
        second.release()
        third = cache.lookup(c)
        assert third.restored_tokens == 1300
        assert third.replayed_tokens == 200


def test_a_changed_last_line_of_a_long_system_prompt():
    """1.5K tokens of system prompt: 1,024 re-used the first time, all but the line the second."""
    model, tokenizer = load()
    rules = text(1500, 5000)

    def asked(day):
        return chat(
            ("system", f"{rules}\n\nToday is {day}."),
            ("user", text(1200)),
            ("assistant", "I have read it."),
            ("user", "Name one rule."),
        )

    with HybridPromptCache(model, tokenizer, memory_budget="1GB") as cache:
        cache.prefill(asked("Monday")).release()
        second = cache.prefill(asked("Tuesday"))
        assert second.report.restored_tokens >= 1024
        second.release()
        third = cache.prefill(asked("Friday"))
        assert third.report.restored_tokens >= third.report.matched_tokens
        third.release()


def prompt_of(call):
    """A chat's tokens, or raw text."""
    if isinstance(call.prompt, str):
        return call.prompt
    return chat(*((message["role"], message["content"]) for message in call.prompt))


def test_the_demos_own_calls_are_hot():
    """Every call of the demo that follows a like one restores what its bound says."""
    model, tokenizer = load()
    calls = workloads.calls(tokenizer, workloads.default_text(), 1500)
    restored = {}
    with HybridPromptCache(model, tokenizer, memory_budget="1GB") as cache:
        for call in calls:
            ready = cache.prefill(prompt_of(call))
            restored[call.name] = ready.report.replayed_tokens
            ready.release()
    assert restored["the same again"] == 1
    assert restored["next turn"] <= 40
    assert restored["changed ending"] <= 64 + 64
    assert restored["another branch"] <= 40
    assert restored["raw text, longer"] <= workloads.LONGER + 1
    assert restored["raw text, shorter"] <= 512
