"""Models as a whole: loading, fingerprints, what is evaluated."""

import json
import shutil
import threading

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from bundled import load

from mlx_hybridcache import ModelError, models
from mlx_hybridcache.demo import BUNDLED_MODEL


def test_the_same_weights_have_the_same_fingerprint_wherever_they_were_loaded_from(tmp_path):
    """A copy of the directory, loaded again, shares; so library and server agree."""
    copy = tmp_path / "copy"
    shutil.copytree(BUNDLED_MODEL, copy)
    again, _ = models.load(str(copy))
    assert models.fingerprint(again) == models.fingerprint(load()[0])


def test_one_changed_weight_is_another_model():
    """Re-trained in the same folder: every tensor's sample counts, the last as well as the first."""
    model = tiny.fresh("qwen3_next")
    seen = {models.fingerprint(model)}
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        *path, last = name.split(".")
        module = model
        for part in path:
            module = module[part]
        module[last] = module[last] + 1
        seen.add(models.fingerprint(model))
    assert len(seen) == 3


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_one_changed_number_is_another_model(dtype):
    """Of 130,000 in a tensor, wherever it stands; and two that swap places."""
    model = tiny.fresh("qwen3_next")
    embedding = model.model.embed_tokens
    plain = mx.random.normal((1001, 130), key=mx.random.key(1)).astype(dtype)
    embedding.weight = plain
    seen = {models.fingerprint(model)}
    for at in ((0, 0), (0, 1), (500, 77), (1000, 129)):
        embedding.weight = mx.array(plain)
        embedding.weight[at] = embedding.weight[at] + 0.5
        seen.add(models.fingerprint(model))
    embedding.weight = mx.array(plain)
    embedding.weight[3, 4], embedding.weight[9, 9] = plain[9, 9], plain[3, 4]
    seen.add(models.fingerprint(model))
    assert len(seen) == 6


def test_another_configuration_is_another_model():
    """The same weights with another base of the rotary embedding."""
    model = tiny.fresh("qwen3_next")
    before = models.fingerprint(model)
    model.args.rope_theta *= 2
    assert models.fingerprint(model) != before


def test_a_quantized_model_is_another_model():
    """The same weights at 8 bits."""
    model = tiny.fresh("qwen3")
    before = models.fingerprint(model)
    nn.quantize(model, group_size=32, bits=8)
    assert models.fingerprint(model) != before


def test_every_array_of_a_model_is_evaluated_private_ones_too():
    """YaRN keeps its frequencies outside `parameters()`; another thread can use them afterwards."""
    model = tiny.fresh("llama_yarn")
    models.evaluate(model)
    failed = []

    def use():
        try:
            mx.eval(model(mx.array([[1, 2, 3]])))
        except RuntimeError as error:
            failed.append(error)
        finally:
            mx.clear_streams()

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert failed == []


@pytest.mark.parametrize("path", ["/no/such/place", "./neither", "~/nor this", "a/b/c", ""])
def test_a_model_that_is_not_there_is_said_before_anything_is_tried(path):
    """The message quotes the path and says what belongs there."""
    with pytest.raises(ModelError, match=r"found nothing there.*config\.json"):
        models.load(path)


def test_a_file_is_no_model_directory(tmp_path):
    """Naming the weights instead of their folder is a common slip."""
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelError, match="found a file"):
        models.load(str(file))


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("model.safetensors", "weights"),
        ("tokenizer*", "a tokenizer"),
        ("config.json", "config.json"),
    ],
)
def test_an_incomplete_model_directory_says_what_is_missing(tmp_path, missing, said):
    """Weights, tokenizer or config left out."""
    copy = tmp_path / "copy"
    shutil.copytree(BUNDLED_MODEL, copy)
    for file in copy.glob(missing):
        file.unlink()
    with pytest.raises(ModelError, match=f"{said} missing"):
        models.load(str(copy))


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe{"])
def test_a_configuration_that_is_broken_is_named(tmp_path, text):
    """A download that was cut off: which file it is, not only where in it."""
    shutil.copytree(BUNDLED_MODEL, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"config\.json cannot be read: .* Download it again"):
        models.load(str(tmp_path / "copy"))


def test_an_adapter_that_is_not_there_says_what_is_missing(tmp_path):
    """No directory, and one without an adapter's two files."""
    with pytest.raises(ModelError, match="found no directory there"):
        models.load(str(BUNDLED_MODEL), adapter_path=str(tmp_path / "nothing"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"found no adapters\.safetensors there"):
        models.load(str(BUNDLED_MODEL), adapter_path=str(tmp_path))


def test_a_model_of_an_unknown_family_is_an_error_with_its_name(tmp_path):
    """What mlx-lm says travels in the message."""
    copy = tmp_path / "copy"
    shutil.copytree(BUNDLED_MODEL, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    with pytest.raises(ModelError, match="nonesuch"):
        models.load(str(copy))


def test_code_in_a_model_directory_is_not_run(tmp_path):
    """A config that names a Python file is refused, and the file has not run."""
    copy = tmp_path / "copy"
    shutil.copytree(BUNDLED_MODEL, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_file": "evil.py"}))
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="evil"):
        models.load(str(copy))
    assert not (tmp_path / "ran").exists()


def test_the_default_budget_is_a_share_of_what_is_free():
    """Positive, and below the machine's memory."""
    assert 0 < models.default_budget(load()[0]) < 2**50
