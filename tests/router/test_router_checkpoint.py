"""A written checkpoint: router rows differ and nothing else does, in every kind of directory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from directories import faults
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import quantize_model, save_config, save_model
from odd_models import planted
from safetensors import deserialize

from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.errors import RouterError
from mlx_hybridcache.router import (
    CARD_FILE,
    PATCH_FILE,
    REPORT_FILE,
    Group,
    Patch,
    apply,
    make_patch,
    moe_layers,
    write_checkpoint,
)

GROUPS = (Group((0, 2), 2, 2), Group((1, 4, 6), 1, 2))
KINDS = ("float32", "bfloat16", "float16", "4-bit", "8-bit", "4-bit experts")
TOKENS = mx.array([[5, 17, 900, 33, 41, 7, 1024, 3, 12, 99]])


def convert(kind: str, directory: Path, *, sharded: bool) -> None:
    """The bundled model in another arithmetic, by mlx-lm's own functions, sharded if asked."""
    model = mlx_lm.load(str(BUNDLED_MODEL))[0]
    config = json.loads((BUNDLED_MODEL / "config.json").read_text())
    if kind in ("bfloat16", "float16"):
        dtype = getattr(mx, kind)
        model.update(tree_map(lambda a: a.astype(dtype), model.parameters()))
    elif kind != "float32":
        bits, experts_only = int(kind[0]), kind.endswith("experts")

        def wanted(path: str, module: Any) -> bool:
            return hasattr(module, "to_quantized") and (not experts_only or "switch_mlp" in path)

        model, config = quantize_model(model, config, 64, bits, quant_predicate=wanted)
    directory.mkdir(parents=True)
    for file in BUNDLED_MODEL.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, directory / file.name)
    (directory / "extra").mkdir()
    (directory / "extra" / "notes.bin").write_bytes(bytes(range(256)))
    save_model(directory, model)
    if sharded:
        shard(directory)
    save_config(config, directory / "config.json")


def shard(directory: Path) -> None:
    """Cut model.safetensors into five files or so, with an index."""
    whole = directory / "model.safetensors"
    most = whole.stat().st_size // 5
    weights, parts, size = mx.load(str(whole)), [{}], 0
    for name, array in weights.items():
        if size + array.nbytes > most:
            parts.append({})
            size = 0
        parts[-1][name] = array
        size += array.nbytes
    where = {}
    for i, part in enumerate(parts, start=1):
        name = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        mx.save_safetensors(str(directory / name), part, metadata={"format": "mlx"})
        where |= dict.fromkeys(part, name)
    whole.unlink()
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(parts) > 3


@cache
def kinds_root() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp(prefix="router-kinds-"))


@pytest.fixture(scope="module", autouse=True)
def _clean() -> Any:
    yield
    shutil.rmtree(kinds_root(), ignore_errors=True)


def source(kind: str, *, sharded: bool = False) -> Path:
    """A directory of that kind, made once."""
    return _source(kind, sharded)


@cache
def _source(kind: str, sharded: bool) -> Path:
    directory = kinds_root() / f"{kind}-{'sharded' if sharded else 'single'}".replace(" ", "-")
    convert(kind, directory, sharded=sharded)
    return directory


def load(directory: Path) -> Any:
    return mlx_lm.load(str(directory))[0]


def patch_of(directory: Path) -> Patch:
    model = load(directory)
    return make_patch(
        model, {layer.name: GROUPS for layer in moe_layers(model)[1:]}, method="by hand"
    )


def tensors(directory: Path) -> dict[str, tuple[str, str, bytes]]:
    """Name -> dtype, file and bytes of every tensor, read with nothing of ours."""
    found = {}
    for file in sorted(directory.glob("model*.safetensors")):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[name] = (
                    entry["dtype"],
                    file.name,
                    data[8 + length + start : 8 + length + end],
                )
    return found


def hashes(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_rows_of_routers_differ(kind: str, sharded: bool, tmp_path: Path) -> None:
    """By hash: every other file, every other tensor, every other row, dtype, order and header."""
    origin = source(kind, sharded=sharded)
    patch = patch_of(origin)
    written = write_checkpoint(origin, tmp_path / "out", patch)
    before, after = tensors(origin), tensors(tmp_path / "out")
    routers = {t.name for layer in patch.layers[1:] for t in layer.tensors}
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == routers
    expected = 9 if kind in ("4-bit", "8-bit") else 3  # weight, scales, biases of three layers
    assert (written.tensors, len(routers), written.rows) == (expected, expected, 9)
    for name in routers:
        assert before[name][:2] == after[name][:2]
        old, new = (
            np.frombuffer(data[name][2], np.uint8).reshape(8, -1) for data in (before, after)
        )
        assert (new[[0, 2]] == old[2]).all()
        assert (new[[1, 4, 6]] == old[1]).all()
        assert (new[[3, 5, 7]] == old[[3, 5, 7]]).all()
    ours = {PATCH_FILE, REPORT_FILE, CARD_FILE}
    a, b = hashes(origin), hashes(tmp_path / "out")
    touched = {before[name][1] for name in routers}
    assert {name for name in b if b[name] != a.get(name)} == ours | touched
    assert a.keys() | ours == b.keys()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("bfloat16", "float16")])
