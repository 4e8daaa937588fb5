"""From tokens to what a client reads: stop texts, states, calls, log-probabilities, kinds of change."""

import asyncio
import json
from importlib import import_module
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from bundled import load
from hypothesis import given
from hypothesis import strategies as st
from mlx_hybridcache_server.adapter import NORMAL, TOOL, initial_state, token_bytes
from mlx_hybridcache_server.calls.formats import ToolFormat
from mlx_hybridcache_server.calls.parts import Parts
from mlx_hybridcache_server.generation.changes import kind_of_change
from mlx_hybridcache_server.generation.listen import Listener
from mlx_hybridcache_server.generation.pieces import Count, Piece, PromptProgress
from mlx_hybridcache_server.generation.stop_text import StopText
from mlx_hybridcache_server.http.wire import JsonResponse, event, written
from mlx_hybridcache_server.openai.delta import Delta
from mlx_hybridcache_server.openai.envelope import usage
from mlx_hybridcache_server.replies.message import ChatMessage
from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer, TokenizerWrapper
from mlx_lm.tool_parsers import json_tools
from transformers import AutoTokenizer

from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.worker.turns import PAUSE


def chunked(text, cuts):
    """`text` in pieces, cut at the given places."""
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(edges)]


@given(
    st.text("ab<", max_size=30),
    st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 99), max_size=8),
)
def test_a_stop_text_is_found_however_the_text_is_cut(text, stops, cuts):
    """What is given out stands before the stop that is complete first; without one it is all."""
    stop, given_out = StopText(stops), ""
    for chunk in chunked(text, cuts):
        given_out += stop.feed(chunk)
        if stop.found:
            break
    else:
        given_out += stop.end()
    # The stop that is complete first ends the text; of those complete together, the longest.
    places = [(at + len(s), at, s) for s in stops if (at := text.find(s)) >= 0]
    _, at, found = min(places, default=(0, len(text), None))
    assert stop.found == found
    assert given_out == text[:at]


def response(text, token=5, finish=None, logprobs=None):
    """One of mlx-lm's responses."""
    row = mx.zeros(3072) if logprobs is None else mx.array(logprobs)
    return GenerationResponse(text, token, row, False, 1, 1.0, 1, 1.0, 0.0, finish)


def tool_format(parse=json_tools):
    """The format of the bundled model's calls, or another one, of a function `f` that was offered."""
    module = import_module(f"mlx_lm.tool_parsers.{parse}") if isinstance(parse, str) else parse
    start, end = module.tool_call_start, module.tool_call_end
    return ToolFormat(start, end, module.parse_tool_call, [{"function": {"name": "f"}}])


def heard(texts, *, stops=(), state="normal", calls=True, one=False, top=None, finish="stop"):
    """The pieces of a reply whose tokens bring `texts`."""
    _, tokenizer = load()
    tools = tool_format() if calls else None
    listener = Listener(stops, lambda: Parts(tokenizer, state, tools, only_one=one), top)
    steps = [response(text) for text in texts[:-1]] + [response(texts[-1], finish=finish)]
    return list(listener.listen(iter(steps)))


def said(pieces):
    """All text by state."""
    found = {}
    for piece in pieces:
        for part in piece.parts:
            state, text = part if isinstance(part, tuple) else ("call", str(part))
            found[state] = found.get(state, "") + text
    return {state: text for state, text in found.items() if text}


def test_white_space_behind_a_call_is_no_stop_text_while_more_is_held_back():
    """The line that parts them is held with `x`, which may begin another stop text."""
    stop = StopText(["\n", "\nx y"])
    assert stop.interrupted() == ""
    assert stop.feed("\nx") == ""
    assert stop.feed("z\n") == "\nxz"
    assert stop.found == "\n"


def test_reasoning_calls_and_content_are_told_apart_across_tokens():
    """Markers may be cut anywhere; the tokens of reasoning are counted with its markers."""
    pieces = heard(
        ["<th", "ink>", "hm", "</think", ">\n\n", "<tool", f"_call>{CALL[1]}", "</tool_call>", ""]
    )
    found = said(pieces)
    assert found.pop("call").startswith("Begin(name='f', id='')Arguments(text='{')")
    assert found == {"normal": "\n\n", "reasoning": "hm"}
    assert [piece.is_reasoning for piece in pieces] == [False, True, True, True, True] + [False] * 4
    assert [piece.finish for piece in pieces] == [None] * 8 + ["stop"]


