"""Every family that mlx-lm has, on a tiny model of it, is what the table of `docs/models.md` says."""

import pytest
import tiny
from long import mostly_long
from matrix import journeys, page, shapes

from mlx_hybridcache.caches.kinds.rows import RowsKind

KNOWN = page.load()
ALWAYS = ("qwen3", "gemma3", "qwen3_5", "mamba2", "kimi_k25", "lfm2", "bitnet")
"""Rows, windows, states, blocks, latent attention, a part of another family, and one that cannot run here."""


def untried(families, known):
    """A sentence for each family that nobody tried, or that is gone."""
    new, gone = sorted(set(families) - set(known)), sorted(set(known) - set(families))
    how = "`PYTHONPATH=.:tests/support python -m matrix`"
    return [
        *(f"mlx-lm's {name} was never tried with the cache: {how[:-1]} {name}`." for name in new),
        *(f"mlx-lm has no {name} any more: {how}." for name in gone),
    ]


def test_every_family_of_mlx_lm_was_tried():
    """126 modules of mlx-lm 0.32."""
    assert not untried(shapes.modules(), KNOWN)


def test_a_family_that_is_new_is_named():
    """A newer mlx-lm has one more."""
    (said,) = untried([*KNOWN, "qwen9"], KNOWN)
    assert said.startswith("mlx-lm's qwen9 was never tried with the cache")


def test_at_least_120_are_served_through_the_cache_and_the_others_by_name():
    """What is refused says why."""
    assert sum(not record.refused for record in KNOWN.values()) >= 120
    for record in KNOWN.values():
        assert record.refused or (record.layers and record.batched and len(record.dtypes) == 2)


def test_the_page_says_what_was_found():
    """Its table is made from the records."""
    assert page.said(page.PAGE.read_text()) == page.table(KNOWN.values())


@pytest.mark.skipif(not tiny.device_is_split_invariant(), reason="slices change bits here")
@pytest.mark.parametrize("name", mostly_long(sorted(KNOWN), ALWAYS))
def test_a_family_is_what_the_table_says(name, tmp_path, request):
    """Cold, repeated, with another ending, longer, branching, shorter, behind a reply, in batches, after a
    restart and in exact mode: no further from plain mlx-lm than that is from itself.
    """
    is_long = request.node.get_closest_marker("long") is not None
    kept = KNOWN[name]
    found = journeys.examine(name, tmp_path, tuple(journeys.DTYPES) if is_long else ())
    for what in ("layers", "alignment", "restores", "slicing_limit", "batched", "refused"):
        assert getattr(found, what) == getattr(kept, what), what
    for what in ("slicing", "decoding", "found", "replied", "batch_difference"):
        assert getattr(found, what) <= page.bound(getattr(kept, what)), what
    for dtype, told in found.dtypes.items():
        assert told.partition(":")[0][:5] == kept.dtypes[dtype].partition(":")[0][:5], dtype


def test_what_the_cache_does_wrong_shows(tmp_path, monkeypatch):
    """Rows that are stored in the wrong order."""
    view = RowsKind.view_rows
    monkeypatch.setattr(
        RowsKind,
        "view_rows",
        lambda kind, cache, start, end: tuple(
            rows[:, :, ::-1] for rows in view(kind, cache, start, end)
        ),
    )
    with pytest.raises(journeys.NotAsColdError, match="differ by"):
        journeys.examine("qwen3", tmp_path)
