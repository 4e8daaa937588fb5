"""Where the weights of a multi-token-prediction head come from, what they compute, and what is refused."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from odd_models import heads
from odd_models.drafters import new_cache
from odd_models.head_reference import Reference
from odd_models.heads import COUNT, KINDS, PROMPT
from test_speculation import GREEDY

from mlx_hybridcache import ArgumentError, ModelError, SettingError
from mlx_hybridcache.caches.layout import Layout
from mlx_hybridcache.drafting.head import Head
from mlx_hybridcache.drafting.head_weights import head_weights

each_kind = pytest.mark.parametrize("name", KINDS)


@pytest.fixture
def written(tmp_path):
    """Writes a checkpoint with a head of random weights, or with `layers`."""

    def write(name, form="raw", layers=None):
        model = tiny.build(name)
        return heads.write(tmp_path, model, layers or heads.fresh_layers(model), form)

    return write


def head_in(name, source):
    """The head of that checkpoint, beside the model that it was made for."""
    model = tiny.build(name)
    head = Head.of(model, Layout.of(model), source)
    head.release()
    return head


def weights_of(layers):
    return dict(tree_flatten(layers.parameters()))


@each_kind
@pytest.mark.parametrize("form", ["raw", "converted"])
def test_a_head_is_read_as_it_was_written(name, form, written):
    """Norms less 1 and experts as each family's makers publish them, or as MLX converts them."""
    expected = weights_of(heads.fresh_layers(tiny.build(name)))
    found = head_weights(written(name, form))
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[each], expected[each]) for each in expected)


@each_kind
def test_mlx_lm_loads_such_a_checkpoint_and_leaves_the_head_out(name, written):
    """The model in it is the one without: which is why the head is read beside it."""
    source = written(name)
    model, _ = load_model(source)
    expected = weights_of(tiny.build(name))
    found = weights_of(model)
    assert found.keys() == expected.keys()
    assert all(mx.allclose(found[each], expected[each], atol=1e-6) for each in expected)
    head = Head.of(model, Layout.of(model), source)
    tokens, hidden = some(model)
    reference = Reference(model, heads.fresh_layers(tiny.build(name)))
    assert is_near(head, tokens, hidden, reference)


def some(model):
    """Tokens, and hidden states before them."""
    tokens = oracle.prompt(40, seed=6)
    return tokens[1:], heads.hidden_of(model, tokens)[:, :-1]


def is_near(head, tokens, hidden, reference, allowed=1e-4):
    """Whether outputs and the likeliest token are the reference's, read at once and a few at a time."""
    expected, logits = reference.logits(tokens, np.array(hidden[0]))
    for step in (len(tokens), 7):
        cache, out = head.make_cache()[0], []
        for start in range(0, len(tokens), step):
            part = slice(start, start + step)
            out.append(head.read(mx.array([tokens[part]]), hidden[:, part], cache))
        found = mx.concatenate(out, axis=1)
        if not np.allclose(np.array(found[0]), expected, atol=allowed):
            return False
        if head.likeliest(found).item() != logits[-1].argmax():
            return False
    return True


@each_kind
def test_a_head_computes_what_its_definition_says(name, written):
    """In numpy, without a cache."""
    model, head = tiny.build(name), head_in(name, written(name))
    reference = Reference(model, heads.fresh_layers(model))
    assert is_near(head, *some(model), reference)


def test_the_reference_notices_a_weight_that_is_off(written):
    """A hundredth of one norm."""
    model, head = tiny.build("qwen3_5"), head_in("qwen3_5", written("qwen3_5"))
    layers = heads.fresh_layers(model)
    layers.pre_fc_norm_hidden.weight = layers.pre_fc_norm_hidden.weight + 0.01
    assert not is_near(head, *some(model), Reference(model, layers))


@each_kind
def test_a_quantized_head_is_read_with_its_scales(name, written):
    """8 bits: nearly the reference's, and its matrices are stored so."""
    model, head = tiny.build(name), head_in(name, written(name, "quantized"))
    reference = Reference(model, heads.fresh_layers(model))
    tokens, hidden = some(model)
    expected, _ = reference.logits(tokens, np.array(hidden[0]))
    found = head.read(mx.array([tokens]), hidden, head.make_cache()[0])
    assert np.abs(np.array(found[0]) - expected).mean() < 0.05
    assert isinstance(head._layers.fc, nn.QuantizedLinear)


@pytest.mark.parametrize("prefix", ["mtp", "model.mtp", "language_model.mtp"])
def test_a_head_may_lie_in_a_file_of_its_own(prefix, written):
    """Beside the model's, under the names that conversions give it."""
    source = written("qwen3_5", "converted")
    file = source / "model.safetensors"
    every = mx.load(str(file))
    own = {name: every.pop(name) for name in [*every] if name.startswith("mtp.")}
    expected = {name.removeprefix("mtp."): array for name, array in own.items()}
    mx.eval(every, own)
    mx.save_safetensors(str(file), every)
    named = {name.replace("mtp", prefix, 1): array for name, array in own.items()}
    mx.save_safetensors(str(source / "mtp.safetensors"), named)
    found = head_weights(source)
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)


