"""The commands as they are typed."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import forks
import mlx.nn as nn
import pytest
from directories import faults
from places import SUPPORT

import mlx_hybridcache.demo.run as demo
from mlx_hybridcache import models
from mlx_hybridcache.caches.kinds.recurrent import RecurrentKind
from mlx_hybridcache.caches.quantizing.cache import QuantizingCache
from mlx_hybridcache.cli.main import main
from mlx_hybridcache.demo import BUNDLED_MODEL, process
from mlx_hybridcache.demo.client import REPLY_TOKENS, TOP_LOGPROBS, Client, Reply

LOSES_STATES = """
from mlx_hybridcache.caches.kinds.recurrent import RecurrentKind
RecurrentKind.fill = lambda *args: None
"""
"""A `sitecustomize` for a server whose restores leave the recurrent state out."""


@pytest.fixture
def servers(monkeypatch):
    """The processes that the demo starts, forked ones. None may be left at the test's end."""
    yield from recorded(monkeypatch, forks.popen if sys.platform == "linux" else subprocess.Popen)


@pytest.fixture
def new_interpreters(monkeypatch):
    """The same, each started as a user's is."""
    yield from recorded(monkeypatch, subprocess.Popen)


def recorded(monkeypatch, start):
    started = []

    def popen(*args, **kwargs):
        started.append(start(*args, **kwargs))
        return started[-1]

    replaced = SimpleNamespace(**{**vars(subprocess), "Popen": popen})
    monkeypatch.setattr(process, "subprocess", replaced)
    yield started
    left = [each for each in started if each.returncode is None]
    for each in left:
        each.kill()
        each.wait()
    assert not left


def signal_soon(number):
    """Send this process a signal while it waits for the server."""
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()


def test_the_demo_shows_every_call_and_that_hot_equals_cold(tmp_path, monkeypatch, capsys, servers):
    """On 600 tokens of a file of one's own: exit status 0, eleven calls, all equal, one server, stopped.

    Compared are text, reasoning, and for each of 12 tokens its log-probability and the five likeliest.
    """
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"Line {i} says {i * i}." for i in range(1500)))
    seen = []
    run = demo.run
    monkeypatch.setattr(demo, "run", lambda *given, **how: seen.extend(run(*given, **how)) or seen)
    assert main(["demo", "--tokens", "600", "--file", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "11 of 11 replies" in shown
    assert "the same again" in shown
    assert "matched restored" in shown, "the words of reports"
    assert [server.returncode for server in servers] == [0]
    assert [one.name for one in seen if one.hot.cached_tokens == one.hot.prompt_tokens - 1] == [
        "the same again"
    ]
    for one in seen:
        assert one.cold.cached_tokens == 0 < one.cold.first_token_seconds
        assert one.hot.cached_tokens <= one.matched_tokens <= one.hot.prompt_tokens
        assert one.hot.text or one.hot.reasoning
        assert one.hot.finish_reason in ("stop", "length")
        assert len(one.hot.steps) == REPLY_TOKENS or one.hot.finish_reason == "stop"
        assert {len(step) for step in one.hot.steps} == {1 + TOP_LOGPROBS}
    assert any(one.hot.reasoning for one in seen)


@pytest.mark.usefixtures("new_interpreters")
def test_a_wrong_reply_from_the_cache_fails_the_demo(tmp_path, monkeypatch, capsys):
    """A server that loses a state on restore answers otherwise, and the exit status says so; of its calls the
    first three are made.
    """
    calls = demo.calls
    monkeypatch.setattr(demo, "calls", lambda *given: calls(*given)[:3])
    (tmp_path / "sitecustomize.py").write_text(LOSES_STATES)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{SUPPORT}", prepend=os.pathsep)
    assert main(["demo", "--tokens", "600"]) == 1
    shown = capsys.readouterr().out
    assert "the same again" in shown
    assert "3 of 3" not in shown


REPLY = Reply("The", "So.", "stop", ((("The", -1.5), ("The", -1.5), ("A", -2.0)),), 9, 0, 1.0)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (replace(REPLY, cached_tokens=8, first_token_seconds=0.1), 0),
        (replace(REPLY, steps=((("The", -1.5), ("The", -1.5), ("A", -2.25)),)), 0.25),
        (replace(REPLY, steps=((("The", -1.5), ("The", -1.5), ("An", -2.0)),)), float("inf")),
        (replace(REPLY, steps=((("A", -1.5), ("The", -1.5), ("A", -2.0)),)), float("inf")),
        (replace(REPLY, steps=()), float("inf")),
        (replace(REPLY, text="the"), float("inf")),
        (replace(REPLY, reasoning=""), float("inf")),
        (replace(REPLY, finish_reason="length"), float("inf")),
    ],
)
def test_replies_are_compared_by_all_that_they_say(other, difference):
    """A quarter of a nat at one of the likeliest is seen; what was re-used and the clock are not."""
    assert REPLY.difference(other) == difference


def test_ctrl_c_while_the_server_starts_stops_it(monkeypatch, servers):
    """Exit status 130, as shells say it, and no process is left."""
    from mlx_hybridcache.demo.process import Server

    wait = Server.wait_until_ready
    monkeypatch.setattr(
        Server, "wait_until_ready", lambda self: signal_soon(signal.SIGINT) or wait(self)
    )
    # Whoever runs the tests in the background may have them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["demo"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(servers) == 1


def test_being_told_to_end_in_the_middle_of_a_call_stops_the_server(monkeypatch, servers):
    """SIGTERM would end the demo at once, and leave the server behind."""
    ask = Client.ask
    monkeypatch.setattr(
        Client,
        "ask",
        lambda self, *args, **kwargs: signal_soon(signal.SIGTERM) or ask(self, *args, **kwargs),
    )
    with pytest.raises(SystemExit) as ended:
        main(["demo"])
    assert ended.value.code == 128 + signal.SIGTERM
    assert [server.returncode for server in servers] == [0]


