"""The server on several machines: as `mlx.launch ... -- python -m mlx_hybridcache.server` starts it."""

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
from ranks.started import free_ports, group_of
from servers import CHAT, OURS, command, environment

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

    def __init__(self, process):
        self.process = process
        self.printed = ""
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self):
        for line in self.process.stdout:
            self.printed += line

    def runs(self):
        return self.process.poll() is None

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


class Started:
    """The same processes as `mlx.launch` would start, without their imports and without it, which keeps a core busy."""

    def __init__(self, ranks):
        self.ranks = ranks

    @property
    def printed(self):
        return "".join(rank.printed for rank in self.ranks)

    def runs(self):
        return all(rank.process.poll() is None for rank in self.ranks)

    def rank(self, number):
        return self.ranks[number].process.pid

    def ends(self):
        for rank in self.ranks:
            rank.ends()


class Group:
    """A group of two with the bundled model, on the port that its clients ask."""

    def __init__(self, processes, client):
        self.processes = processes
        self.client = client

    def answers(self):
        until = time.monotonic() + SECONDS
        while time.monotonic() < until and self.processes.runs():
            try:
                return self.client.get("/health")
            except httpx2.TransportError:
                time.sleep(0.2)
        raise AssertionError(f"no answer\n{self.processes.printed}")

    def rank(self, number):
        return self.processes.rank(number)

    def ends(self):
        """What all of them printed."""
        self.processes.ends()
        return self.processes.printed

    def end(self):
        """Ask all of them to."""
        for number in (0, 1):
            with suppress(ValueError, psutil.Error, ProcessLookupError):  # it has ended
                os.kill(self.rank(number), signal.SIGTERM)


@contextmanager
def asked_on(port, processes):
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client:
        group = Group(processes, client)
        try:
            yield group
        finally:
            group.end()


@contextmanager
def launched(*flags):
    port, *ranks = free_ports(5)
    launcher = shutil.which("mlx.launch", path=Path(sys.executable).parent)
    assert launcher is not None
    start = ["-n", "2", "--backend", "ring", "-p", str(min(ranks))]
    ours = command(OURS, "--port", str(port), *flags)
    process = subprocess.Popen(
        [launcher, *start, "--", *ours],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    under_it = Launched(process)
    try:
        with asked_on(port, under_it) as group:
            yield group
    finally:
        try:
            process.wait(30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            under_it.ends()
            process.stdin.close()
            process.stdout.close()


@contextmanager
def started(tmp_path, *flags):
    """As ranks of their own."""
    (port,) = free_ports(1)
    with (
        group_of(2, tmp_path, "--port", port, *flags, module=OURS, env=environment()) as ranks,
        asked_on(port, Started(ranks)) as group,
    ):
        yield group


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    with started(tmp_path_factory.mktemp("group"), "--pipeline") as group:
        assert group.answers().status_code == 200
        yield group


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


def test_what_several_ranks_cannot_do_is_said_at_the_start(tmp_path):
    with started(tmp_path, "--pipeline", "--draft-from-cache") as group:
        assert "--draft-from-cache cannot be used on several ranks yet" in group.ends()


def test_the_next_start_restores_what_every_rank_kept(tmp_path):
    flags = ("--pipeline", "--cache-dir", str(tmp_path / "kept"))
    asked = {
        "messages": [{"role": "user", "content": 20 * "Tell me of two towns. "}],
        "max_tokens": 8,
    }
    with started(tmp_path, *flags) as group:
        group.answers()
        before = group.client.post(CHAT, json=asked)
        os.kill(group.rank(0), signal.SIGTERM)
        group.ends()
    with started(tmp_path, *flags) as group:
        group.answers()
        after = group.client.post(CHAT, json=asked)
        assert said(after) == said(before)
        assert cached(after) == after.json()["usage"]["prompt_tokens"] - 1
        ranks = group.client.get("/v1/cache").json()["ranks"]
    assert [each["rank"] for each in ranks] == [0, 1]
    assert all(each["disk_bytes"] and each["machine"] and each["layers"] for each in ranks)


def test_a_lost_rank_ends_the_stream_and_then_the_server():
    """Under the launcher, which ends with it."""
    with launched("--pipeline") as group:
        assert group.answers().status_code == 200
        lose_rank_1(group)
        assert "Rank 1 is lost" in group.ends()


def lose_rank_1(group):
    never = {**QUESTION, "stream": True, "max_tokens": 2000, "logit_bias": {"0": -100}}
    with group.client.stream("POST", CHAT, json=never) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.kill(group.rank(1), signal.SIGKILL)
        rest = [line for line in lines if line.startswith("data: {")]
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert error["code"] == "rank_lost"
    assert re.match(r"Rank (1 is lost|0 failed)", error["message"])
