"""What is let go first, as numbers."""

from dataclasses import replace
from itertools import pairwise

from mlx_hybridcache.policy import Candidate, least_useful

SOME = Candidate(
    gap_tokens=500,
    below_tokens=500,
    to_end_tokens=4000,
    freed_bytes=100,
    age_ticks=0,
    is_anchor=False,
)


def goes_first(one: Candidate, other: Candidate) -> bool:
    """`one` goes before `other`, in whichever order they are listed."""
    return (least_useful([one, other]), least_useful([other, one])) == (0, 1)


def test_what_saves_fewest_tokens_goes_first():
    """64 tokens of replay against 2,048."""
    assert goes_first(replace(SOME, gap_tokens=64), replace(SOME, gap_tokens=2048))


def test_what_was_used_longest_ago_goes_first():
    """The same checkpoint, used nine requests ago and now."""
    assert goes_first(replace(SOME, age_ticks=9), SOME)


def test_what_frees_more_goes_first():
    """A leaf that takes its rows along frees ten times as much for the same replay."""
    assert goes_first(replace(SOME, freed_bytes=1000), SOME)


def test_what_lies_further_from_the_end_goes_first():
    """The same gaps 20,000 and 1,000 tokens before the end."""
    assert goes_first(replace(SOME, to_end_tokens=20_000), replace(SOME, to_end_tokens=1000))


def test_prompt_ends_and_branch_points_go_last():
    """An interior checkpoint goes before an anchor a hundred times less useful."""
    anchor = replace(SOME, gap_tokens=5, is_anchor=True)
    assert goes_first(SOME, anchor)


def test_a_thinned_path_is_dense_near_its_end_and_sparse_further_back():
    """32 checkpoints, 2,048 apart, thinned to 8: gaps never grow towards the end, and none is lost twice."""
    length, kept = 65_536, list(range(2048, 65_536, 2048))
    while len(kept) > 8:
        bounds = [0, *kept, length]
        candidates = [
            replace(
                SOME,
                gap_tokens=bounds[i] - bounds[i - 1],
                below_tokens=bounds[i + 1] - bounds[i],
                to_end_tokens=length - bounds[i],
            )
            for i in range(1, len(bounds) - 1)
        ]
        del kept[least_useful(candidates)]
    gaps = [b - a for a, b in zip([0, *kept], kept, strict=False)]
    assert gaps[0] >= 4 * gaps[-1]
    assert all(later <= 1.5 * earlier for earlier, later in pairwise(gaps))
    assert length - kept[-1] == 2048
