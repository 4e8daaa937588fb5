"""`--record-trace`: what is told of requests, what is not, and what ends a recording."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import subprocess
import sys
import time
from contextlib import suppress
from unittest import mock

import bundled
import httpx2
import pytest
from mlx_hybridcache_server.generation.trace import HEADER, Recorder
from servers import CHAT, COMPLETIONS, INSTANT, OURS, command, environment, run_to_its_end, running

SYSTEM = "You are a careful reader of old letters."
FIRST = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Who wrote this?"}]
SECOND = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "When was it sent?"}]
REPLY = 6
"""Tokens of every reply but those that never end."""


def chat_tokens(messages):
    """What the server reads for a chat."""
    return bundled.chat(*((m["role"], m["content"]) for m in messages), enable_thinking=False)


def ask(server, messages, **more):
    """One reply of `REPLY` tokens, and its token ids."""
    body = {"max_tokens": REPLY, "logit_bias": bundled.never_ending(), **INSTANT, **more}
    reply = server.answer(CHAT, messages=messages, logprobs=True, top_logprobs=1, **body)
    choice = reply["choices"][0]
    assert reply["usage"]["completion_tokens"] == REPLY
    return choice["message"]["content"]


def recorded(path):
    """The header and the requests."""
    header, *lines = path.read_text("utf-8").splitlines()
    return json.loads(header), [json.loads(line) for line in lines]


def common(one, other):
    """The length of the longest common prefix."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """The same four chats recorded twice: two of one system prompt, a next turn, another salt."""
    folder = tmp_path_factory.mktemp("record")
    paths = [folder / "one.jsonl", folder / "two.jsonl"]
    asked = []
    for path in paths:
        with running(OURS, "--record-trace", str(path)) as server:
            said = ask(server, FIRST)
            ask(server, SECOND)
            third = [
                *FIRST,
                {"role": "assistant", "content": said},
                {"role": "user", "content": "Why?"},
            ]
            ask(server, third)
            ask(server, FIRST, cache_salt="another")
            asked = [chat_tokens(messages) for messages in (FIRST, SECOND, third, FIRST)]
    return paths, asked


def test_a_line_tells_what_the_format_names(session):
    """Four chats of six tokens each: fields, lengths, turns, ascending times."""
    paths, asked = session
    header, lines = recorded(paths[0])
    assert header == {"format": "mlx_hybridcache trace 1"}
    assert [len(line["tokens"]) for line in lines] == [len(tokens) for tokens in asked]
    tokenizer = bundled.load()[1]
    opener = tokenizer.convert_tokens_to_ids("<|im_start|>")
    for line, tokens in zip(lines, asked, strict=True):
        assert list(line) == [
            *("t", "conversation", "tokens", "turns", "reply", "keeps_reply", "reply_tokens")
        ]
        assert line["conversation"] is None
        assert line["reply"] == len(line["reply_tokens"]) == REPLY
        # Without reasoning the reply stands behind an empty block, which histories do not have.
        assert line["keeps_reply"] is False
        assert len(line["turns"]) == tokens.count(opener)
        assert all(0 <= number < 2**32 for number in line["tokens"] + line["reply_tokens"])
    times = [line["t"] for line in lines]
    assert times == sorted(times)
    assert times[0] > 0


def test_numbers_agree_exactly_as_far_as_the_tokens_do(session):
    """Two chats of one system prompt, and the first one's next turn."""
    paths, asked = session
    _, lines = recorded(paths[0])
    first, second, third, _ = (line["tokens"] for line in lines)
    shared = common(asked[0], asked[1])
    assert 10 < shared < min(len(asked[0]), len(asked[1]))
    assert common(first, second) == shared
    assert not set(first[shared:]) & set(second[shared:])  # never again once prefixes differ
    assert common(first, third) == common(asked[0], asked[2]) > shared
    written = first + lines[0]["reply_tokens"]
    assert len(set(written)) == len(written)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A server that records, and a function that tells what it has recorded since it was last asked."""
    path = tmp_path_factory.mktemp("recording") / "trace.jsonl"
    told = 0

    def news():
        nonlocal told
        _, lines = recorded(path)
        new, told = lines[told:], len(lines)
        return new

    with running(OURS, "--record-trace", str(path)) as server:
        yield server, news


def test_a_prompt_that_goes_on_behind_a_reply_agrees_with_its_numbers_too(recording):
    """100 tokens, a reply made of one token four times, then all 104 and 20 more."""
    server, news = recording
    prompt, token = list(bundled.text_tokens(100)), 65
    body = {"max_tokens": 4, "logit_bias": {str(token): 100.0}}
    server.answer(COMPLETIONS, prompt=prompt, **body)
    longer = [*prompt, *[token] * 4, *bundled.text_tokens(20, start=500)]
    server.answer(COMPLETIONS, prompt=longer, **body)
    first, second = lines_of(news, 2)
    assert common(first["tokens"] + first["reply_tokens"], second["tokens"]) == 104


def test_a_salt_of_its_own_shares_no_number(session):
    """The first chat again under another salt."""
    _, lines = recorded(session[0][0])
    assert lines[0]["turns"] == lines[3]["turns"]
    assert not set(lines[0]["tokens"]) & set(lines[3]["tokens"])


def test_two_recordings_of_the_same_requests_share_no_number(session):
    """The key is drawn anew; everything else is the same."""
    (_, one), (_, two) = map(recorded, session[0])
    for a, b in zip(one, two, strict=True):
        assert not set(a["tokens"] + a["reply_tokens"]) & set(b["tokens"] + b["reply_tokens"])
        for name in ("turns", "reply", "keeps_reply"):
            assert a[name] == b[name]


def test_no_text_and_no_token_id_is_in_the_file(session):
    """No word of the prompts, no number below the vocabulary, and nobody else may read it."""
    paths, _ = session
    text = paths[0].read_text("utf-8")
    words = f"{SYSTEM} Who wrote this When was it sent another".replace(".", "").split()
    assert not [word for word in words if len(word) > 4 and word in text]
    vocabulary = len(bundled.load()[1])
    numbers = [n for line in recorded(paths[0])[1] for n in line["tokens"] + line["reply_tokens"]]
    assert len(numbers) > 150
    # One is below the vocabulary of 3,072 by chance in a run of 5,000; token ids would all be.
    assert sum(number < vocabulary for number in numbers) <= 1
    assert stat.S_IMODE(paths[0].stat().st_mode) == 0o600


def until(holds, what):
    """Wait for it."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def lines_of(news, count):
    """The next lines of a recording, which come behind the replies."""
    found = []
    until(lambda: len(found.extend(news()) or found) >= count, "too little was recorded")
    assert len(found) == count
    return found


