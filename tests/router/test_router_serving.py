"""Router patches where people meet them: files, the library's argument, the server's flag, the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bundled
import mlx.core as mx
import mlx_lm
import oracle
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.utils import save_model
from odd_models import planted
from servers import COMPLETIONS, OURS, run_to_its_end, running

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.cli.main import main
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.errors import RouterError
from mlx_hybridcache.router import (
    CARD_FILE,
    PATCH_FILE,
    REPORT_FILE,
    Group,
    Patch,
    applied,
    apply,
    make_patch,
    moe_layers,
)

COPIES = {i: {2: (0, planted.exact), 5: (3, planted.noise(1e-3))} for i in range(4)}


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the bundled model with two pairs of copies in each layer."""
    directory = tmp_path_factory.mktemp("models") / "copies"
    shutil.copytree(BUNDLED_MODEL, directory)
    save_model(directory, planted.bundled(COPIES))
    return directory


@pytest.fixture(scope="module")
def patched(copies: Path) -> Path:
    """The same, canonicalized by the command."""
    output = copies.parent / "patched"
    patch, report = copies.parent / "patch.json", copies.parent / "report.json"
    command = ["canonicalize", "--model", str(copies), "--output", str(output)]
    command += ["--tokens", "1024", "--patch", str(patch), "--report", str(report)]
    assert main(command) == 0
    return output


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a tiny Llama, with the bundled tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "dense"
    shutil.copytree(BUNDLED_MODEL, directory)
    model = tiny.build("llama")
    save_model(directory, model)
    config = {k: v for k, v in vars(model.args).items() if v is not None}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def load(directory: Path) -> Any:
    return mlx_lm.load(str(directory))[0]


# Files


def tiny_patch() -> Patch:
    model = tiny.build("qwen3_moe")
    groups = {layer.name: [Group((0, 2), 2, 1)] for layer in moe_layers(model)}
    return make_patch(model, groups, method="by hand")


def test_a_patch_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    """Equal, and with the same digest; a patch that differs in one cap has another."""
    patch = tiny_patch()
    patch.save(tmp_path / "patch.json")
    read = Patch.load(tmp_path / "patch.json")
    assert (read, read.digest) == (patch, patch.digest)
    told = json.loads((tmp_path / "patch.json").read_text())
    told["layers"][1]["groups"][0]["cap"] = 2
    (tmp_path / "other.json").write_text(json.dumps(told))
    assert Patch.load(tmp_path / "other.json").digest != patch.digest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: [], "no router patch"),
        (lambda told: {}, "no router patch"),
        (lambda told: told | {"version": 2}, "of version 2"),
        (lambda told: told | {"layers": None}, "damaged"),
        (lambda told: told | {"layers": [{}]}, "damaged"),
    ],
)
def test_what_is_no_patch_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    """Another JSON file, a later version, a hole: the file is named, and what it lacks."""
    tiny_patch().save(tmp_path / "patch.json")
    told = change(json.loads((tmp_path / "patch.json").read_text()))
    (tmp_path / "patch.json").write_text(json.dumps(told))
    with pytest.raises(RouterError, match=said):
        Patch.load(tmp_path / "patch.json")


