"""What a flip is, what a significant difference is, and what canonicalization does to a real model."""

import json
import math
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import bundled
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_hybridcache_bench.router.cloned import clone_experts
from mlx_hybridcache_bench.router.models import changed_logits
from mlx_hybridcache_bench.router.specialised import held_out_texts, specialised
from odd_models.planted import exact, flipped_signs, noise, plant, random_model, random_rows, scaled

from mlx_hybridcache import RouterError
from mlx_hybridcache.cli import canonicalize as canonicalize_command
from mlx_hybridcache.cli import canonicalizing
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.router import (
    CARD_FILE,
    REPORT_FILE,
    Group,
    Patch,
    applied,
    apply,
    calibration_tokens,
    make_patch,
    moe_layers,
)
from mlx_hybridcache.router.trial.arms import (
    CANONICALIZED,
    FIXED,
    ORIGINAL,
    RANDOM,
    Arm,
    Switched,
    quantized,
    regrouped,
)
from mlx_hybridcache.router.trial.differences import (
    NO_FLIPS,
    Difference,
    Flips,
    divergence,
    flips,
    log_probabilities,
    perplexity_change,
    student,
)
from mlx_hybridcache.router.trial.measure import PAIRS, QUANTIZED, Compared, Measurements, Seen
from mlx_hybridcache.router.trial.reading import Way, read
from mlx_hybridcache.router.trial.tables import markdown, sentences, tables
from mlx_hybridcache.router.trial.ties import ties
from mlx_hybridcache.router.trial.trial import Trial, fresh_texts, trial
from mlx_hybridcache.router.trial.verdict import verdict


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


# A planted model on trial: one expert for each kind of text, and copies of most.

TEXTS, TOKENS = 16, 64
NOISE = "noise 0.001"


@cache
def specialised_patch() -> tuple[Any, Patch]:
    """The specialised model and the patch of its own truth."""
    made = specialised(0)
    groups = {
        layer.name: [Group(each, each[-1], min(len(each), layer.top_k)) for each in truth]
        for layer, truth in zip(moe_layers(made.model), made.groups, strict=True)
    }
    return made.model, make_patch(made.model, groups, method="planted")


@cache
def tried() -> Trial:
    """Its trial, with noise of a thousandth of the logits' spread and one other pair."""
    pairs = {pair: PAIRS[pair] for pair in ("other slices", NOISE)}
    texts = held_out_texts(TEXTS, TOKENS, seed=1)
    return trial(*specialised_patch(), texts, pairs=pairs, reply_tokens=2)


def test_flips_inside_groups_fall_to_zero() -> None:
    """Hundreds of them without the patch, under noise and with 8-bit weights; none with it."""
    seen = tried().readings.seen
    for pair in (NOISE, QUANTIZED):
        assert seen[pair][ORIGINAL].flips.inside > (100 if pair == NOISE else 0)
        assert seen[pair][CANONICALIZED].flips.inside == 0
    assert seen[NOISE][FIXED].flips.swapped == 0


def test_every_other_choice_stays_what_it_was() -> None:
    """Against the original, experts are exchanged only for members of their own group."""
    arm = tried().readings.arms[CANONICALIZED]
    assert arm.flips.inside > 0
    assert arm.flips.outside == 0
    assert arm.replies == TEXTS


def test_perplexity_stays_and_the_control_can_tell() -> None:
    """Under 0.1 % with the patch; with random groups of the same sizes a significant rise."""
    arms = tried().readings.arms
    assert abs(arms[CANONICALIZED].change.mean) < 0.001
    assert arms[CANONICALIZED].divergence < 1e-4
    assert arms[RANDOM].change.low > 0.05
    assert len(arms[RANDOM].changes) == 3
    assert arms[RANDOM].flips.outside > 0
    assert arms[ORIGINAL].change.mean == arms[ORIGINAL].divergence == 0


