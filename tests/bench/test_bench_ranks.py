"""`bench ranks`: groups of both servers, asked the same in turns. Times are never asserted."""

import json
from pathlib import Path

import pytest
from mlx_hybridcache_bench import cli
from mlx_hybridcache_bench.serving.servers import OURS, THEIRS


@pytest.mark.timeout(600)
def test_both_groups_answer_and_are_measured_in_turns(tmp_path: Path) -> None:
    found = tmp_path / "ranks.json"
    assert cli.main(["ranks", "--quick", "--json", str(found)]) == 0
    told = json.loads(found.read_text())
    assert [each["name"] for each in told["sides"]] == [THEIRS, OURS]
    assert [len(each["first"]) for each in told["sides"]] == [2, 2]
    assert [each["target"] for each in told["figures"]] == [1.05, 1.05]
