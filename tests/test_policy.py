"""What is let go first, as numbers."""

from mlx_hybridcache.policy import Candidate, least_useful


def test_what_saves_fewest_tokens_per_byte_goes_first():
    """64 tokens of replay against 2,048 for the same bytes."""
    near = Candidate(gap_tokens=64, freed_bytes=100, age_ticks=0, is_anchor=False)
    far = Candidate(gap_tokens=2048, freed_bytes=100, age_ticks=0, is_anchor=False)
    assert least_useful([far, near]) == 1


def test_what_was_used_longest_ago_goes_first():
    """The same checkpoint, used now and nine requests ago."""
    new = Candidate(gap_tokens=500, freed_bytes=100, age_ticks=0, is_anchor=False)
    old = Candidate(gap_tokens=500, freed_bytes=100, age_ticks=9, is_anchor=False)
    assert least_useful([new, old]) == 1


def test_prompt_ends_and_branch_points_go_last():
    """An interior checkpoint goes before an anchor a hundred times less useful."""
    anchor = Candidate(gap_tokens=10, freed_bytes=100, age_ticks=5, is_anchor=True)
    interior = Candidate(gap_tokens=1000, freed_bytes=100, age_ticks=0, is_anchor=False)
    assert least_useful([anchor, interior]) == 1


def test_what_frees_more_goes_first():
    """A leaf that takes its rows along frees ten times as much for the same replay."""
    light = Candidate(gap_tokens=500, freed_bytes=100, age_ticks=0, is_anchor=False)
    heavy = Candidate(gap_tokens=500, freed_bytes=1000, age_ticks=0, is_anchor=False)
    assert least_useful([light, heavy]) == 1
