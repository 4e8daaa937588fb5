"""The commands as they are typed."""

import subprocess
import sys

import mlx.nn as nn
import pytest

from mlx_hybridcache import models
from mlx_hybridcache.cli import main
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.layers.recurrent import RecurrentKind


def test_the_demo_shows_every_call_and_that_hot_equals_cold(capsys):
    """On a document of 600 tokens: exit status 0, eleven calls, all equal."""
    assert main(["demo", "--tokens", "600"]) == 0
    shown = capsys.readouterr().out
    assert "11 of 11 replies" in shown
    assert "the same again" in shown


def test_the_demo_reads_a_file_of_ones_own(tmp_path, capsys):
    """Any text that is long enough."""
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"Line {i} says {i * i}." for i in range(1500)))
    assert main(["demo", "--tokens", "600", "--file", str(file)]) == 0
    assert "11 of 11 replies" in capsys.readouterr().out


def test_a_wrong_reply_from_the_cache_fails_the_demo(monkeypatch, capsys):
    """A state that is lost on restore differs, and the exit status says so."""
    monkeypatch.setattr(RecurrentKind, "fill", lambda *args: None)
    assert main(["demo", "--tokens", "600"]) == 1
    assert "11 of 11" not in capsys.readouterr().out


def test_verify_holds_for_the_bundled_model_in_both_modes(capsys):
    """No difference at any restore point."""
    small = ["--tokens", "300", "--prefill-step-size", "128"]
    assert main(["verify", *small]) == 0
    assert main(["verify", *small, "--exact"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("it holds") == 2
    assert "mlx-lm 0.32" in shown


def test_verify_fails_when_a_state_is_lost(monkeypatch, capsys):
    """The same proof with restores that leave the recurrent state out."""
    monkeypatch.setattr(RecurrentKind, "fill", lambda *args: None)
    assert main(["verify", "--tokens", "300", "--prefill-step-size", "128"]) == 1
    assert "IT DOES NOT HOLD" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--model", "/no/such/model"], "found nothing there"),
        (["verify", "--model", "./nor/this"], "found nothing there"),
        (["demo", "--file", "/no/such/file"], "/no/such/file"),
        (["demo", "--tokens", "100"], "--tokens"),
        (["demo", "--memory-budget", "10KB"], "memory_budget"),
        (["demo", "--memory-budget", "lots"], "16GB"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_exit_status_2(arguments, said, capsys):
    """No traceback; the command and the reason."""
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.startswith(f"mlx-hybridcache {arguments[0]}: ")
    assert "Traceback" not in shown


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
    assert main(["verify", "--tokens", "200", "--prefill-step-size", "64"]) == 0
    assert "it holds" in capsys.readouterr().out
