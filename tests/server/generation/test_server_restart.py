"""The cache across restarts of the server, over HTTP, with real processes."""

import pytest
from bundled import text
from long import forms
from servers import COMPLETIONS, OURS, run_to_its_end, running

STRIDE = 2048


@pytest.fixture(scope="module", params=forms(2_500, 12_000))
def length(request):
    """Tokens of the prompt: more than one stride."""
    return request.param


def ask(server, length):
    """The reply's choices with every logprob float, and how many prompt tokens were cached."""
    reply = server.answer(COMPLETIONS, prompt=text(length), max_tokens=8, logprobs=3)
    return reply["choices"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture(scope="module")
def cold(length):
    """The reply of a server that keeps nothing."""
    with running(OURS, "--prompt-cache-size", "0") as server:
        choices, cached = ask(server, length)
    assert cached == 0
    return choices


def test_a_restarted_server_replays_at_most_a_stride(tmp_path, length, cold):
    """Many tokens, stopped and started anew: at most 2,048 are read, and every bit is the cold one."""
    flags = ("--cache-dir", str(tmp_path / "prompts"), "--cache-disk-bytes", "1GB")
    with running(OURS, *flags) as server:
        assert ask(server, length) == (cold, 0)
    with running(OURS, *flags) as server:
        disk = server.client.get("/v1/cache").json()["disk"]
        assert disk["is_writer"]
        assert disk["checkpoints"] > length // STRIDE
        assert 0 < disk["held_bytes"] <= disk["budget_bytes"] == 10**9
        choices, cached = ask(server, length)
        assert choices == cold
        assert cached >= length - STRIDE
        (recent,) = server.client.get("/v1/cache/recent").json()["data"]
        assert (recent["tier"], recent["reason"]) == ("disk", "exact")
        assert "mlx_hybridcache_disk_read_bytes" in server.client.get("/metrics").text


def test_forgetting_deletes_the_files(tmp_path):
    """DELETE /v1/cache: nothing is left to read, in memory or in the directory."""
    with running(OURS, "--cache-dir", str(tmp_path)) as server:
        server.answer(COMPLETIONS, prompt="The if statement", max_tokens=2)
        server.client.delete("/v1/cache")
    assert list((tmp_path / "segments").rglob("*.safetensors")) == []


def test_a_directory_that_cannot_be_used_is_said_at_the_start(tmp_path):
    """A file of that name: one line, exit status 2."""
    (tmp_path / "file").write_text("here", encoding="utf-8")
    ended = run_to_its_end("--cache-dir", str(tmp_path / "file"))
    assert ended.returncode == 2
    assert "cannot be used" in ended.stderr.splitlines()[-1]
