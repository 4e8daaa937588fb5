"""`mlx-hybridcache explain`: two requests without a server, one with it, and what stands in the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from servers import OURS, free_port, running
from test_start import COMMAND, HEAVY, run
from texts.changed_requests import PLANTED, pair

from mlx_hybridcache.cli.agents import KEY
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
        assert f"the key is read from {KEY}" in capsys.readouterr().err
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
    model = ["--model", str(BUNDLED_MODEL)]
    for words, said in (
        ([files[0], "--url", nobody], "No server of mlx_hybridcache answers"),
        ([str(tmp_path / "missing.json")], "does not exist"),
        ([str(tmp_path / "list.json")], "holds no JSON object"),
        ([str(tmp_path / "none.json")], "is not JSON"),
        ([files[0], str(tmp_path / "other.json"), *model], "This is no request"),
        ([*files, files[0]], "3 requests were named"),
        ([files[0], *model], "only a server knows"),
        ([*files, *model, "--url", nobody], "leave out one of them"),
        ([*files, "--model", str(tmp_path / "no-model")], "found nothing there"),
        ([*files, "--model", str(tmp_path)], "could not be read"),
    ):
        assert main(["explain", *words]) == 2, words
        assert said in capsys.readouterr().err, words


def test_a_server_is_asked_without_mlx(files):
    """Nothing is computed here."""
    url = f"http://127.0.0.1:{free_port()}"
    status, imported, _ = run(COMMAND, "explain", files[0], "--url", url)
    assert status == 2
    assert not (HEAVY | {"numpy"}) & set(imported)