def test_a_patch_at_load_gives_the_checkpoint_s_logits_bit_for_bit(
    kind: str, tmp_path: Path
) -> None:
    """Plain mlx-lm on both, and selection by groups on both. MLX's CPU experts need float32."""
    origin = source(kind)
    patch = patch_of(origin)
    write_checkpoint(origin, tmp_path / "out", patch)
    read = Patch.load(tmp_path / "out" / PATCH_FILE)
    assert read == patch
    for tie_safe in (False, True):
        at_load, checkpoint = load(origin), load(tmp_path / "out")
        assert apply(at_load, read, tie_safe=tie_safe) == 9
        if tie_safe:
            assert apply(checkpoint, read) == 0
        assert mx.array_equal(at_load(TOKENS), checkpoint(TOKENS)).item()
        assert not mx.array_equal(at_load(TOKENS), load(origin)(TOKENS)).item()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_equal_after_loading_by_safetensors_and_by_mlx_lm(
    kind: str, tmp_path: Path
) -> None:
    """By readers that are not ours: rows of members are the representative's."""
    origin = source(kind, sharded=True)
    patch = patch_of(origin)
    write_checkpoint(origin, tmp_path / "out", patch)
    where = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    names = [t.name for layer in patch.layers[1:] for t in layer.tensors]
    loaded = 0
    for file in sorted((tmp_path / "out").glob("model*.safetensors")):
        for name, stored in deserialize(file.read_bytes()):
            if name in names:
                assert where["weight_map"][name] == file.name
                rows = np.frombuffer(stored["data"], np.uint8).reshape(8, -1)
                assert (rows[0] == rows[2]).all()
                assert (rows[4] == rows[1]).all()
                loaded += 1
    assert loaded == len(names)
    for layer in moe_layers(load(tmp_path / "out"))[1:]:
        weight = layer.router.weight
        assert mx.array_equal(weight[0], weight[2]).item()


def test_patching_twice_changes_nothing(tmp_path: Path) -> None:
    """The patched directory patched again: no row changes, every file has the same hash."""
    patch = patch_of(source("8-bit"))
    write_checkpoint(source("8-bit"), tmp_path / "once", patch)
    again = write_checkpoint(tmp_path / "once", tmp_path / "twice", patch)
    assert (again.tensors, again.rows) == (0, 0)
    once, twice = hashes(tmp_path / "once"), hashes(tmp_path / "twice")
    del once[REPORT_FILE], once[CARD_FILE], twice[REPORT_FILE], twice[CARD_FILE]
    assert once == twice


def test_a_checkpoint_with_other_names_is_known_by_its_bytes(tmp_path: Path) -> None:
    """A model of the hub that mlx-lm renames while loading, as vision models' prefixes."""
    renamed = tmp_path / "renamed"
    shutil.copytree(source("float32"), renamed)
    weights = mx.load(str(renamed / "model.safetensors"))
    mx.save_safetensors(
        str(renamed / "model.safetensors"), {f"other.{k}": v for k, v in weights.items()}
    )
    written = write_checkpoint(renamed, tmp_path / "out", patch_of(source("float32")))
    assert written.rows == 9


def test_report_and_card_tell_what_was_done(tmp_path: Path) -> None:
    """Counts in JSON, and in the card for people."""
    write_checkpoint(
        source("float32"),
        tmp_path / "out",
        patch_of(source("float32")),
        extra={"largest_logit_difference": 0.0},
    )
    told = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert (told["moe_layers"], told["groups"], told["experts_in_groups"]) == (4, 6, 15)
    assert (told["router_tensors_modified"], told["router_rows_modified"]) == (3, 9)
    card = (tmp_path / "out" / CARD_FILE).read_text()
    assert "| experts in groups | 15 of 32 (46.9%) |" in card
    assert "| largest logit difference inside a group afterwards | 0 |" in card


