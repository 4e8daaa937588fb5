"""Real server processes for black-box tests: ours and mlx_lm.server over the same bundled model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forks
import httpx2

from mlx_hybridcache.demo import BUNDLED_MODEL

OURS = "mlx_hybridcache.server"
THEIRS = "mlx_lm.server"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = "/v1/messages"
PATIENCE_SECONDS = 120


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(module: str, *flags: str) -> list[str]:
    """The command line that starts `module`'s server."""
    runner = f"import sys; from {module} import main; sys.exit(main())"
    how = ["-m", module] if module == OURS else ["-c", runner]
    return [sys.executable, *how, *flags]


def environment(**variables: str) -> dict[str, str]:
    """This process's, without a way to the network's model hub and without an API key."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MLX_HYBRIDCACHE")}
    return {**kept, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", **variables}


@dataclass
class Stream:
    """What a stream carried: its comments, its JSON events, and whether `[DONE]` came last."""

    status: int
    headers: dict[str, str]
    comments: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False

    @property
    def choices(self) -> list[dict[str, Any]]:
        """All choices of all events, in order."""
        return [choice for event in self.events for choice in event.get("choices", ())]

    @property
    def usage(self) -> dict[str, Any] | None:
        """The last usage that was told."""
        return next((e["usage"] for e in reversed(self.events) if e.get("usage")), None)

    def joined(self, index: int = 0) -> dict[str, Any]:
        """The choice that the deltas add up to, in the shape of a reply that is not streamed."""
        whole: dict[str, Any] = {"finish_reason": None, "message": {}, "text": ""}
        for choice in self.choices:
            if choice["index"] != index:
                continue
            whole["finish_reason"] = choice["finish_reason"] or whole["finish_reason"]
            whole["text"] += choice.get("text") or ""
            if choice.get("logprobs"):
                told = whole.setdefault("logprobs", {})
                for name, values in choice["logprobs"].items():
                    if values is not None:
                        told.setdefault(name, []).extend(values)
            for name, value in choice.get("delta", {}).items():
                if name == "tool_calls":
                    _join_calls(whole["message"].setdefault(name, []), value or ())
                elif name == "role":
                    whole["message"]["role"] = value
                elif value is not None:
                    whole["message"][name] = whole["message"].get(name, "") + value
        return whole


def _join_calls(calls: list[dict[str, Any]], deltas: list[dict[str, Any]]) -> None:
    for delta in deltas:
        if delta["index"] == len(calls):
            calls.append({"function": {"name": "", "arguments": ""}})
        call, function = calls[delta["index"]], delta.get("function", {})
        call.update({name: delta[name] for name in ("id", "type") if delta.get(name)})
        for name in ("name", "arguments"):
            call["function"][name] += function.get(name) or ""


def read_stream(lines: Iterator[str], stream: Stream) -> Iterator[str]:
    """Sort server-sent lines into `stream`; yields each line's kind as it is read."""
    for line in lines:
        if not line:
            continue
        assert not stream.done, f"after [DONE] came {line!r}"
        if line.startswith(":"):
            stream.comments.append(line[1:].strip())
            yield "comment"
        elif line == "data: [DONE]":
            stream.done = True
            yield "done"
        else:
            assert line.startswith("data: "), line
            stream.events.append(json.loads(line.removeprefix("data: ")))
            yield "event"


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of Anthropic's streams, each named as its type. Pings and comments are left out."""
    events = []
    for part in text.split("\n\n"):
        lines = [line for line in part.split("\n") if line and not line.startswith(":")]
        if lines and lines != ["event: ping", 'data: {"type":"ping"}']:
            name, data = lines
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}", part
    return events


