"""The bench of the page runs, counts right, and writes what its README says. Timings are not asserted."""

import json
from pathlib import Path

from mlx_hybridcache_bench import cli


def test_it_counts_and_writes(tmp_path: Path) -> None:
    """Twenty conversations, two updates, no browser: nothing is asked of the worker, little is told."""
    file = tmp_path / "page.json"
    small = ["--conversations", "20", "--updates", "2", "--no-browser"]
    assert cli.main(["page", *small, "--json", str(file)]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert set(found) == {
        *("command", "machine", "conversations", "nodes", "updates", "costs", "figures")
    }
    assert found["conversations"] == 20
    assert found["nodes"] > 60
    assert found["costs"]["events"] >= 2
    assert found["costs"]["told_runs"]
    assert all(0 < each <= 3 for each in found["costs"]["told_runs"])
    counted = [figure for figure in found["figures"] if figure["counted"]]
    assert len(counted) == 2
    assert all(figure["kept"] for figure in counted)