def test_what_looks_like_a_marker_and_is_none_is_not_lost():
    """A reply that ends in `<tool` is text."""
    assert said(heard(["a ", "<tool"])) == {"normal": "a <tool"}
    assert said(heard(["a ", "<tool"], finish="length")) == {"normal": "a <tool"}


def test_a_stop_text_ends_the_reply_and_is_left_out():
    """It may span tokens and lie within one; nothing behind it is read."""
    pieces = heard(["one ST", "OP two", "three"], stops=["STOP"])
    assert said(pieces) == {"normal": "one "}
    assert [piece.finish for piece in pieces] == [None, "stop"]


def test_a_reply_ends_behind_its_first_call_where_only_one_is_wanted():
    """The second call's tokens are never asked for."""
    texts = [*CALL, "\n", *CALL]
    assert len(heard(texts, one=True)) == 3
    assert heard(texts, one=True)[-1].finish == "stop"
    assert len(heard(texts)) == 7
    assert len(heard(["<tool_call>", "{}", "</tool_call>", *texts], one=True)) == 6  # {} is none


def test_pauses_become_progress():
    """Between two slices a reader learns how far the prompt is read."""
    listener = Listener((), None, None)
    listener.on_progress(512, 2048)
    items = list(listener.listen(iter([PAUSE, response("x", finish="length")])))
    assert items[0] == PromptProgress(512, 2048)
    assert isinstance(items[1], Piece)


@pytest.mark.parametrize(
    ("read", "told"),
    [((0, 99), [99]), ((50, 99), [None]), ((50, 80, 99), [80, 99]), ((50, 80), [80])],
    ids=["cold", "hot", "hot, two slices", "hot, one of two"],
)
def test_of_a_hot_prompt_that_takes_one_slice_the_reply_tells_enough(read, told):
    """100 tokens: where they are restored, and behind each slice."""
    listener = Listener((), None, None)
    listener.on_progress(read[0], 100)

    def slices():
        for each in read[1:]:
            listener.on_progress(each, 100)
            yield PAUSE

    heard = [None if each is PAUSE else each.read for each in listener.listen(slices())]
    assert heard == told


@pytest.mark.parametrize(("lost", "expected"), [(b" and", " and"), (b"and", "and")])
def test_a_text_that_goes_on_keeps_the_space_before_its_first_word(lost, expected):
    """mlx-lm's detokenizers drop it; behind a prompt it counts."""
    listener = Listener((), None, None, bytes_of=lambda token: lost)
    items = list(listener.listen(iter([response("and"), response(" so", finish="stop")])))
    assert said(items) == {"normal": expected + " so"}


def test_log_probabilities_are_sorted_and_ties_go_by_id():
    """Three alternatives of five; the token itself need not be among them."""
    row = np.full(3072, -20.0, dtype=np.float32)
    row[[7, 3, 9, 4]] = [-1.0, -2.0, -2.0, -3.0]
    listener = Listener((), None, 3)
    (piece,) = listener.listen(iter([response("x", 4, "stop", row)]))
    assert piece.logprob.top == ((7, -1.0), (3, -2.0), (9, -2.0))
    assert (piece.logprob.token, piece.logprob.logprob) == (4, -3.0)


def test_the_bytes_of_tokens_join_to_the_text():
    """Characters of several tokens, special tokens, and both ways of decoding."""
    _, tokenizer = load()
    text = "Grüße, 世界! 🙂 <|im_end|>\n\tx"
    ids = tokenizer.encode(text, add_special_tokens=False)
    of = token_bytes(tokenizer)
    assert b"".join(of(token) for token in ids).decode() == text
    naive = TokenizerWrapper(
        AutoTokenizer.from_pretrained(BUNDLED_MODEL), NaiveStreamingDetokenizer
    )
    ascii_ids = tokenizer.encode("plain words", add_special_tokens=False)
    assert b"".join(map(token_bytes(naive), ascii_ids)) == b"plain words"