@pytest.mark.parametrize(
    "group",
    [
        {"members": [0], "representative": 0, "cap": 1},
        {"members": [2, 0], "representative": 0, "cap": 1},
        {"members": [0, 4], "representative": 0, "cap": 1},
        {"members": [-1, 0], "representative": 0, "cap": 1},
        {"members": [0, 2], "representative": 1, "cap": 1},
        {"members": [0, 2], "representative": 0, "cap": 0},
        {"members": [0, 2], "representative": 0, "cap": 3},
        {"members": [0, "x"], "representative": 0, "cap": 1},
    ],
)
def test_groups_that_mean_nothing_are_refused(group: dict[str, Any], tmp_path: Path) -> None:
    """One member, unsorted, beyond the four experts, a stranger's row, caps of nobody and of three."""
    tiny_patch().save(tmp_path / "patch.json")
    told = json.loads((tmp_path / "patch.json").read_text())
    told["layers"][0]["groups"] = [group]
    (tmp_path / "patch.json").write_text(json.dumps(told))
    with pytest.raises(RouterError, match="damaged router patch"):
        Patch.load(tmp_path / "patch.json")


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[[[["])
def test_a_file_that_cannot_be_read_is_refused(content: bytes | None, tmp_path: Path) -> None:
    """Missing, empty, cut off, no text."""
    if content is not None:
        (tmp_path / "patch.json").write_bytes(content)
    with pytest.raises(RouterError, match="cannot be read as a router patch"):
        Patch.load(tmp_path / "patch.json")


# The library


def test_the_patch_is_part_of_the_namespace() -> None:
    """The plain model, the patched one, and the one whose rows are patched but selects as ever."""

    def settings(model: Any, **options: Any) -> str:
        with oracle.new_cache(model, **options) as cache:
            return cache.info.settings

    plain, by_groups, rows = (tiny.fresh("qwen3_moe") for _ in range(3))
    patch = tiny_patch()
    apply(rows, patch, tie_safe=False)
    found = [settings(plain), settings(by_groups, router=patch), settings(rows)]
    assert len(set(found)) == 3
    assert settings(tiny.fresh("qwen3_moe"), router=patch) == found[1]
    assert settings(by_groups) == found[1]  # patched in memory, whoever asks
    assert applied(plain) is None


def test_hot_equals_cold_with_a_patch(tmp_path: Path) -> None:
    """The reply from the cache has the bits of the patched model's cold reply, not the plain one's."""
    tiny_patch().save(tmp_path / "patch.json")
    model, tokens = tiny.fresh("qwen3_moe"), oracle.prompt(300, 1)
    plain = oracle.cold_logits(model, tokens)[-1]
    with oracle.new_cache(model, router=tmp_path / "patch.json") as cache:
        oracle.read(cache, tokens[:200])
        hot = oracle.reply_logits(cache, tokens, count=1)
        assert cache.last_report is not None
        assert cache.last_report.restored_tokens > 100
        assert oracle.agree(hot[0], oracle.cold_logits(model, tokens)[-1])
        assert not oracle.agree(hot[0], plain)


def test_no_patch_comes_under_another_caches_replies() -> None:
    """What it had read was restored for a model that selects otherwise by now."""
    model = tiny.fresh("qwen3_moe")
    plain = dict(tree_flatten(model.parameters()))
    with oracle.new_cache(model) as cache:
        with pytest.raises(RouterError, match="Another cache serves this model"):
            oracle.new_cache(model, router=tiny_patch())
        assert cache.is_alive
    assert all(
        mx.array_equal(array, plain[path]).item()
        for path, array in tree_flatten(model.parameters())
    )
    with (
        oracle.new_cache(model, router=tiny_patch()),
        oracle.new_cache(model, router=tiny_patch()) as cache,  # which changes nothing any more
    ):
        assert applied(model) is not None


def test_auto_finds_copies_in_memory() -> None:
    """No file: the bundled texts through the model, then the patch; the report says what was found."""
    model, tokenizer = planted.bundled(COPIES), bundled.load()[1]
    with HybridPromptCache(model, tokenizer, router="auto", memory_budget="200MB") as cache:
        assert applied(cache.engine.model) is not None
    rows = moe_layers(model)[2].router.weight
    assert mx.array_equal(rows[0], rows[2]).item()
    assert mx.array_equal(rows[3], rows[5]).item()


@pytest.mark.parametrize(
    ("name", "router", "said"),
    [
        ("llama", "auto", "no mixture-of-experts"),
        ("llama4", "auto", r"llama4\.MoE"),
        ("qwen3_moe", "auto", "needs a tokenizer"),
        ("qwen3_moe", "nowhere.json", "cannot be read"),
        ("qwen3_next", "tiny", "another model"),
    ],
)
def test_what_the_argument_cannot_mean_is_refused(name: str, router: str, said: str) -> None:
    """Before any thread starts; the model is as it was."""
    model = tiny.fresh(name)
    plain = dict(tree_flatten(model.parameters()))
    with pytest.raises(RouterError, match=said):
        oracle.new_cache(model, router=tiny_patch() if router == "tiny" else router)
    assert all(
        mx.array_equal(array, plain[path]).item()
        for path, array in tree_flatten(model.parameters())
    )


# The command


def test_the_command_writes_checkpoint_patch_and_report(copies: Path, patched: Path) -> None:
    """What it found is what was planted; rows of loaded models are equal; all three files agree."""
    told = json.loads((patched / REPORT_FILE).read_text())
    assert (told["moe_layers"], told["groups"], told["experts_in_groups"]) == (4, 8, 16)
    assert told["router_rows_modified"] == 8
    assert told["largest_logit_difference"] == 0
    assert told["calibration"]["null_coverage"] == 0
    assert told["calibration"]["tokens"] == 1024
    planned = told["planned"]
    assert (planned["layers"], planned["experts"]) == (48, 512)
    assert planned["seconds"] > told["calibration"]["seconds"]
    assert planned["peak_bytes"] > planned["measured_peak_bytes"] > 0
    patch = Patch.load(patched / PATCH_FILE)
    assert patch == Patch.load(copies.parent / "patch.json")
    assert patch.digest == told["patch"]
    assert json.loads((copies.parent / "report.json").read_text())["calibration"]["layers"]
    for layer in moe_layers(load(patched)):
        rows = layer.router.weight
        assert mx.array_equal(rows[0], rows[2]).item()
        assert mx.array_equal(rows[3], rows[5]).item()
    assert "| groups | 8 |" in (patched / CARD_FILE).read_text()


def test_canonicalizing_a_canonicalized_model_changes_no_row(patched: Path, tmp_path: Path) -> None:
    """Another calibration of the written directory finds the same groups and writes the same rows."""
    command = ["canonicalize", "--model", str(patched), "--output", str(tmp_path / "again")]
    assert main([*command, "--tokens", "1024"]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (patched / name).read_bytes()
    assert json.loads((tmp_path / "again" / REPORT_FILE).read_text())["router_rows_modified"] == 0


def test_a_model_without_copies_is_said_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundled model itself: exit status 1, one sentence, no directory; the report is there."""
    command = ["canonicalize", "--model", str(BUNDLED_MODEL), "--output", str(tmp_path / "out")]
    assert main([*command, "--tokens", "512", "--report", str(tmp_path / "report.json")]) == 1
    assert "nothing to patch" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text())["groups"] == 0


def test_scores_are_reported_with_what_they_find_at_random(
    copies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The published calibration, without writing anything."""
    command = ["canonicalize", "--model", str(copies), "--method", "scores", "--tokens", "1024"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "of random, independent ones" in shown


def test_what_the_command_cannot_do_is_one_sentence(
    copies: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2, no traceback, nothing new in the directory."""
    (tmp_path / "there").mkdir()
    (tmp_path / "short.txt").write_text("Three little words.")
    model = ["--model", str(copies)]
    for arguments, said in (
        (["--model", str(dense)], "no mixture-of-experts layer"),
        (["--model", "/no/such/model"], "found nothing there"),
        ([*model, "--output", str(tmp_path / "there")], "exists already"),
        ([*model, "--patch", str(tmp_path / "short.txt")], "exists already"),
        ([*model, "--report", str(tmp_path / "no" / "where")], "no directory"),
        ([*model, "--calibration", str(tmp_path / "short.txt")], "needs at least 512"),
        ([*model, "--calibration", "/no/such/text"], "cannot be read"),
        ([*model, "--tokens", "100"], "at least 512"),
        ([*model, "--min-tokens", "0"], "at least 1"),
    ):
        assert main(["canonicalize", *arguments]) == 2, arguments
        shown = capsys.readouterr().err
        assert said in shown
        assert shown.startswith("mlx-hybridcache canonicalize: ")
        assert shown.count("\n") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["short.txt", "there"]


# The server


def reply(server: Any) -> tuple[Any, int]:
    told = server.answer(COMPLETIONS, prompt=bundled.text(400), max_tokens=8, logprobs=3)
    return told["choices"], told["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_the_server_takes_a_file_or_finds_the_patch_beside_the_model(
    copies: Path, patched: Path
) -> None:
    """The original with the file and the written directory with `auto`: equal logprobs, cached too."""
    file = str(copies.parent / "patch.json")
    with running(OURS, "--model", str(copies), "--canonicalize-router", file) as server:
        by_file = reply(server)
        assert reply(server)[0] == by_file[0]
    with running(OURS, "--model", str(patched), "--canonicalize-router", "auto") as server:
        assert reply(server) == by_file
        again = reply(server)
        assert (again[0], again[1] > 300) == (by_file[0], True)
        assert "which lies with the model" in server.log


def test_a_patch_for_another_model_ends_the_server_at_its_start(patched: Path) -> None:
    """One line, exit status 2."""
    ended = run_to_its_end("--canonicalize-router", str(patched / PATCH_FILE))
    assert ended.returncode == 2
    assert "made for another model" in ended.stderr.splitlines()[-1]