def test_links_are_followed_once(tmp_path: Path) -> None:
    """As in the hub's cache, where files are links; and a folder that links to its own parent."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in source("float32").iterdir():
        (linked / file.name).symlink_to(file)
    (linked / "loop").symlink_to(linked)
    write_checkpoint(linked, tmp_path / "out", patch_of(source("float32")))
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))
    plain, copied = hashes(source("float32")), hashes(tmp_path / "out")
    assert plain.keys() | {PATCH_FILE, REPORT_FILE, CARD_FILE} == copied.keys()


# What cannot be written


def leftovers(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


def test_another_model_s_directory_is_refused(tmp_path: Path) -> None:
    """A patch for the float32 model and the 8-bit one: named, and nothing is left behind."""
    with pytest.raises(RouterError, match=r"does not hold the router of model.layers.0.mlp"):
        write_checkpoint(source("8-bit"), tmp_path / "out", patch_of(source("float32")))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda p: p.symlink_to("nowhere")])
def test_an_output_that_exists_is_refused(make: Any, tmp_path: Path) -> None:
    """A directory, a file, a dangling link: each stays as it is."""
    make(tmp_path / "out")
    with pytest.raises(RouterError, match="exists already"):
        write_checkpoint(source("float32"), tmp_path / "out", patch_of(source("float32")))
    assert leftovers(tmp_path) == ["out"]


def test_an_output_in_no_directory_is_refused(tmp_path: Path) -> None:
    """Directories above are not made up."""
    with pytest.raises(RouterError, match="no directory"):
        write_checkpoint(source("float32"), tmp_path / "a" / "b", patch_of(source("float32")))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """2 MB for 6 MB."""
    with faults.tmpfs(tmp_path, 2_000_000):
        with pytest.raises(RouterError, match="There is no room"):
            write_checkpoint(source("float32"), tmp_path / "out", patch_of(source("float32")))
        assert leftovers(tmp_path) == []


def test_a_disk_that_fills_up_half_way_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else fills 6 of 8 MB once the first files are there: a real ENOSPC, in the middle."""
    from mlx_hybridcache.router.checkpoint import write as checkpoint

    patch, plain = patch_of(source("float32")), checkpoint._copy

    def copy(origin: Path, target: Path) -> None:
        if origin.suffix == ".safetensors":
            (tmp_path / "other").write_bytes(b"x" * 6_000_000)
        plain(origin, target)

    with faults.tmpfs(tmp_path, 8_000_000):
        monkeypatch.setattr(checkpoint, "_copy", copy)
        with pytest.raises(RouterError, match=r"There is no room .* Nothing was left behind"):
            write_checkpoint(source("float32"), tmp_path / "out", patch)
        assert leftovers(tmp_path) == ["other"]


def test_an_interrupted_writer_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of copying."""
    from mlx_hybridcache.router.checkpoint import write as checkpoint

    def copy(origin: Path, target: Path) -> None:
        raise KeyboardInterrupt

    patch = patch_of(source("float32"))
    monkeypatch.setattr(checkpoint, "_copy", copy)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(source("float32"), tmp_path / "out", patch)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("damage", ["short", "garbled", "empty"])
def test_a_damaged_source_is_refused(damage: str, tmp_path: Path) -> None:
    """Cut off, a header that is no JSON, nothing at all."""
    broken = tmp_path / "broken"
    shutil.copytree(source("float32"), broken)
    file = broken / "model.safetensors"
    if damage == "short":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "garbled":
        data = bytearray(file.read_bytes())
        data[8:12] = b"nope"
        file.write_bytes(data)
    else:
        file.write_bytes(b"")
    with pytest.raises(RouterError, match="not a whole safetensors file"):
        write_checkpoint(broken, tmp_path / "out", patch_of(source("float32")))
    assert leftovers(tmp_path) == ["broken"]


def test_no_weights_at_all_are_refused(tmp_path: Path) -> None:
    """A directory with a configuration only."""
    with pytest.raises(RouterError, match="holds no model"):
        write_checkpoint(tmp_path, tmp_path / "out", patch_of(source("float32")))


def test_the_planted_model_differs_from_the_bundled_one_only_where_it_was_planted() -> None:
    """The other tests' models are what they say."""
    plain, copies = planted.bundled(), planted.bundled({1: {5: (2, planted.exact)}})
    differing = {
        name
        for (name, a), (_, b) in zip(
            tree_flatten(plain.parameters()), tree_flatten(copies.parameters()), strict=True
        )
        if not mx.array_equal(a, b).item()
    }
    assert {name.split(".")[2] for name in differing} == {"1"}
    assert len(differing) == 4