def test_a_reply_begins_in_the_state_that_its_turn_left_open():
    """An open `<think>` in the last turn, whatever was closed before it."""
    _, tokenizer = load()

    def state(text):
        return initial_state(tokenizer, tokenizer.encode(text, add_special_tokens=False))

    assert state("<think>a</think><think>") == "reasoning"
    assert state("<think>a</think>") == "normal"
    assert state("a") == "normal"


# Messages


def message(texts, **how):
    """A chat message made of pieces, with its deltas."""
    made = ChatMessage(tool_format())
    pieces = heard(texts, **how)

    async def taken():
        deltas = []
        for piece in pieces:
            calls = sum("id" in call for delta in deltas for call in delta.tool_calls)
            deltas.append(Delta.of(await made.take(piece), calls))
        return deltas

    deltas = asyncio.run(taken())
    return deltas, made.finish_reason(pieces[-1])


def whole(deltas):
    """What they add up to."""
    added = Delta()
    for delta in deltas:
        added.add(delta)
    return added


CALL = ["<tool_call>", '{"name": "f", "arguments": {"x": "ü"}}', "</tool_call>"]


def test_calls_are_numbered_and_their_arguments_are_json_text():
    """Two calls with white space around them: no content, finish_reason tool_calls."""
    deltas, finish = message(["\n\n", *CALL, "\n", *CALL, ""])
    calls = whole(deltas).tool_calls
    assert [call["index"] for call in calls] == [0, 1]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"x": "ü"}] * 2
    assert all(call["id"].startswith("call_") for call in calls)
    assert calls[0]["id"] != calls[1]["id"]
    assert "".join(delta.content for delta in deltas) == ""
    assert finish == "tool_calls"


@pytest.mark.parametrize("bad", ["{", "[]", '{"name": 5}', '{"arguments": {}}', "no json"])
def test_a_call_that_cannot_be_read_is_text(bad):
    """With its markers, so that nothing the model wrote is lost."""
    deltas, finish = message(["a", "<tool_call>", bad, "</tool_call>", ""])
    assert "".join(delta.content for delta in deltas) == f"a<tool_call>{bad}</tool_call>"
    assert finish == "stop"


@pytest.mark.parametrize("bad", ['"{"', '"[NaN]"', "5", '["a"]', '"text"'])
def test_a_call_whose_arguments_are_no_object_is_text(bad):
    """Not as JSON, nor as JSON in a string."""
    text = f'{{"name": "f", "arguments": {bad}}}'
    deltas, finish = message(["<tool_call>", text, "</tool_call>", ""])
    assert not any(delta.tool_calls for delta in deltas)
    assert "".join(delta.content for delta in deltas) == f"<tool_call>{text}</tool_call>"
    assert finish == "stop"


@pytest.mark.parametrize("odd", ["NaN", "-Infinity", "1e999", "celsius", "007"])
def test_what_json_has_not_is_sent_as_a_string(odd):
    """Python reads and writes NaN; no other reader does. A client's check of types refuses the string."""
    text = f'{{"name": "f", "arguments": {{"x": [{odd}]}}}}'
    deltas, _ = message(["<tool_call>", text, "</tool_call>", ""])
    (call,) = whole(deltas).tool_calls
    assert decoded(call["function"]["arguments"].encode()) == {"x": [odd]}


def test_arguments_are_never_nested_more_deeply_than_clients_read():
    """Of 3,000 brackets 199 are in the arguments, which are broken for it; the rest is content."""
    text = '{"name": "f", "arguments": {"x": %s}}' % ("[" * 3000 + "]" * 3000)
    deltas, _ = message(["<tool_call>", text, "</tool_call>", ""])
    (call,) = whole(deltas).tool_calls
    assert call["function"]["arguments"] == '{"x": ' + "[" * 199
    assert whole(deltas).content == "[" * 2801 + "]" * 3000 + "}}"


@pytest.mark.parametrize("id_", ["NaN", "5", '""', "null", "{}"])
def test_an_id_is_text(id_):
    """One that the model gave and that is none is replaced."""
    deltas, _ = message(["<tool_call>", f'{{"name": "f", "id": {id_}}}', "</tool_call>", ""])
    (call,) = whole(deltas).tool_calls
    assert call["id"].startswith("call_")
    assert call["function"]["arguments"] == "{}"


