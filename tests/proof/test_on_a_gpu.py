"""`tools/on_a_gpu.sh`: its parts run on a CPU too, and its report says what did not hold."""

import pytest
from on_a_gpu import exactly, proofs
from on_a_gpu.__main__ import BENCHES, COMPARED, TIMED
from on_a_gpu.part import PARTS
from on_a_gpu.report import failures, readable

MACHINE = {
    "device": "gpu NVIDIA H200",
    "os": "Linux",
    "chip": "a CPU",
    "date": "2026-11-28",
    "python": "3.12.3",
    "mlx": "0.32.4",
    "mlx_lm": "0.32.2",
}
POINTS = {"points": 7, "cold_against_cold": 0.002, "worst": 0.0, "points_that_differ": 0}


def part(ended: str = "status 0", **found: dict) -> dict:
    """What the script keeps of a part."""
    return {"seconds": 12.0, "ended": ended, "said": "its last words", "found": found}


@pytest.fixture
def small(monkeypatch):
    """Prompts of 120 tokens in slices of 32."""
    for module, name, value in (
        (proofs, "TOKENS", 120),
        (proofs, "STEP", 32),
        (proofs, "KIND_TOKENS", 90),
        (proofs, "KIND_STEP", 32),
        (proofs, "TWICE", (1, 8)),
        (exactly, "STEPS", (64,)),
        (exactly, "SCENARIOS", {"turn behind turn": exactly.SCENARIOS["turn behind turn"]}),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("name", ["bundled float32", "kind qwen3", "replies float32"])
def test_a_part_finds_that_what_must_hold_does(name, small):
    """Default and exact mode, and replies, each compared at least once."""
    rows = [row for _, row in PARTS[name]()]
    assert all(row.get("holds", True) for row in rows)
    assert any(row.get("points", row.get("compared", 0)) > 0 for row in rows)


def test_a_reply_that_differs_is_found(small, monkeypatch):
    """One log-probability of every hot reply is moved by one bit."""
    told = exactly.hot

    def moved(*args):
        found = told(*args).copy()
        found[0, 0] += 1e-4
        return found

    monkeypatch.setattr(exactly, "hot", moved)
    ((_, row),) = exactly.replies("float32")
    assert (row["differing"], row["holds"]) == (row["replies"], False)


def test_of_a_model_that_does_not_repeat_itself_nothing_is_said(small, monkeypatch):
    """Its logits, read twice by plain mlx-lm, are no numbers: that is said, and no proof is tried."""
    monkeypatch.setattr(
        proofs, "control", lambda *args: {"logits": 10, "that_differ": 10, "steady": False}
    )
    found = dict(proofs.bundled("float32"))
    assert list(found) == ["bundled, float32, plain mlx-lm twice"]
    told = readable({"machine": MACHINE, "parts": {"bundled": part(**found)}, "failed": []})
    assert "10 of 10 logits differ or are no numbers" in told


def test_the_report_names_what_failed_and_what_did_not_run():
    """A point that differs, a part that was stopped; what holds is summed up."""
    parts = {
        "kind qwen3": part(**{"rows: qwen3, exact": {**POINTS, "holds": True}}),
        "kind jamba": part(**{"paused: jamba, exact": {**POINTS, "holds": False}}),
        "recurrence": part("stopped: no time was left"),
    }
    failed = failures(parts)
    assert failed == ["kind jamba: paused: jamba, exact", "recurrence: stopped: no time was left"]
    told = readable({"machine": MACHINE, "parts": parts, "failed": failed})
    assert told.startswith("# On gpu NVIDIA H200\n")
    assert "exact mode: 0 restore points with differing logits, of 14" in told
    assert "its last words" in told


def test_every_part_is_run_once():
    """Beside the others or alone; the benches are those of `mlx-hybridcache bench`."""
    assert sorted([*COMPARED, *TIMED]) == sorted([*PARTS, *BENCHES])