class Server:
    """A server process on a port of its own. It can be started again when a request ended it."""

    def __init__(self, module: str, *flags: str, **variables: str) -> None:
        self.module = module
        self.flags = flags
        self.variables = variables
        self.port = free_port()
        self.process: forks.Running | None = None
        self._seen = 0
        self._log = tempfile.NamedTemporaryFile(suffix=".log")  # noqa: SIM115  # lives as long as the server
        self.client = httpx2.Client(base_url=self.url, timeout=PATIENCE_SECONDS, trust_env=False)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What it wrote so far, stdout and stderr."""
        return Path(self._log.name).read_text(errors="replace")

    def newly_logged(self) -> str:
        """What it wrote since this was last asked."""
        log = self.log
        new, self._seen = log[self._seen :], len(log)
        return new

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def healthy(self) -> bool:
        """Whether it answers 200 on /health."""
        try:
            return bool(self.client.get("/health").status_code == 200)
        except httpx2.TransportError:
            return False

    def start(self) -> Server:
        """Start it and wait until it is healthy."""
        where = ["--port", str(self.port)]
        if self.module == THEIRS:  # ours serves the bundled model without being told
            where += ["--model", str(BUNDLED_MODEL)]
        self._seen = 0
        Path(self._log.name).write_bytes(b"")
        self.process = _started(
            self.module, [*where, *self.flags], self._log.name, self._log.name, **self.variables
        )
        until = time.monotonic() + PATIENCE_SECONDS
        while not self.healthy:
            assert self.alive, f"{self.module} ended at its start:\n{self.log}"
            assert time.monotonic() < until, f"{self.module} does not answer:\n{self.log}"
            time.sleep(0.05)
        return self

    def revive(self) -> None:
        """Start it again if a request ended it, or its generation thread."""
        if not self.healthy:
            self.kill()
            self.start()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        """End it whatever it is doing, and reap it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """End it and let everything go."""
        self.kill()
        self.client.close()
        self._log.close()

    # Requests

    def post(self, path: str, /, **body: Any) -> httpx2.Response:
        """Post a JSON body."""
        return self.client.post(path, json=body)

    def answer(self, path: str, /, **body: Any) -> dict[str, Any]:
        """Post a JSON body that is expected to be answered with 200; the reply."""
        response = self.post(path, **body)
        assert response.status_code == 200, f"{response.status_code}: {response.text}"
        reply = response.json()
        assert isinstance(reply, dict)
        return reply

    def stream(self, path: str, /, **body: Any) -> Stream:
        """Post a JSON body with `stream: true` and read to the end."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            stream = Stream(response.status_code, dict(response.headers))
            if response.status_code != 200:
                response.read()
                raise AssertionError(f"{response.status_code}: {response.text}")
            for _ in read_stream(response.iter_lines(), stream):
                pass
        return stream


@contextmanager
def running(module: str, *flags: str, **variables: str) -> Iterator[Server]:
    """A started server; ours must end with status 0 when told to."""
    server = Server(module, *flags, **variables)
    try:
        yield server.start()
        if module == OURS:
            assert server.alive, f"it ended:\n{server.log}"
            assert server.stop() == 0
            assert "Traceback" not in (log := server.newly_logged()), log
    finally:
        server.close()


def run_to_its_end(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Start ours with flags that it must refuse, at a port that is free unless they name one."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        for file in (out, err):
            file.touch()
        process = _started(OURS, ["--port", "0", *flags], str(out), str(err), **variables)
        try:
            status = process.wait(PATIENCE_SECONDS)
        finally:
            process.kill()
        return subprocess.CompletedProcess(flags, status, out.read_text(), err.read_text())


def _started(module: str, flags: list[str], out: str, err: str, **variables: str) -> forks.Running:
    """A server's process. Other variables than ours may matter to what is imported."""
    where = environment(**variables)
    if all(name.startswith("MLX_HYBRIDCACHE") for name in variables):
        return forks.start([module, *flags], out, err, where)
    with Path(out).open("ab") as stdout, Path(err).open("ab") as stderr:
        return subprocess.Popen(
            command(module, *flags),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=where,
        )


def user(text: str) -> list[dict[str, Any]]:
    """A conversation of one user message."""
    return [{"role": "user", "content": text}]


INSTANT = {"chat_template_kwargs": {"enable_thinking": False}}
"""Makes the bundled model answer without reasoning first."""


def begin(server: Server, sent: bytes, *, wait_seconds: float = 30) -> socket.socket:
    """A connection that has sent these bytes, and waits at most so long for each answer."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=wait_seconds)
    connection.sendall(sent)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes, or nothing comes any more. Closes the connection."""
    received = b""
    with connection:
        try:
            while part := connection.recv(65536):
                received += part
        except (TimeoutError, ConnectionResetError):
            pass
    return received


def raw_exchange(server: Server, sent: bytes, *, wait_seconds: float = 30) -> bytes:
    """Send bytes as they are and read the answer to its end."""
    try:
        return read_all(begin(server, sent, wait_seconds=wait_seconds))
    except (BrokenPipeError, ConnectionResetError):
        return b""


def raw_status(received: bytes) -> int:
    """The status of a raw HTTP reply; 0 when there was none."""
    words = received.split(b" ", 2)
    return int(words[1]) if received.startswith(b"HTTP/1.") else 0


def raw_post(path: str, body: bytes, **headers: str) -> bytes:
    """A POST as bytes, on a connection that is closed behind it."""
    given = {"Host": "127.0.0.1", "Connection": "close", "Content-Type": "application/json"}
    given |= {"Content-Length": str(len(body))}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"POST {path} HTTP/1.1", *(f"{n}: {v}" for n, v in given.items() if v)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