def decoded(data):
    """JSON as a strict reader takes it."""

    def no_json(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(data.decode("utf-8"), parse_constant=no_json)


def test_what_is_sent_is_json_whatever_it_says():
    """Numbers that JSON lacks are null, half a character is an escape; all of it is UTF-8."""
    odd = {"a": [float("nan"), -float("inf"), 1.5], "b": "\ud800", "c": ("\u2028\r\n", "ü")}
    told = {"a": [None, None, 1.5], "b": "\ud800", "c": ["\u2028\r\n", "ü"]}
    assert decoded(written(odd)) == told
    assert decoded(JsonResponse(odd).body) == told
    data, _, rest = event(odd).partition(b"\n\n")
    assert not rest
    assert decoded(data.removeprefix(b"data: ")) == told
    assert written({"a": "ü"}) == '{"a":"ü"}'.encode()


def test_half_a_character_in_a_call_is_sent_as_an_escape():
    """An escape within JSON within JSON; as a character it could not be sent at all."""
    text = '{"name": "f", "arguments": {"x": "\\ud800"}}'
    deltas, _ = message(["<tool_call>", text, "</tool_call>", ""])
    (call,) = whole(deltas).tool_calls
    assert call["function"]["arguments"] == '{"x": "\\ud800"}'
    assert decoded(written(call))["function"]["arguments"] == '{"x": "\\ud800"}'


def test_a_call_in_words_that_nobody_reads_stays_as_it_was_written():
    """With its markers if both were written, as `mlx_lm`'s parsers take a call as a whole."""

    class Unread:
        start, end = "<c>", "</c>"

        async def others(self, text):
            return None

    def taken(finish, *parts):
        return asyncio.run(ChatMessage(Unread()).take(Piece(1, parts, False, None, finish)))

    assert taken("length", (TOOL, "x")) == [(NORMAL, "<c>x")]
    assert taken(None, (TOOL, "x"), (NORMAL, "y")) == [(NORMAL, "<c>x</c>"), (NORMAL, "y")]


def test_a_call_that_is_cut_off_gets_no_marker_that_was_not_written():
    """The reply ends inside it."""
    deltas, _ = message(["<tool_call>", '{"na'])
    assert "".join(delta.content for delta in deltas) == '<tool_call>{"na'


def test_nothing_is_a_call_where_none_is_allowed():
    """tool_choice none: the text as it stands."""
    deltas, finish = message([*CALL, ""], calls=False)
    assert "".join(delta.content for delta in deltas) == "".join(CALL)
    assert finish == "stop"


def test_white_space_is_content_where_no_call_follows():
    """It waits for what comes behind it."""
    deltas, _ = message(["\n\n", "a", " ", "b"])
    assert [delta.content for delta in deltas] == ["", "\n\na", " ", "b"]
    deltas, _ = message(["\n", "\n"])
    assert "".join(delta.content for delta in deltas) == "\n\n"


def test_usage_adds_up():
    """Two choices of one prompt, which is counted once."""
    found = usage([Count(100, 90, 5, 2), Count(completion=7, reasoning=1)])
    assert found["total_tokens"] == 112
    assert found["prompt_tokens_details"]["cached_tokens"] == 90
    assert found["completion_tokens_details"]["reasoning_tokens"] == 3


# Kinds of change


@pytest.mark.parametrize(
    ("before", "asked", "stored", "kind"),
    [
        ("Today is 2026-11-", "22. Hi", "23. Hi", "date"),
        ("Today is ", "Monday.", "Tuesday.", "date"),
        ("Today is 2026-11-22T10:0", "1:00Z", "2:30Z", "date"),
        ("It is 1", "0:15 now", "1:30 now", "time"),
        (
            "id 123e4567-e89b-12d3-a456-4266141",
            "74000 x",
            "99999 x",
            "uuid",
        ),
        ("sha ", "9f86d081884c7d65", "60303ae22b998861", "hex"),
        ("You have ", "9 messages", "10 messages", "number"),
        ("You have 9", " messages", "0 messages", "number"),
        ("Tell me about ", "cats", "dogs", None),
        ("in 1999 we ", "sang", "danced", None),
    ],
)
def test_the_kind_of_change_is_told_when_it_can_be(before, asked, stored, kind):
    """The same pattern must stand across the place of change in both texts."""
    assert kind_of_change(before, asked, stored) == kind
