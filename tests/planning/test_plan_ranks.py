"""A plan for several machines that share the layers of a model: what one of them holds."""

import json
from types import SimpleNamespace

import pytest
from large_models import known_models
from large_models.plans import EIGHT_BITS
from mlx_lm.models.pipeline import PipelineMixin

from mlx_hybridcache.cli.main import main
from mlx_hybridcache.group.layout import layers_of


@pytest.mark.parametrize(("layers", "size"), [(48, 2), (48, 4), (5, 2), (7, 3), (4, 4), (61, 5)])
def test_layers_are_spread_as_mlx_lm_spreads_them(layers, size):
    found = []
    for rank in range(size):
        part = PipelineMixin()
        part.layers = [*range(layers)]
        part.pipeline(SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: size))
        found.append((part.start_idx, part.end_idx))
    assert layers_of(layers, size) == found


def plan(tmp_path, capsys, *options):
    path = known_models.directory(tmp_path, "qwen3-next-80b", **EIGHT_BITS)
    file = tmp_path / "plan.json"
    status = main(["plan", "--model", path, "--context", "120000", "--json", str(file), *options])
    return status, json.loads(file.read_text()) if file.exists() else None, capsys.readouterr()


def test_two_macs_hold_half_each_and_the_line_starts_both(tmp_path, capsys):
    """48 layers of which each has 24, a quarter of them attention; embeddings and the head are on both."""
    _, one, _ = plan(tmp_path, capsys, "--memory", "64GB")
    status, two, shown = plan(tmp_path, capsys, "--memory", "64GB", "--ranks", "2")
    assert (one["fits"], two["fits"], status) == (False, True, 0)
    assert two["token_bytes"] * 2 == one["token_bytes"]
    assert two["checkpoint_bytes"] * 2 == one["checkpoint_bytes"]
    both = one["weights_bytes"]
    assert both / 2 < two["weights_bytes"] < both * 0.51
    assert "mlx.launch --hostfile HOSTS -- python -m mlx_hybridcache.server --pipeline" in shown.out
    assert "--cache-dir" not in shown.out


def test_what_cannot_be_spread_is_said(tmp_path, capsys):
    status, _, shown = plan(tmp_path, capsys, "--memory", "64GB", "--ranks", "49")
    assert status == 2
    assert "48 layers cannot be spread over 49 ranks" in shown.err
