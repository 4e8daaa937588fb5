"""The server as users start it on several machines: `mlx.launch ... -- python -m mlx_hybridcache.server`."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import psutil
import pytest
from ranks.started import free_ports
from servers import CHAT, command, environment

SECONDS = 120

QUESTION = {"messages": [{"role": "user", "content": "Who are you? Tell me a story of two towns."}]}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "town",
        "schema": {
            "type": "object",
            "properties": {"town": {"enum": ["Oslo", "Toronto"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}
ASKED = [
    {**QUESTION, "max_tokens": 24},
    {**QUESTION, "max_tokens": 24, "temperature": 0.8, "seed": 7, "logprobs": True},
    {**QUESTION, "max_tokens": 24, "stop": ["in"]},
    {**QUESTION, "max_tokens": 40, "response_format": SCHEMA, "enable_thinking": False},
    {**QUESTION, "max_tokens": 24, "logit_bias": {"5": -100}},
]


class Launched:
    """The processes of a group under their launcher; what all of them print comes out in one place."""

    def __init__(self, process, url):
        self.process = process
        self.client = httpx2.Client(base_url=url, timeout=SECONDS)
        self.printed = ""
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self):
        for line in self.process.stdout:
            self.printed += line

    def answers(self):
        until = time.monotonic() + SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            try:
                return self.client.get("/health")
            except httpx2.TransportError:
                time.sleep(0.2)
        raise AssertionError(f"no answer\n{self.printed}")

    def rank(self, number):
        """That rank's process."""
        (found,) = (
            each.pid
            for each in psutil.Process(self.process.pid).children(recursive=True)
            if each.environ().get("MLX_RANK") == str(number)
        )
        return found

    def ends(self):
        self.process.wait(SECONDS)
        self._reading.join(5)
        return self.printed


@contextmanager
def launched(*flags):
    """A group of two under `mlx.launch`, with the bundled model."""
    port, *ranks = free_ports(5)
    launcher = shutil.which("mlx.launch", path=Path(sys.executable).parent)
    assert launcher is not None
    start = ["-n", "2", "--backend", "ring", "-p", str(min(ranks))]
    ours = command("mlx_hybridcache.server", "--port", str(port), *flags)
    process = subprocess.Popen(
        [launcher, *start, "--", *ours],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    group = Launched(process, f"http://127.0.0.1:{port}")
    try:
        yield group
    finally:
        for number in (0, 1):
            with suppress(ValueError, psutil.Error, ProcessLookupError):  # it has ended
                os.kill(group.rank(number), signal.SIGTERM)
        group.client.close()
        try:
            process.wait(30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            group.ends()
            process.stdin.close()
            process.stdout.close()


@pytest.fixture(scope="module")
def group():
    with launched("--pipeline") as started:
        assert started.answers().status_code == 200
        yield started


def said(reply):
    reply.raise_for_status()
    choice = reply.json()["choices"][0]
    return choice["message"], choice["finish_reason"], choice["logprobs"]


def cached(reply):
    return reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("asked", ASKED, ids=["greedy", "sampled", "stop", "schema", "bias"])
def test_replies_are_those_of_one_machine_hot_and_cold(group, process, asked):
    cold, hot = (group.client.post(CHAT, json=asked) for _ in range(2))
    alone = process.client.post(CHAT, json=asked)
    assert said(cold) == said(hot) == said(alone)
    assert cached(hot) == hot.json()["usage"]["prompt_tokens"] - 1


def test_clients_that_go_away_and_clients_at_once_leave_the_ranks_together(group):
    with group.client.stream("POST", CHAT, json={**QUESTION, "stream": True}) as stream:
        next(stream.iter_lines())
    found = [None] * 3

    def ask(index):
        found[index] = said(group.client.post(CHAT, json=ASKED[0]))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * len(found)
    assert group.answers().json()["status"] == "ok"


def test_a_function_of_a_request_that_fails_ends_that_request_alone(group):
    refused = group.client.post(CHAT, json={**QUESTION, "logit_bias": {"999999999": 1}})
    assert refused.status_code == 400
    assert said(group.client.post(CHAT, json=ASKED[0]))


def test_what_several_ranks_cannot_do_is_said_at_the_start():
    with launched("--pipeline", "--draft-from-cache") as group:
        assert "--draft-from-cache cannot be used on several ranks yet" in group.ends()


def test_the_next_start_restores_what_every_rank_kept(tmp_path):
    flags = ("--pipeline", "--cache-dir", str(tmp_path / "kept"))
    asked = {
        "messages": [{"role": "user", "content": 20 * "Tell me of two towns. "}],
        "max_tokens": 8,
    }
    with launched(*flags) as group:
        group.answers()
        before = group.client.post(CHAT, json=asked)
        os.kill(group.rank(0), signal.SIGTERM)
        group.ends()
    with launched(*flags) as group:
        group.answers()
        after = group.client.post(CHAT, json=asked)
        assert said(after) == said(before)
        assert cached(after) == after.json()["usage"]["prompt_tokens"] - 1
        ranks = group.client.get("/v1/cache").json()["ranks"]
    assert [each["rank"] for each in ranks] == [0, 1]
    assert all(each["disk_bytes"] and each["machine"] and each["layers"] for each in ranks)


def test_a_lost_rank_ends_the_stream_and_then_the_server():
    with launched("--pipeline") as group:
        group.answers()
        never = {**QUESTION, "stream": True, "max_tokens": 2000, "logit_bias": {"0": -100}}
        with group.client.stream("POST", CHAT, json=never) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(group.rank(1), signal.SIGKILL)
            rest = [line for line in lines if line.startswith("data: {")]
        error = json.loads(rest[-1].removeprefix("data: "))["error"]
        assert error["code"] == "rank_lost"
        assert re.match(r"Rank (1 is lost|0 failed)", error["message"])
        assert "Rank 1 is lost" in group.ends()
