"""`bench speculate`: what it counts, at a small size."""

import json
from pathlib import Path

from mlx_hybridcache_bench import cli


def test_replies_that_repeat_what_is_stored_take_fewer_forwards(tmp_path: Path) -> None:
    """Replies of 60 tokens, one round: counts, the same replies, and a pair of times for each."""
    file = tmp_path / "speculate.json"
    small = ["--reply-tokens", "60", "--rounds", "1"]
    assert cli.main(["speculate", *small, "--json", str(file)]) in (0, 1)
    written = json.loads(file.read_text(encoding="utf-8"))
    assert set(written) == {"command", "machine", "figures", "workloads"}
    by_name = {each["name"]: each for each in written["workloads"]}
    assert len(by_name) == 4
    for each in by_name.values():
        assert each["same_tokens"]
        assert each["accepted"] <= each["drafted"]
        assert each["forwards"] <= 61
        assert len(each["seconds"]) == len(each["plain_seconds"]) == 1
    assert by_name["regenerate"]["forwards"] < 15
    assert by_name["repeat a tool's result"]["forwards"] < 35
