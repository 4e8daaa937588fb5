"""What is let go first, as numbers."""

from dataclasses import replace
from itertools import pairwise

from stores.candidates import Candidate, least_useful

from mlx_hybridcache.store.eviction.policy import INTERIOR, NEAR_TOKENS, BranchRate

SOME = Candidate(
    gap_tokens=500,
    below_tokens=500,
    to_end_tokens=4000,
    freed_bytes=100,
    age_ticks=0,
    idle_ticks=0,
    returns=0,
)
END = replace(SOME, below_tokens=0, to_end_tokens=0)


def goes_first(one: Candidate, other: Candidate) -> bool:
    """`one` goes before `other`, in whichever order they are listed."""
    return (least_useful([one, other]), least_useful([other, one])) == (0, 1)


def test_what_saves_fewest_tokens_goes_first():
    """64 tokens of replay against 2,048."""
    assert goes_first(replace(SOME, gap_tokens=64), replace(SOME, gap_tokens=2048))


def test_an_end_used_longest_ago_goes_first():
    """The same end, restored nine requests ago and now."""
    assert goes_first(replace(END, age_ticks=9), END)


def test_a_middle_ages_with_its_conversation():
    """Taken long ago, in a conversation that went on just now or nine requests ago."""
    old = replace(SOME, age_ticks=50)
    assert goes_first(replace(old, idle_ticks=9), old)
    assert old.likelihood == SOME.likelihood


def test_what_frees_more_goes_first():
    """A leaf that takes its rows along frees ten times as much for the same replay."""
    assert goes_first(replace(SOME, freed_bytes=1000), SOME)


def test_what_lies_further_from_the_end_goes_first():
    """The same gaps 20,000 and 1,000 tokens before the end."""
    assert goes_first(replace(SOME, to_end_tokens=20_000), replace(SOME, to_end_tokens=1000))


def test_a_middle_goes_before_an_end():
    """Also one just before it, and one with four times the gap."""
    assert goes_first(replace(SOME, gap_tokens=2000), END)
    assert goes_first(replace(SOME, to_end_tokens=500), END)


def test_where_prompts_part_ways_is_worth_as_much_as_an_end():
    """A middle that one prompt has left, and one that three have left."""
    once, thrice = replace(SOME, returns=1), replace(SOME, returns=3)
    assert goes_first(SOME, END)
    assert goes_first(END, once)
    assert goes_first(once, thrice)


def test_of_two_that_stand_at_the_end_the_one_with_the_smaller_gap_goes():
    """The cut behind the reply's opener and the prompt's end, 4 tokens on: the end saves 4."""
    opener = replace(SOME, gap_tokens=900, below_tokens=4, to_end_tokens=4)
    assert goes_first(replace(END, gap_tokens=4), opener)
    beyond = replace(opener, to_end_tokens=NEAR_TOKENS + 1)
    assert beyond.likelihood < opener.likelihood / 2


def test_what_a_running_request_reads_on_from_is_no_end():
    """A cut that the next slice leaves behind goes before an end of the same gap."""
    assert goes_first(replace(END, goes_on=True), END)
    assert replace(END, goes_on=True).likelihood > 0


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


def test_how_far_back_prompts_part_is_learnt():
    """Nothing known: what is supposed. Thirty that part inside, then thirty that come back to the end."""
    branch_rate = BranchRate()
    assert branch_rate.interior == INTERIOR
    for _ in range(30):
        branch_rate.saw(is_inside=True)
    learnt = branch_rate.interior
    assert learnt > 4 * INTERIOR
    assert goes_first(replace(SOME, interior=INTERIOR), replace(SOME, interior=learnt))
    for _ in range(30):
        branch_rate.saw(is_inside=False)
    assert INTERIOR < branch_rate.interior < learnt / 1.5
    for _ in range(300):
        branch_rate.saw(is_inside=False)
    assert branch_rate.interior < INTERIOR