def test_copies_of_every_kind_stop_flipping() -> None:
    """64 random experts, six of them copies: exact, noisy by 1e-4 to 1e-2, sign-flipped, scaled."""
    model = random_model(64, top_k=4)
    changes = [exact, noise(1e-4), noise(1e-3), noise(1e-2), flipped_signs, scaled]
    copies = {10 + i: (20 + i, change) for i, change in enumerate(changes)}
    for layer in moe_layers(model):
        plant(layer, copies, row_noise=1e-6)
    groups = [Group((copy, source), source, 2) for copy, (source, _) in copies.items()]
    named = {layer.name: groups for layer in moe_layers(model)}
    patch = make_patch(model, named, method="planted")
    pairs = {NOISE: PAIRS[NOISE]}
    found = trial(model, patch, random_rows(4, 64), pairs=pairs, draws=1, reply_tokens=1)
    for pair in (NOISE, QUANTIZED):
        assert found.readings.seen[pair][CANONICALIZED].flips.inside == 0
    assert found.readings.seen[NOISE][ORIGINAL].flips.inside > 10
    arm = found.readings.arms[CANONICALIZED]
    assert arm.flips.outside <= 2
    assert abs(arm.change.mean) < 0.001


def test_the_model_is_left_as_it_was() -> None:
    """The same bits before and after a trial, selecting as mlx-lm does."""
    model, _ = specialised_patch()
    tokens = mx.array(held_out_texts(1, 48, seed=2))
    before = specialised(0).model(tokens)
    tried()
    assert mx.array_equal(model(tokens), before)
    assert applied(model) is None


def test_nothing_changes_where_nothing_was_planted() -> None:
    """The bundled model: no groups, so a patch of them changes no bit of any logit."""
    model, _ = bundled.load()
    patch = make_patch(model, {}, method="planted")
    texts = [list(bundled.text_tokens(48, start)) for start in (0, 400)]
    assert changed_logits(model, patch, texts[0]) == 0
    found = trial(model, patch, texts, pairs={}, rounder=False, reply_tokens=2)
    assert list(found.readings.arms) == [ORIGINAL, CANONICALIZED, FIXED]
    for arm in found.readings.arms.values():
        assert (arm.change.mean, arm.divergence, arm.flips.swapped) == (0, 0, 0)
    assert not found.verdict.helps
    assert "no two experts" in found.verdict.sentence


def test_equal_rows_are_looked_at_and_ties_are_counted() -> None:
    """Two of three copies are chosen, so rows alone leave those tokens to ties."""
    left = tried().ties
    assert left.texts == TEXTS * TOKENS
    assert left.tokens == left.texts * 2
    assert 0 < left.tokens_left <= left.left < left.tokens
    assert left.compared > 0
    if mx.default_device().type == mx.cpu:
        assert left.unequal == 0


def test_unequal_scores_of_equal_rows_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that computes equal rows unequally: here, one whose rows are not equal."""
    model, patch = specialised_patch()
    monkeypatch.setattr(Switched, "by", lambda *_, **__: nullcontext())
    found = ties(Switched(model), patch, held_out_texts(2, 16, seed=3))
    assert found.unequal > found.compared / 2


def test_noise_depends_on_the_slice_and_on_nothing_else() -> None:
    """Read twice alike: the same bits. In other slices or beside others: other choices."""
    model, _ = specialised_patch()
    layers, texts = moe_layers(model), held_out_texts(2, 40, seed=4)
    noisy = Way(noise=1e-2)
    first, again = (read(model, layers, texts, noisy, reply_tokens=2) for _ in range(2))
    assert all(mx.array_equal(a.logits, b.logits) for a, b in zip(first, again, strict=True))
    for other in (Way(step=16, noise=1e-2), Way(rows=2, noise=1e-2), Way(singly=3, noise=1e-2)):
        assert not mx.array_equal(read(model, layers, texts, other)[1].logits, first[1].logits)
    alone = read(model, layers, texts[1:], noisy)
    assert mx.array_equal(alone[0].logits, first[1].logits)


@pytest.mark.parametrize(
    ("way", "slices"),
    [
        (Way(step=4), [(0, 4), (4, 8), (8, 10)]),
        (Way(step=8, singly=2), [(0, 8), (8, 9), (9, 10)]),
        (Way(step=4, singly=99), [(at, at + 1) for at in range(10)]),
    ],
)
def test_slices_cover_the_text(way: Way, slices: list[tuple[int, int]]) -> None:
    """Ten tokens."""
    assert way.slices(10) == slices


def test_fixed_slices_read_alone_and_alike() -> None:
    """Exact mode takes neither other slices nor other texts; its arithmetic is what it is."""
    arm = Arm(FIXED, (None,), is_fixed=True)
    asked = Way(step=37, singly=8, rows=4, rounded=True, noise=0.1)
    assert arm.way(asked) == Way(rounded=True, noise=0.1)
    assert Arm(ORIGINAL, (None,)).way(asked) == asked


def test_a_quantized_copy_has_equal_rows_too() -> None:
    """Weights, scales and biases of the rows are copied, and its model is another one's to patch."""
    model, patch = specialised_patch()
    twin = quantized(model)
    assert isinstance(moe_layers(twin)[0].router, nn.QuantizedLinear)
    assert quantized(twin) is None
    with pytest.raises(RouterError, match="another model"), Switched(twin).by(patch):
        pass
    switched = Switched(twin)
    with switched.by(regrouped(twin, patch)):
        layer, group = switched.layers[0], patch.layers[0].groups[0]
        for array in layer.tensors().values():
            rows = [array[member] for member in group.members]
            assert all(mx.array_equal(rows[0], row) for row in rows)