def test_without_openais_client_the_demo_says_what_to_install(monkeypatch, capsys, servers):
    """One sentence, before anything is started."""
    monkeypatch.setitem(sys.modules, "openai", None)
    assert main(["demo"]) == 2
    assert 'pip install "mlx-hybridcache[demo]"' in capsys.readouterr().err
    assert not servers


SMALL = ["--tokens", "160", "--prefill-step-size", "64"]
"""Points at every kind of cut: early ones, ends of steps, branches and ends of prompts."""


def test_verify_holds_for_the_bundled_model_in_both_modes(capsys):
    """No difference at any restore point."""
    assert main(["verify", *SMALL]) == 0
    assert main(["verify", *SMALL, "--exact"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("it holds") == 2
    assert "mlx-lm 0.32" in shown


def test_verify_fails_when_a_state_is_lost(monkeypatch, capsys):
    """The same proof with restores that leave the recurrent state out."""
    monkeypatch.setattr(RecurrentKind, "fill", lambda *args: None)
    assert main(["verify", *SMALL]) == 1
    assert "IT DOES NOT HOLD" in capsys.readouterr().out


QUANTIZED = [*SMALL, "--kv-bits", "4"]


def test_verify_holds_with_quantized_keys_and_values(capsys):
    """In both modes, at points before the start, 53, and behind it; from the first token on too."""
    for more in ([], ["--exact"], ["--quantized-kv-start", "0", "--kv-group-size", "32"]):
        assert main(["verify", *QUANTIZED, *more]) == 0
    shown = capsys.readouterr().out
    assert shown.count("allowed 0, worst restore 0: it holds") == 3
    assert shown.count("have 4 bits from position 53 on") == 2
    assert "have 4 bits from position 0 on" in shown


def test_verify_holds_quantized_rows_against_those_of_mlx_lm(monkeypatch, capsys):
    """Rows that are a twentieth larger than those: a comparison among caches of ours would pass."""
    own = QuantizingCache.quantize
    monkeypatch.setattr(QuantizingCache, "quantize", lambda self, rows: own(self, rows * 1.05))
    assert main(["verify", *QUANTIZED]) == 1
    assert "IT DOES NOT HOLD" in capsys.readouterr().out


def test_verify_says_where_kv_bits_has_no_effect(capsys):
    """Heads of 64 are no whole groups of 128: what was compared is said, and nothing passes as quantized."""
    assert main(["verify", *QUANTIZED, "--kv-group-size", "128"]) == 0
    assert "--kv-bits has no effect" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", *QUANTIZED, "--quantized-kv-start", "5k"], "is never reached"),
        (["verify", *QUANTIZED, "--store-kv", "8"], "leave store_kv and store_state out"),
        (["demo", "--model", "/no/such/model"], "found nothing there"),
        (["verify", "--model", "./nor/this"], "found nothing there"),
        (["demo", "--file", "/no/such/file"], "/no/such/file"),
        (["demo", "--tokens", "100"], "--tokens"),
        (["demo", "--memory-budget", "10KB"], "memory_budget"),
        (["demo", "--memory-budget", "lots"], "16GB"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_exit_status_2(arguments, said, capsys, servers):
    """No traceback, no process left; the command and the reason."""
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.startswith(f"mlx-hybridcache {arguments[0]}: ")
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["demo", "--modle", "x"], "--model"),
        (["verify", "--exat"], "--exact"),
        (["plan", "--model", "x", "--contxt=5"], "--context"),
        (["cache", "ls", "--cache-dir", "x", "--alll"], "--all"),
        (["bench", "ttft", "--quik"], "--quick"),
    ],
)
def test_of_a_misspelt_flag_it_is_said_what_was_meant(arguments, meant, capsys):
    """`--modle` is `--model`, in commands of commands too."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"(did you mean {meant}?)\n")


def test_a_disk_that_is_full_is_said(tmp_path, capsys):
    """A plan's figures where there is room for none of them: a sentence, not a number of the system's."""
    with faults.tmpfs(tmp_path, 4 << 10):
        (tmp_path / "other").write_bytes(bytes(4 << 10))
        command = ["plan", "--model", str(BUNDLED_MODEL), "--json", str(tmp_path / "plan.json")]
        assert main(command) == 2
    assert capsys.readouterr().err.startswith(
        "mlx-hybridcache plan: The disk is full: No space left"
    )


def test_a_text_that_is_too_short_is_said(tmp_path, capsys):
    """How many tokens it has, and how many are needed."""
    file = tmp_path / "short.txt"
    file.write_text("Three little words.")
    assert main(["demo", "--file", str(file)]) == 2
    assert "needs 5,632" in capsys.readouterr().err


def test_the_module_runs_as_a_process_and_ends_cleanly():
    """No MLX thread is left to abort the interpreter at exit."""
    command = [sys.executable, "-m", "mlx_hybridcache.cli", "verify", "--tokens", "150"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "terminate called" not in done.stderr


def test_quantized_weights_verify_too(monkeypatch, capsys):
    """The bundled model at 8 bits: the same proof on other arithmetic."""
    model, tokenizer = models.load(str(BUNDLED_MODEL))
    nn.quantize(
        model, group_size=64, bits=8, class_predicate=lambda _, m: hasattr(m, "to_quantized")
    )
    monkeypatch.setattr(models, "load", lambda path: (model, tokenizer))
    assert main(["verify", *SMALL]) == 0
    assert "it holds" in capsys.readouterr().out
