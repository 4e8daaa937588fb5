"""`verify --distributed`: hot against cold on the ranks themselves."""

import pytest
from long import mostly_long
from ranks.started import group_of

from mlx_hybridcache.verify import Comparison, Point, Proof

COMMAND = "mlx_hybridcache.cli"
VERIFY = ("verify", "--distributed")


@pytest.mark.parametrize(
    ("family", "how"),
    mostly_long(
        [("qwen3_next", "pipeline"), ("qwen3_5", "tensor"), ("qwen3_moe", "pipeline")],
        always=[("qwen3_next", "pipeline")],
    ),
)
@pytest.mark.parametrize("fault", [None, "broken"])
def test_a_proof_holds_on_ranks_unless_what_is_restored_is_off(tmp_path, family, how, fault):
    if fault and family == "qwen3_moe":
        pytest.skip("it has no state to be off")
    asked = [family, how, *([fault] if fault else [])]
    with group_of(2, tmp_path, *asked, module="ranks.verifying") as ranks:
        holds, worst = ranks[0].hears("holds")[0], ranks[0].hears("worst")[0]
        restored = ranks[0].hears("restored")[0]
        assert [rank.ends() for rank in ranks] == [0, 0], ranks[1].printed
    assert (holds, worst > 0) == (fault is None, fault is not None)
    assert len(restored) > 5
    assert all(position == found for position, found in restored)


def test_points_that_had_to_go_prove_nothing():
    points = (Point(100, 64, 109, Comparison(0.0, 0.0, None)),)
    assert Proof(0.0, 0.0, points).holds
    assert not Proof(0.0, 0.0, points, gone=1).holds


def test_the_command_says_it_on_rank_0_alone(tmp_path):
    asked = [*VERIFY, "--pipeline", "--tokens", "100", "--prefill-step-size", "64"]
    with group_of(2, tmp_path, *asked, module=COMMAND) as ranks:
        assert [rank.ends() for rank in ranks] == [0, 0], ranks[0].printed
        assert "worst restore 0: it holds" in ranks[0].printed
        assert ranks[1].printed.strip() == ""


def test_what_ranks_cannot_do_is_said_before_any_meets_another(tmp_path):
    with group_of(2, tmp_path, *VERIFY, "--kv-bits", "4", module=COMMAND) as ranks:
        assert [rank.ends() for rank in ranks] == [2, 2], ranks[0].printed
        for rank in ranks:
            assert "cannot be used with several ranks yet" in rank.printed