def test_a_trial_says_what_it_needs() -> None:
    """One text; texts of two lengths; a model that is patched; a text that calibration reads whole."""
    model, patch = specialised_patch()
    with pytest.raises(RouterError, match="at least two texts of one length; 1 were given"):
        trial(model, patch, held_out_texts(1, 8, seed=0))
    with pytest.raises(RouterError, match="one length"):
        trial(model, patch, [[1, 2, 3], [1, 2]])
    other = specialised(0).model
    apply(other, patch)
    with pytest.raises(RouterError, match="patch already"):
        trial(other, patch, held_out_texts(2, 8, seed=0))


def test_texts_to_measure_on_are_none_that_were_calibrated_with(tmp_path: Path) -> None:
    """They follow the rows of the calibration; a file that ends there is refused before anything runs."""
    _, tokenizer = bundled.load()
    file = tmp_path / "text.txt"
    file.write_text(bundled.text(500), encoding="utf-8")
    rows = calibration_tokens(tokenizer, file, rows=6, row_tokens=64)
    assert fresh_texts(tokenizer, file, after=4, count=2, tokens=64) == rows[4:]
    with pytest.raises(RouterError, match="texts of its own: at least 640 tokens"):
        fresh_texts(tokenizer, file, after=8, count=4, tokens=64)


# The verdict, on figures made up for it


NONE, FLIPS = Flips(1000, 0, 0), Flips(1000, 40, 38)


def figures_of(
    *,
    change: float = 0.0,
    reach: float = 1e-4,
    before: Flips = NONE,
    after: Flips = NONE,
    control: float = 0.2,
    replies: int = 20,
) -> Measurements:
    def arm(mean: float, width: float) -> Compared:
        around = Difference(mean, mean - width, mean + width, 1000, 20)
        return Compared(10.0, around, (mean,), 0.0, 1.0, 1.0, NO_FLIPS, 20)

    def pair(one: Flips, other: Flips) -> dict[str, Seen]:
        return {ORIGINAL: Seen(one, 0, 12, 1.0), CANONICALIZED: Seen(other, 0, replies, 1.0)}

    arms = {ORIGINAL: arm(0, 0), CANONICALIZED: arm(change, reach), RANDOM: arm(control, 0.1)}
    seen = {
        "other slices": pair(before, after),
        NOISE: pair(Flips(1000, 90, 80), Flips(1000, 9, 0)),
    }
    return Measurements(20, 1000, 8, arms, seen)


