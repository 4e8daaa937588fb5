"""What a flip is, what a significant difference is, and what canonicalization does to a real model."""

import math

import numpy as np
import pytest

from mlx_hybridcache.router.differences import (
    Difference,
    Flips,
    divergence,
    flips,
    log_probabilities,
    perplexity_change,
    student,
)


def chosen(*tokens: tuple[int, ...]) -> np.ndarray:
    return np.array(tokens)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0, 1), (1, 0), Flips(2, 0, 0)),  # order says nothing
        ((0, 1), (0, 2), Flips(2, 1, 0)),  # 1 and 2 stand in different groups
        ((0, 4), (1, 4), Flips(2, 1, 1)),  # 0 gives way to its copy
        ((0, 4), (1, 5), Flips(2, 2, 1)),  # and another expert to a stranger
        ((0, 2), (1, 3), Flips(2, 2, 2)),  # two groups at once
        ((0, 4), (5, 6), Flips(2, 2, 0)),  # 0 goes, and no member of its group comes
    ],
)
def test_a_flip_is_inside_when_a_member_of_the_same_group_comes(
    before: tuple[int, ...], after: tuple[int, ...], expected: Flips
) -> None:
    """Groups {0, 1} and {2, 3} of eight experts, two chosen."""
    assert flips(chosen(before), chosen(after), [(0, 1), (2, 3)]) == expected


def test_flips_add_up_over_tokens_and_layers() -> None:
    """Three swaps of eight, two of them inside."""
    one = flips(chosen((0, 4), (0, 2)), chosen((1, 4), (1, 5)), [(0, 1)])
    total = one + flips(chosen((6, 7), (6, 7)), chosen((6, 7), (6, 7)), [])
    assert total == Flips(8, 3, 2)
    assert (total.outside, total.share, total.inside_share) == (1, 3 / 8, 2 / 3)
    assert Flips(8, 0, 0).inside_share is None


def test_divergence_is_that_of_two_distributions() -> None:
    """A fair coin against one that falls on heads three times in four: half of ln(4 / 3)."""
    fair = log_probabilities(np.array([[0.0, 0.0]]))
    bent = log_probabilities(np.array([[math.log(3), 0.0]]))
    assert divergence(fair, bent)[0] == pytest.approx(0.5 * math.log(4 / 3))
    assert divergence(bent, bent)[0] == 0.0


@pytest.mark.parametrize(
    ("degrees", "printed"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (19, 2.093)]
)
def test_the_quantile_is_that_of_printed_tables(degrees: int, printed: float) -> None:
    """Student's t, two-sided, 95 %."""
    assert student(0.95, degrees) == pytest.approx(printed, rel=1e-3)


def test_the_interval_counts_texts_and_not_tokens() -> None:
    """A thousand equal tokens in each of two texts are two observations, not two thousand."""
    found = Difference.of([np.full(1000, 0.1), np.full(1000, 0.3)])
    assert (found.mean, found.tokens, found.texts) == (pytest.approx(0.2), 2000, 2)
    assert found.high - found.mean == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert not found.is_significant


def test_the_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    """1,000 draws of ten texts whose tokens share what their text has in common; no effect."""
    rng = np.random.default_rng(6)
    misses = 0
    for _ in range(1000):
        texts = [rng.normal(rng.normal(), 1, rng.integers(20, 60)) for _ in range(10)]
        misses += Difference.of(texts).is_significant
    assert 25 <= misses <= 90


def test_perplexity_grows_with_the_nats_that_are_lost() -> None:
    """ln(1.1) nats more for every token are 10 % more perplexity."""
    lost = Difference.of([np.full(5, math.log(1.1)), np.full(5, math.log(1.1))])
    assert perplexity_change(lost).mean == pytest.approx(0.1)
    assert perplexity_change(lost).is_significant