def test_weights_of_pytorch_beside_a_converted_model_have_norms_less_one(written):
    """Taken out of the published checkpoint, whose format the file names."""
    source = written("qwen3_5", "converted")
    file = source / "model.safetensors"
    every = mx.load(str(file))
    own = {
        name: array - 1.0 if array.ndim == 1 else array
        for name, array in every.items()
        if name.startswith("mtp.")
    }
    others = {name: array for name, array in every.items() if name not in own}
    mx.eval(others, own)
    mx.save_safetensors(str(file), others)
    mx.save_safetensors(str(source / "mtp.safetensors"), own, metadata={"format": "pt"})
    expected = weights_of(heads.fresh_layers(tiny.build("qwen3_5")))
    found = head_weights(source)
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)


# Refused


def asked(cache, source, **options):
    options = GREEDY | {"draft_mtp": source} | options
    return list(cache.stream_generate(PROMPT, COUNT, **options))


def test_a_checkpoint_without_a_head_is_refused(tmp_path):
    """With a sentence that says what else there is; the next request is served."""
    model = tiny.build("qwen3_next")
    source = heads.write(tmp_path, model, None)
    with new_cache("qwen3_next") as cache:
        with pytest.raises(SettingError, match=r"needs mtp\.\* weights, and .* has none"):
            asked(cache, source)
        assert asked(cache, None)


def test_another_family_is_refused(tmp_path):
    """Llama has no such head, Jamba's attention is none of its layers' own."""
    source = heads.write(tmp_path, tiny.build("qwen3_next"), None)
    for name in ("llama", "jamba", "mamba2"):
        with new_cache(name) as cache, pytest.raises(SettingError, match="draft_mtp"):
            asked(cache, source)


def test_a_head_that_is_not_the_models_is_refused(written):
    """Mixture of experts for a dense model, and another width of a matrix."""
    source = written("qwen3_5_moe")
    with new_cache("qwen3_5") as cache, pytest.raises(SettingError, match="do not fit this model"):
        asked(cache, source)
    layers = heads.fresh_layers(tiny.build("qwen3_5"))
    layers.fc = nn.Linear(64, 64, bias=False)
    source = written("qwen3_5", layers=layers)
    with new_cache("qwen3_5") as cache, pytest.raises(SettingError, match="do not fit this model"):
        asked(cache, source)


def test_a_head_of_two_layers_is_refused(written):
    """None is known."""
    source = written("qwen3_5")
    own = head_weights(source)
    second = {f"mtp.{name.replace('layers.0', 'layers.1')}": array for name, array in own.items()}
    mx.save_safetensors(str(source / "more.safetensors"), second)
    with new_cache("qwen3_5") as cache, pytest.raises(SettingError, match="no head of one layer"):
        asked(cache, source)


def test_what_cannot_go_with_a_head_is_refused(written, tmp_path):
    """Exact mode, a draft model beside it, a directory that is not there, something that names none."""
    source = written("qwen3_next")
    with new_cache("qwen3_next", exact=True) as cache, pytest.raises(SettingError, match="exact"):
        asked(cache, source)
    with new_cache("qwen3_next") as cache:
        with pytest.raises(SettingError, match="Leave one of them out"):
            asked(cache, source, draft_model=tiny.build("llama"))
        with pytest.raises(ModelError, match="found nothing there"):
            asked(cache, tmp_path / "nowhere")
        with pytest.raises(ModelError, match="nobody/nothing is not on this machine"):
            asked(cache, "nobody/nothing")
        (tmp_path / "more.safetensors").write_bytes(b"not one")
        with pytest.raises(ModelError, match=r"more\.safetensors cannot be read"):
            asked(cache, source)
        (tmp_path / "more.safetensors").unlink()
        with pytest.raises(ArgumentError, match="draft_mtp is True"):
            asked(cache, True)
        assert asked(cache, source, num_draft_tokens=0)


def test_a_directory_is_read_once(written):
    """With the first request that names it, or before: it may be gone then."""
    source = written("qwen3_5")
    with new_cache("qwen3_5") as cache:
        cache.learn_mtp(source)
        shutil.rmtree(source)
        assert asked(cache, source)
        assert asked(cache, str(source))


def test_a_configuration_is_not_needed(written):
    """What a head is quantized to is seen in its arrays."""
    source = written("qwen3_5", "quantized")
    assert json.loads((source / "config.json").read_text())
    (source / "config.json").unlink()
    assert head_in("qwen3_5", source)