def test_a_cancelled_request_is_recorded_with_what_was_generated(tmp_path):
    """A stream of up to 100,000 tokens whose client leaves after three events."""
    path = tmp_path / "trace.jsonl"
    with running(OURS, "--record-trace", str(path)) as server:
        body = {"prompt": "The", "max_tokens": 100_000, "logit_bias": bundled.never_ending()}
        with server.client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as response:
            lines = response.iter_lines()
            for _ in range(6):
                next(lines)
        until(lambda: recorded(path)[1], "nothing was recorded")
        _, [line] = recorded(path)
        whole = len(line["tokens"]) + line["reply"]
        held = lambda: server.client.get("/v1/cache").json()["tokens"]  # noqa: E731
        until(lambda: held() == whole, "what is recorded is not what is stored")
    assert 3 <= line["reply"] == len(line["reply_tokens"]) < 100_000


def test_what_declined_the_cache_is_left_out_and_what_was_warmed_is_in(recording):
    """`cache_prompt: false`, then the first 60 tokens of a prompt read ahead, then all 100."""
    server, news = recording
    prompt = list(bundled.text_tokens(100, 1_000))
    server.answer(COMPLETIONS, prompt=prompt, max_tokens=2, cache_prompt=False)
    server.answer("/v1/cache/warm", prompt=prompt[:60])
    server.answer(COMPLETIONS, prompt=prompt, max_tokens=2)
    warmed, asked = lines_of(news, 2)
    assert (warmed["reply"], warmed["reply_tokens"]) == (0, [])
    assert common(warmed["tokens"], asked["tokens"]) == len(warmed["tokens"]) == 60


