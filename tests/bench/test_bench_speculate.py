"""`bench speculate`: what it counts, at a small size."""

import json
from pathlib import Path

import pytest
from mlx_hybridcache_bench import cli
from mlx_hybridcache_bench.speculate import own_replies
from mlx_hybridcache_bench.speculate.own_replies import BUNDLED_DRAFT


def test_replies_that_repeat_what_is_stored_take_fewer_forwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies of 60 tokens, two of its own, one round: counts, the same replies, and a pair of times for each."""
    monkeypatch.setattr(own_replies, "PROMPTS", 2)
    file = tmp_path / "speculate.json"
    small = ["--reply-tokens", "60", "--rounds", "1"]
    assert cli.main(["speculate", *small, "--json", str(file)]) in (0, 1)
    written = json.loads(file.read_text(encoding="utf-8"))
    assert set(written) == {"command", "machine", "figures", "workloads", "own_replies"}
    by_name = {each["name"]: each for each in written["workloads"]}
    assert len(by_name) == 4
    for each in by_name.values():
        assert each["same_tokens"]
        assert each["accepted"] <= each["drafted"]
        assert each["forwards"] <= 61
        assert len(each["seconds"]) == len(each["plain_seconds"]) == 1
    assert by_name["regenerate"]["forwards"] < 15
    assert by_name["repeat a tool's result"]["forwards"] < 35
    own = written["own_replies"]
    assert own["same"]
    assert own["forwards_per_token"] < 1 / 1.5
    assert own["accepted"] <= own["drafted"] <= own["draft_forwards"]


def test_the_bundled_models_draft_is_small() -> None:
    """All of its files, the tokenizer's included: under 1 MB."""
    files = [each for each in BUNDLED_DRAFT.iterdir() if each.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {each.name for each in files}
    assert sum(each.stat().st_size for each in files) < 10**6
