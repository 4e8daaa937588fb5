"""`--draft-mtp`: the bundled model with a head beside it, which knows one of its replies."""

import logging
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from in_process import CHAT, Client, served, started
from mlx.utils import tree_flatten
from mlx_hybridcache_server.banner import banner
from mlx_hybridcache_server.generation.models import load
from mlx_hybridcache_server.settings import Settings
from odd_models import heads

from mlx_hybridcache import SettingError, models
from mlx_hybridcache.demo import BUNDLED_MODEL

MESSAGES = [{"role": "user", "content": "Name the colours of a rainbow, please."}]
INSTANT = {"chat_template_kwargs": {"enable_thinking": False}}
COUNT = 40


@pytest.fixture(scope="module")
def headed(tmp_path_factory):
    """The directory."""
    model, tokenizer = models.load(str(BUNDLED_MODEL))
    prompt = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, enable_thinking=False
    )
    layers = heads.fit(model, [*prompt, *heads.greedy(model, prompt, COUNT + 2)])
    made = Path(tmp_path_factory.mktemp("headed")) / "headed"
    shutil.copytree(BUNDLED_MODEL, made)
    named = {f"mtp.{name}": array for name, array in tree_flatten(layers.parameters())}
    mx.save_safetensors(str(made / "mtp.safetensors"), named, metadata={"format": "mlx"})
    return str(made)


def asked(headed, *bodies, flags=("--draft-mtp",)):
    """The replies to these requests, one after the other, and what /metrics says then."""

    async def work(serving, app):
        replies = []
        for body in bodies:
            asked = {"messages": MESSAGES, "max_tokens": COUNT, **INSTANT, **body}
            replies.append((await Client(app, CHAT, asked).answer()).reply)
        metrics = await Client(app, "/metrics", b"", method="GET").answer()
        told = b"".join(message.get("body", b"") for message in metrics.sent).decode()
        return replies, told

    return served(work, "--model", headed, *flags)


def said(reply):
    """All that a reply is, but for names and times."""
    return [(each["message"], each["finish_reason"], each["logprobs"]) for each in reply["choices"]]


def test_a_reply_is_the_same_in_fewer_forwards(headed):
    """Greedy and sampled, with its logprobs; what the head took is told."""
    bodies = (
        {"logprobs": True, "top_logprobs": 3},
        {"temperature": 0.4, "seed": 5, "cache_salt": "2"},
    )
    plainly, _ = asked(headed, *bodies, flags=())
    drafted, told = asked(headed, *bodies)
    calls = 0.0
    for plain, found in zip(plainly, drafted, strict=True):
        assert said(plain) == said(found)
        timings = found["timings"]
        assert 0 < timings["draft_n_accepted"] <= timings["draft_n"]
        assert timings["forwards_n"] < timings["predicted_n"]
        assert timings["draft_forwards_n"] > timings["draft_n"]
        calls += timings["draft_forwards_n"]
        assert timings["draft_cache_n"] == 0
        assert "draft_n" not in plain["timings"]
    assert f"mlx_hybridcache_draft_model_forwards_total {calls}" in told


def test_the_cache_restores_as_much_beside_a_head(headed):
    """The same request again, and the next turn; of both the head has what the model has."""
    more = [*MESSAGES, {"role": "assistant", "content": "Red."}, {"role": "user", "content": "?"}]
    bodies = ({}, {}, {"messages": more})
    plain, _ = asked(headed, *bodies, flags=())
    found, _ = asked(headed, *bodies)
    assert [each["timings"]["cache_n"] for each in found] == [
        each["timings"]["cache_n"] for each in plain
    ]
    assert [*map(said, found)] == [*map(said, plain)]
    heard = [each["timings"]["draft_cache_n"] for each in found]
    assert heard == [each["timings"]["cache_n"] for each in found]
    assert heard[1] > heard[0] == 0
    first, again = (each["timings"] for each in found[:2])
    assert again["draft_n_accepted"] == first["draft_n_accepted"] > 0


def test_a_request_may_have_no_drafts(headed):
    """Without tokens at once, or without the cache."""
    bodies = ({}, {"num_draft_tokens": 0}, {"cache_prompt": False}, {"num_draft_tokens": 1})
    (drafted, none, uncached, one), _ = asked(headed, *bodies)
    assert said(drafted) == said(none) == said(uncached) == said(one)
    assert "draft_n" not in none["timings"]
    assert "draft_n" not in uncached["timings"]
    assert one["timings"]["draft_n"] <= one["timings"]["forwards_n"]


def test_what_is_stored_comes_first(headed):
    """A reply that is written again takes fewer calls of the head."""
    (first, again), _ = asked(headed, {}, {}, flags=("--draft-from-cache", "--draft-mtp"))
    assert said(first) == said(again)
    assert again["timings"]["forwards_n"] < first["timings"]["forwards_n"]
    assert again["timings"]["draft_forwards_n"] < first["timings"]["draft_forwards_n"]


def test_a_model_without_a_head_is_refused_when_it_is_loaded():
    """In one sentence, and its cache is closed."""
    settings = Settings(draft_mtp=True)
    with pytest.raises(SettingError, match=r"needs mtp\.\* weights"):
        load(settings, settings.model)


def test_another_model_without_a_head_is_served_without_drafts(headed, caplog):
    """Where a request names one: it is said once."""
    bodies = ({}, {"model": str(BUNDLED_MODEL)})
    with caplog.at_level(logging.WARNING):
        (drafted, plain), _ = asked(
            headed, *bodies, flags=("--draft-mtp", "--allow-model-switching")
        )
    assert drafted["timings"]["draft_n"] > 0
    assert "draft_n" not in plain["timings"]
    assert "are not drafted so" in caplog.text


def test_two_that_compute_drafts_are_refused(headed, capsys):
    """In one sentence that names both flags."""
    flags = ("--draft-mtp", "--draft-model", str(BUNDLED_MODEL))
    assert started("--model", headed, *flags) == 2
    assert "--draft-model and --draft-mtp both draft" in capsys.readouterr().err


def test_the_banner_names_the_head(headed):
    """With how many tokens it drafts at a time."""
    settings = Settings(model=headed, draft_mtp=True)
    loaded = load(settings, settings.model)
    try:
        told = banner(settings, loaded, "http://127.0.0.1:8080")
    finally:
        loaded.cache.close()
    assert "Drafts: by the model's own head, up to 3 tokens at a time." in told