def test_a_server_without_a_cache_records_what_it_is_asked(tmp_path):
    """--prompt-cache-size 0: the trace of a workload for which a cache is being chosen."""
    path = tmp_path / "trace.jsonl"
    with running(OURS, "--record-trace", str(path), "--prompt-cache-size", "0") as server:
        ask(server, FIRST)
    _, [line] = recorded(path)
    assert (len(line["tokens"]), line["reply"]) == (len(chat_tokens(FIRST)), REPLY)


def test_a_reply_whose_reasoning_will_be_stripped_says_so(recording):
    """The bundled model made to close its reasoning at once, and to go on."""
    server, news = recording
    tokenizer = bundled.load()[1]
    closing = tokenizer.convert_tokens_to_ids("</think>")
    server.answer(CHAT, messages=FIRST, max_tokens=3, logit_bias={str(closing): 100.0})
    [line] = lines_of(news, 1)
    assert line["keeps_reply"] is False


@pytest.mark.parametrize("kind", ["folder", "missing folder", "full of other things"])
def test_a_file_that_cannot_be_made_stops_the_start(tmp_path, kind):
    """Exit status 2 and one line that names the flag; what was there is untouched."""
    path = tmp_path / "missing" / "trace.jsonl" if kind == "missing folder" else tmp_path
    if kind == "full of other things":
        path = tmp_path / "notes.md"
        path.write_text("mine\n")
    ended = run_to_its_end("--record-trace", str(path), "--port", "0")
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert f"--record-trace {path}" in line
    if kind == "full of other things":
        assert path.read_text() == "mine\n"


def test_a_start_that_failed_leaves_a_file_that_can_be_named_again(tmp_path):
    """A model that is not there, twice: both times it is the model that is missing."""
    path = tmp_path / "trace.jsonl"
    for _ in range(2):
        ended = run_to_its_end("--record-trace", str(path), "--model", "./missing", "--port", "0")
        assert "./missing" in ended.stderr.splitlines()[-1]
    assert recorded(path) == ({"format": "mlx_hybridcache trace 1"}, [])


def test_a_disk_that_is_full_at_the_start_stops_it(tmp_path):
    """Files may have no byte at all."""
    start = command(OURS, "--record-trace", str(tmp_path / "trace.jsonl"), "--port", "0")
    ended = subprocess.run(
        ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *start],
        capture_output=True,
        text=True,
        timeout=30,
        env=environment(),
        check=False,
    )
    assert ended.returncode == 2
    assert "--record-trace" in ended.stderr.splitlines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot limit a running process")
def test_a_disk_that_fills_up_ends_the_recording_and_no_request(tmp_path):
    """Files limited to one line's bytes more than there are: one line more, whole, and one in the log."""
    path = tmp_path / "trace.jsonl"
    with running(OURS, "--record-trace", str(path), "--log-level", "ERROR") as server:
        ask(server, FIRST)
        until(lambda: len(recorded(path)[1]) == 1, "nothing was recorded")
        most = 2 * path.stat().st_size
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (most, most))
        for _ in range(4):
            ask(server, FIRST)
        until(lambda: "recording" in server.log, "nothing was said")
        with suppress(httpx2.TransportError):
            ask(server, SECOND)
        assert server.alive
        [said] = server.newly_logged().splitlines()
        assert str(path) in said
    assert len(recorded(path)[1]) == 2
    assert path.read_bytes().endswith(b"\n")


def test_a_request_of_which_nothing_was_generated_is_left_out(tmp_path, monkeypatch):
    """It was not read to its end."""
    recorder = Recorder(str(tmp_path / "trace.jsonl"))
    put = []
    monkeypatch.setattr(recorder, "put", put.append)
    assert list(recorder.watching(lambda responses: responses, mock.Mock())(iter(()))) == []
    recorder.close()
    assert put == []


def test_of_a_line_that_is_cut_by_a_full_disk_nothing_is_left(tmp_path, monkeypatch):
    """Three bytes of it are written, then there is no room."""
    path, write = tmp_path / "trace.jsonl", os.write
    recorder = Recorder(str(path))
    rooms = iter([3])

    def full(file, data):
        if (room := next(rooms, None)) is None:
            raise OSError(errno.ENOSPC, "full")
        return write(file, data[:room])

    monkeypatch.setattr(os, "write", full)
    recorder.put(mock.Mock(line=lambda *_: b"a line\n"))
    recorder.close()
    monkeypatch.undo()
    assert path.read_bytes() == HEADER
