"""`mlx-hybridcache explain`: two requests without a server, one with it, and what stands in the way."""

from __future__ import annotations

import json
import shutil
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
from servers import OURS, free_port, running
from test_start import COMMAND, HEAVY, run
from texts.changed_requests import PLANTED, pair

from mlx_hybridcache.cli import asking
from mlx_hybridcache.cli.asking import KEY
from mlx_hybridcache.cli.main import main
from mlx_hybridcache.demo import BUNDLED_MODEL


@pytest.fixture
def files(tmp_path):
    """A pair of requests of which the second has another date."""
    drawn = pair([*PLANTED].index("date"))
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, body in zip(paths, (drawn.first, drawn.second), strict=True):
        path.write_text(json.dumps(body))
    return [str(path) for path in paths]


@pytest.fixture
def without_weights(tmp_path):
    """The bundled model's folder without what would have to be loaded."""
    made = shutil.copytree(BUNDLED_MODEL, tmp_path / "model")
    for file in made.glob("*.safetensors"):
        file.unlink()
    return str(made)


def test_two_requests_are_compared_by_a_tokenizer_alone(files, without_weights, capsys):
    """In words and as JSON: the kind, where it stands, both letters, the cost, what to do. 1: something changed."""
    assert main(["explain", *files, "--model", without_weights]) == 1
    said = capsys.readouterr().out
    for each in ("A date or a time changed. [date]", "messages[0] (system).content", "best case"):
        assert each in said
    assert "Speed of this machine: unknown." in said
    assert "What to do: Write the day at most" in said
    assert main(["explain", *files, "--model", without_weights, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert f"{told['again_tokens']:,}  read again" in said
    assert (
        told["again_tokens"] + told["restored_tokens"] + told["new_tokens"] == told["prompt_tokens"]
    )
    assert main(["explain", files[0], files[0], "--model", without_weights]) == 0
    assert "Both prompts are the same." in capsys.readouterr().out


def test_a_server_is_asked_with_its_key(files, capsys, monkeypatch):
    """What it would restore of one request; of two with what it has stored."""
    with running(OURS, MLX_HYBRIDCACHE_API_KEY="a-key") as server:
        assert main(["explain", files[0], "--url", server.url]) == 2
        assert f"it wants a key: set {KEY}" in capsys.readouterr().err
        monkeypatch.setenv(KEY, "another")
        assert main(["explain", files[0], "--url", server.url]) == 2
        assert f"it does not know the key in {KEY}" in capsys.readouterr().err
        monkeypatch.setenv(KEY, "a-key")
        assert main(["explain", files[0], "--url", server.url]) == 1
        assert "Nothing is stored that begins like this prompt." in capsys.readouterr().out
        server.client.headers["Authorization"] = "Bearer a-key"
        first = json.loads(Path(files[0]).read_text())
        server.answer("/v1/chat/completions", **first, max_tokens=1)
        assert main(["explain", *files, "--url", server.url, "--endpoint", "chat"]) == 1
        said = capsys.readouterr().out
        assert "[date]" in said
        assert "where the server's cache has them now" in said
        assert "tokens a second" in said
        assert main(["explain", files[1], "--url", server.url]) == 1
        assert "shown with --show-prompts" in capsys.readouterr().out


def test_what_stands_in_the_way_is_said(files, tmp_path, capsys):
    """2, and a sentence: no server, no request, no JSON, too many, and flags that do not go together."""
    nobody = f"http://127.0.0.1:{free_port()}"
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "none.json").write_text("{")
    (tmp_path / "other.json").write_text('{"model": "x"}')
    (tmp_path / "bytes.json").write_bytes(bytes(range(256)))
    (tmp_path / "nan.json").write_text('{"prompt": "x", "temperature": NaN}')
    (tmp_path / "deep.json").write_text(f'{{"messages": {"[" * 100_000}')
    model = ["--model", str(BUNDLED_MODEL)]
    for words, said in (
        ([files[0], "--url", nobody], "No server answers"),
        ([str(tmp_path / "missing.json")], "does not exist"),
        ([str(tmp_path / "list.json")], "holds no JSON object"),
        ([str(tmp_path / "none.json")], "is not JSON"),
        ([str(tmp_path)], "is a directory, where a file is needed"),
        ([str(tmp_path / "bytes.json")], "is no text in UTF-8"),
        ([str(tmp_path / "nan.json")], "NaN is no number"),
        ([str(tmp_path / "deep.json")], "maximum recursion depth"),
        ([files[0], "--url", "localhost:8080"], "is no server's address"),
        ([files[0], "--url", "http://localhost:http"], "is no server's address"),
        ([files[0], str(tmp_path / "other.json"), *model], "This is no request"),
        ([*files, files[0]], "3 requests were named"),
        ([files[0], *model], "only a server knows"),
        ([*files, *model, "--url", nobody], "leave out one of them"),
        ([*files, "--model", str(tmp_path / "no-model")], "found nothing there"),
        ([*files, "--model", str(tmp_path)], "could not be read"),
    ):
        assert main(["explain", *words]) == 2, words
        assert said in capsys.readouterr().err, words


class Odd(BaseHTTPRequestHandler):
    """A server that answers with `said` once it has been asked for its models."""

    models = b'{"data": [{"id": "x", "owned_by": "local"}]}'
    said: ClassVar[list[bytes]] = []
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self._send(b"HTTP/1.1 200 OK\r\n\r\n" + self.models)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send(self.said.pop())

    def _send(self, raw: bytes) -> None:
        self.wfile.write(raw)
        self.close_connection = True

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def odd(monkeypatch):
    monkeypatch.setenv(KEY, "a-key")
    with HTTPServer(("127.0.0.1", 0), Odd) as server:
        serving = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


def test_whatever_a_server_answers_one_sentence_is_said(odd, files, capsys, monkeypatch):
    """Pages, other objects, half an answer, no HTTP, a redirect, which is not followed, as the key would go along."""
    ok, refused = b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 400 No\r\n\r\n"
    for raw, said in (
        (ok + b"<html>", "The answer lacks what this version shows"),
        (ok + b"[]", "The answer lacks"),
        (ok + b"[" * 100_000, "The answer lacks"),
        (ok + b'{"is_hot": true, "change": 5}', "The answer lacks"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{",
            "HTTP",
        ),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "does not speak HTTP to its end"),
        (b"", "hung up. It may take no body so large"),
        (f"HTTP/1.1 302 Go\r\nLocation: {odd}/else\r\n\r\n".encode(), "answers 302"),
        (refused + b'{"error": {"message": "No \\u001b[2J\\ud800."}}', "400: No \\x1b[2J\\ud800."),
        (refused + b'{"error": {"message": 5}}', "400: no reason is given."),
    ):
        Odd.said.append(raw)
        assert main(["explain", files[0], "--url", odd]) == 2, raw
        assert said in capsys.readouterr().err, raw
    assert {*Odd.asked} == {"/v1/models"}
    for page in (b"<html>", b"{}", b'{"data": [{"owned_by": "them"}]}'):
        monkeypatch.setattr(Odd, "models", page)
        assert main(["explain", files[0], "--url", odd]) == 2
        assert "is no mlx_hybridcache.server" in capsys.readouterr().err
    for key in ("a\nSecret", "Secr\N{EURO SIGN}t"):
        monkeypatch.setenv(KEY, key)
        assert main(["explain", files[0], "--url", odd]) == 2
        said = capsys.readouterr().err
        assert f"{KEY} has letters that no header can hold" in said
        assert "Secr" not in said


def test_a_server_that_never_answers_is_left(files, capsys, monkeypatch):
    """Ours says what it serves at once, whatever it has to do."""
    monkeypatch.setattr(asking, "LOOK_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert main(["explain", files[0], "--url", url]) == 2
        assert f"{url} has not answered within 0.1 seconds" in capsys.readouterr().err


def test_what_is_no_character_is_read_and_shown_as_text(tmp_path, without_weights, capsys):
    """Half a surrogate pair as every endpoint reads it; a tool's name moves no cursor, and ends no line."""
    paths = []
    for name in ("\\ud83d", "\\u001b[2J\\nWhat to do: nothing"):
        tool = f'{{"type": "function", "function": {{"name": "{name}", "parameters": {{}}}}}}'
        paths.append(tmp_path / f"{len(paths)}.json")
        paths[-1].write_text(
            f'{{"messages": [{{"role": "user", "content": "{name}"}}], "tools": [{tool}]}}'
        )
    assert main(["explain", *map(str, paths), "--model", without_weights]) == 1
    said = capsys.readouterr().out
    assert "\\x1b[2J\\nWhat to do: nothing" in said
    assert "\x1b" not in said
    assert said.count("\nWhat to do: ") == 1
    assert main(["explain", *map(str, paths[::-1]), "--model", without_weights]) == 1
    assert "\N{REPLACEMENT CHARACTER}" in capsys.readouterr().out


def test_a_server_is_asked_without_mlx(files):
    """Nothing is computed here."""
    url = f"http://127.0.0.1:{free_port()}"
    status, imported, _ = run(COMMAND, "explain", files[0], "--url", url)
    assert status == 2
    assert not (HEAVY | {"numpy"}) & set(imported)
