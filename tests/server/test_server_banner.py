"""The lines with which a server starts: what it serves, within what, and what it cannot do."""

import re
from dataclasses import replace
from types import SimpleNamespace

import bundled
import mlx.nn as nn
import pytest
import tiny
from mlx_hybridcache_server.banner import banner, quantization
from mlx_hybridcache_server.generation.models import load
from mlx_hybridcache_server.prompts.tokenizing import Room
from mlx_hybridcache_server.settings import Settings
from mlx_lm.models.cache import KVCache
from servers import OURS, running

from mlx_hybridcache import HybridPromptCache

ADDRESS = "http://127.0.0.1:8080"
SMALL = Settings(memory_budget=200_000_000, memory_reserve=0)


def told(settings, loaded):
    """The lines by what they begin with."""
    return dict(line.split(": ", 1) for line in banner(settings, loaded, ADDRESS))


def of(settings):
    """The lines of a server with these settings."""
    loaded = load(settings, settings.model)
    try:
        return told(settings, loaded)
    finally:
        loaded.cache.close()


def beside(model, **settings):
    """The lines for another model, with no files of its own."""
    with HybridPromptCache(model, memory_budget="100MB", memory_reserve=0, **settings) as cache:
        return told(
            Settings(memory_budget=100_000_000),
            SimpleNamespace(
                cache=cache,
                id="tiny",
                source="/no/such/model",
                renderer=SimpleNamespace(room=Room(budget=cache.info.longest_prompt)),
            ),
        )


def test_a_server_says_what_it_serves_and_within_what():
    """The bundled model, 190.7 MiB for its cache: eight lines, each a sentence of its own."""
    lines = of(SMALL)
    assert list(lines) == [
        *("Model", "Context", "Memory", "Cache", "Cache directory", "Batches", "API key", "Page")
    ]
    assert re.search(r"\(qwen3_next\), \w+ weights, \d+\.\d MiB\.$", lines["Model"])
    assert re.match(r"prompts of up to [\d,]+ tokens, by ", lines["Context"])
    assert lines["Memory"].startswith(
        "190.7 MiB for the cache and running requests, as --prompt-cache-bytes says; none is left"
    )
    assert re.match(
        r"\d+ of \d+ layers restore at checkpoints only; a token weighs", lines["Cache"]
    )
    assert lines["Cache directory"].startswith("none; with --cache-dir")
    assert lines["Batches"] == "replies that are written at once share each forward."
    assert lines["API key"] == "none; whoever reaches 127.0.0.1 may ask."
    assert lines["Page"].startswith(f"{ADDRESS}/ ")


def test_limits_are_named_by_what_sets_them(tmp_path):
    """The nearest first, the others beside it; a key is never shown."""
    settings = replace(
        SMALL,
        max_prompt_tokens=1000,
        api_key="secret",
        cache_dir=str(tmp_path / "cache"),
        disk_budget=10**9,
        exact=True,
        memory_reserve=2**29,
    )
    lines = of(settings)
    assert lines["Context"].startswith("prompts of up to 1,000 tokens, by --max-prompt-tokens (")
    assert "by its configuration" in lines["Context"]
    assert "512.0 MiB of the system's stay free" in lines["Memory"]
    assert lines["Cache directory"] == f"{settings.cache_dir}, 0 B of 953.7 MiB used."
    assert lines["Batches"] == "replies are written one by one, with --exact."
    assert lines["API key"] == "needed; clients send it as bearer token."
    assert "secret" not in str(lines)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompt_cache_size": 0}, "off with --prompt-cache-size 0"),
        ({"memory_budget": 0}, "off with --prompt-cache-size 0 or no memory"),
    ],
)
def test_what_turns_the_cache_off_is_said(changed, said):
    """With the flag that does it."""
    assert of(replace(SMALL, **changed))["Cache"].startswith(said)


def test_what_of_a_model_cannot_be_cached_or_batched_is_said(monkeypatch):
    """Rows alone restore anywhere; windows cannot be merged; an unknown cache is named."""
    rows = beside(tiny.build("qwen3"))
    assert rows["Cache"].startswith("every prompt is restored at any token; a token weighs")
    assert "cannot be merged without changing" in beside(tiny.build("gemma3_text"))["Batches"]

    class NewCache(KVCache):
        """Of a later mlx-lm."""

    model = tiny.fresh("llama")
    monkeypatch.setattr(
        type(model), "make_cache", lambda self: [NewCache() for _ in self.layers], raising=False
    )
    lines = beside(model)
    assert lines["Cache"].startswith("none, as NewCache of this model cannot be stored")
    assert "no limit is known" in lines["Context"] or "by the memory budget" in lines["Context"]


def test_weights_are_named_by_their_bits():
    """One width, two, and none: then by what they are kept in."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    assert quantization(model) == "float32 weights"
    nn.quantize(model, bits=8, class_predicate=lambda p, m: "1" in p)
    assert quantization(model) == "8-bit weights"
    nn.quantize(model, bits=4, class_predicate=lambda p, m: "2" in p and hasattr(m, "to_quantized"))
    assert quantization(model) == "4- and 8-bit weights"
    assert quantization(bundled.load()[0]).endswith("weights")


def test_a_server_begins_its_log_with_them():
    """Before it says that it listens, at the address where it does."""
    with running(OURS, "--prompt-cache-bytes", "200MB") as server:
        log = server.log
        at = [
            log.index(word) for word in ("Model: ", "Memory: 190.7 MiB", "Page: ", "Listening on")
        ]
        assert at == sorted(at)
        assert f"Page: http://127.0.0.1:{server.port}/" in log
