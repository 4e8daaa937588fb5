"""Where checkpoints are taken, as numbers."""

from math import ceil

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_hybridcache.prefill.schedule import (
    Grid,
    Reading,
    branch_points,
    cuts_for,
    cuts_for_exact,
    cuts_for_pausing,
    cuts_in,
    slice_end,
    spaced,
)

GRID = Grid()


def slices_of(grid, reading, pauses, steps=None):
    """What is read, in slices; the k-th is at most the k-th of `steps` long."""
    slices, position = [], reading.start
    while position < reading.end:
        step = grid.step if steps is None else steps[len(slices) % len(steps)]
        slices.append((position, slice_end(position, reading.end, step, pauses)))
        position = slices[-1][1]
    return slices


readings = st.builds(
    lambda start, length, turns, branch: Reading(
        start, start + length, sorted(turns), start + branch
    ),
    st.integers(0, 9_000),
    st.integers(0, 20_000),
    st.lists(st.integers(1, 29_000), max_size=300, unique=True),
    st.integers(0, 20_000),
)
steps = st.sampled_from([64, 512, 2048])


def test_a_cold_prompt_is_cut_densely_at_its_beginning_and_at_its_end():
    """6,000 tokens: 512, 1,024, multiples of 2,048, 512 and 64 before the end, the end less one."""
    assert cuts_for(Reading(0, 5_999), GRID) == [512, 1024, 2048, 4096, 5488, 5936, 5999]


def test_turn_cuts_keep_a_quarter_step_and_the_last_two_always():
    """Turns at 70, 300, 600, 700 and 710 of 750: 70, 600 by distance, 700 and 710 as the last two."""
    cuts = cuts_for(Reading(0, 749, turn_starts=(70, 300, 600, 700, 710)), GRID)
    assert cuts == [70, 512, 600, 686, 700, 710, 749]


def test_no_checkpoint_is_spent_on_the_first_few_tokens():
    """Every ChatML prompt opens a turn at 1 and shares that token; neither is worth a checkpoint."""
    assert cuts_for(Reading(0, 200, turn_starts=(1, 30, 100), branch=1), GRID) == [100, 137, 200]


def test_the_branch_is_cut_where_prompts_part_ways():
    """Restored at 2,048, matched to 3,000: 3,000 is a cut, and so is the end."""
    assert 3000 in cuts_for(Reading(2048, 3500, branch=3000), GRID)


def test_prompts_part_ways_behind_the_first_turn_and_where_one_leaves_what_is_stored():
    """Turns open at 3, 900 and 2,000: ChatML's opener is no turn to come back to."""
    reading = Reading(0, 5_000, turn_starts=[3, 900, 2_000], branch=3_000)
    assert branch_points(reading, GRID, is_inside=True) == {900, 3_000}
    assert branch_points(reading, GRID, is_inside=False) == {900}
    assert branch_points(Reading(0, 5_000), GRID, is_inside=False) == set()


def test_declared_boundaries_are_cuts():
    """A boundary at 777 inside what is read; one outside is passed over."""
    cuts = cuts_for(Reading(0, 2000, boundaries=(777, 5000)), GRID)
    assert 777 in cuts
    assert 5000 not in cuts


def test_tails_are_cut_only_when_several_times_their_distance_is_read():
    """Reading 100 tokens takes no tail cut, reading 300 takes the one at 64."""
    assert cuts_for(Reading(5000, 5100), GRID) == [5100]
    assert cuts_for(Reading(5000, 5300), GRID) == [5237, 5300]


@settings(derandomize=True, max_examples=300, deadline=None)
@given(reading=readings, step=steps)
def test_cuts_ascend_and_lie_in_what_is_read(reading, step):
    """Every cut is in (start, end], once; an exact repeat finds one at the end."""
    grid = Grid(step, step, step // 4)
    for cuts in (cuts_for(reading, grid), cuts_for_pausing(reading, grid)):
        assert cuts == sorted(set(cuts))
        assert all(reading.start < cut <= reading.end for cut in cuts)
        assert cuts[-1:] == ([reading.end] if reading.start < reading.end else [])


@settings(derandomize=True, max_examples=300, deadline=None)
@given(reading=readings, step=steps)
def test_slices_cover_what_is_read_once_and_are_at_most_a_step(reading, step):
    """No gap, no overlap, no slice over the step, whether it is whole or shared."""
    grid = Grid(step, step, step // 4)
    pausing = cuts_for_pausing(reading, grid)
    for pauses, lengths in (((), None), (pausing, None), (pausing, [grid.step, grid.shared_step])):
        slices = slices_of(grid, reading, pauses, lengths)
        assert [b for _, b in slices[:-1]] == [a for a, _ in slices[1:]]
        assert all(0 < b - a <= step for a, b in slices)
        ends = [(slices[0][0], slices[-1][1])] if slices else []
        assert ends == ([(reading.start, reading.end)] if reading.start < reading.end else [])
        assert set(pauses) <= {b for _, b in slices}


@settings(derandomize=True, max_examples=300, deadline=None)
@given(reading=readings, step=steps)
def test_forwards_stay_within_the_bounds_however_many_turns_there_are(reading, step):
    """With the last token's own forward: + 2 captured; paused + 8 cold and + 5 hot."""
    grid = Grid(step, step, step // 4)
    replayed = reading.end + 1 - reading.start
    captured = slices_of(grid, reading, ())
    assert len(captured) + 1 <= ceil(replayed / step) + 2
    pauses = cuts_for_pausing(reading, grid)
    paused = slices_of(grid, reading, pauses)
    extra = 8 if reading.start == 0 else 5
    assert len(paused) + 1 <= ceil(replayed / step) + extra


def test_the_exact_schedule_cuts_only_where_every_run_slices():
    """Up to 4,096 inclusive: both multiples of the step, neither 512 nor a tail."""
    assert cuts_for_exact(Reading(0, 4096, turn_starts=(100,)), GRID) == [2048, 4096]


def test_grid_cuts_honour_the_block_of_the_layers():
    """Blocks of 256 with a step of 640: the early cuts move from 160 and 320 to 256 and 512."""
    grid = Grid(640, 1280, 160, alignment=256)
    assert grid.cuts(0, 4000) == [256, 512, 1280, 2560, 3840]
    assert Grid(256, 256, 64, alignment=256).cuts(0, 600) == [256, 512], "each is named once"


def test_a_shared_slice_is_a_quarter_step_in_whole_blocks():
    """2,048 gives 512; a step of 640 in blocks of 256 gives 256; a step of one block stays."""
    assert GRID.shared_step == 512
    assert Grid(640, 1280, 160, alignment=256).shared_step == 256
    assert Grid(256, 256, 64, alignment=256).shared_step == 256
    assert Grid(1, 1, 1).shared_step == 1


def test_spacing_is_counted_from_the_last_kept_cut():
    """0, 5, 9, 10, 19 with a gap of 10 keeps 0, 10; 19 is 9 behind 10."""
    assert spaced([0, 5, 9, 10, 19], 10) == [0, 10]


def test_cuts_of_a_slice_are_those_behind_its_start_up_to_its_end():
    """(512, 1024] of the grid holds 1,024 and not 512."""
    assert cuts_in([512, 1024, 2048], 512, 1024) == [1024]