@pytest.mark.parametrize(
    ("readings", "coverages", "helps", "words"),
    [
        (figures_of(before=FLIPS, after=Flips(1000, 2, 0)), None, True, "It helps here: of 40"),
        (figures_of(before=FLIPS, after=Flips(1000, 30, 0)), None, False, "It helps little"),
        (figures_of(before=FLIPS, after=NONE, replies=12), None, False, "but no reply: of 40"),
        (figures_of(), None, False, "0 of 1,000 choices change"),
        (figures_of(), None, False, "leave 9 of 90 changed choices"),
        (figures_of(before=Flips(1000, 9, 0)), None, False, "Exact mode is what helps"),
        (figures_of(change=0.004), None, False, "Do not use it: perplexity changes by more than"),
        (figures_of(reach=0.03), None, False, "more text would tell"),
        (figures_of(before=FLIPS), (0.5, 0.45), False, "groups 45% of independent random"),
        (figures_of(before=FLIPS, control=0.05), None, True, "proves little"),
    ],
)
def test_the_verdict_follows_the_figures(
    readings: Measurements, coverages: tuple[float, float] | None, helps: bool, words: str
) -> None:
    """That it does not help here is a verdict too."""
    found = verdict(readings, 5, coverages)
    assert found.helps is helps
    assert words in found.sentence


def test_figures_are_told_as_tables_sentences_and_markdown() -> None:
    """Every arm has a row, every pair too, and the verdict is the last word."""
    found = tried()
    beside, flipped, replied = tables(found)
    assert [row[0] for row in beside[2]] == [ORIGINAL, CANONICALIZED, RANDOM, FIXED]
    assert [row[0] for row in flipped[2]] == ["other slices", NOISE, QUANTIZED]
    assert replied[2][0][1] == f"{TEXTS} / {TEXTS}"
    assert sentences(found)[-1] == f"Verdict: {found.verdict.sentence}"
    assert found.verdict.sentence in markdown(found)
    assert json.loads(json.dumps(found.as_json()))["helps"] is False


def test_canonicalize_measures_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The verdict is printed, and stands on the card and in the report."""
    short = partial(trial, pairs={}, draws=1, reply_tokens=1)
    monkeypatch.setattr(canonicalizing, "trial", short)
    clone_experts(BUNDLED_MODEL, tmp_path / "cloned", unlike=1e-4, seed=0)
    asked = ["--model", str(tmp_path / "cloned"), "--tokens", "1024", "--measure", "--texts", "2"]
    asked += ["--no-quantized-copy"]
    assert (
        canonicalize_command.main(
            [*asked, "--output", str(tmp_path / "out")], "mlx-hybridcache canonicalize"
        )
        == 0
    )
    said = capsys.readouterr().out
    told = json.loads((tmp_path / "out" / REPORT_FILE).read_text(encoding="utf-8"))["measured"]
    assert told["texts"] == 2
    assert told["groups"] > 16
    assert f"Verdict: {told['verdict']}" in said
    assert told["verdict"] in (tmp_path / "out" / CARD_FILE).read_text(encoding="utf-8")
    assert abs(told["arms"][CANONICALIZED]["change"]["mean"]) < 0.001
    assert told["arms"][RANDOM]["change"]["mean"] > 0.1


def test_too_little_text_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    """Calibration would take it all."""
    text = tmp_path / "text.txt"
    text.write_text(bundled.text(600), encoding="utf-8")
    asked = ["--model", str(BUNDLED_MODEL), "--calibration", str(text), "--tokens", "512"]
    with pytest.raises(RouterError, match="texts of its own"):
        canonicalize_command.main([*asked, "--measure"], "mlx-hybridcache canonicalize")


def test_a_quantized_model_is_tried_as_it_is() -> None:
    """Rows equal with their scales and biases: scores equal, no flip inside groups; no copy is made of it."""
    model, patch = specialised_patch()
    twin = quantized(model)
    pairs = {NOISE: PAIRS[NOISE]}
    found = trial(twin, regrouped(twin, patch), held_out_texts(4, 48, seed=5), pairs=pairs, draws=1)
    assert not found.has_rounder
    assert found.ties.compared > 0
    assert found.readings.seen[NOISE][ORIGINAL].flips.inside > 0
    assert found.readings.seen[NOISE][CANONICALIZED].flips.inside == 0
    assert any("Not measured: 8-bit weights" in sentence for sentence in sentences(found))
    if mx.default_device().type == mx.cpu:
        assert found.ties.unequal == 0
