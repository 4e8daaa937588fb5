"""`--draft-from-cache`, `--draft-model` and `--draft-mtp`: a reply takes fewer forwards, says so, and is the same."""

import json
import shutil

import pytest
from in_process import CHAT, Client, served, started
from mlx_hybridcache_server.generation.models import load
from mlx_hybridcache_server.grammar.constrain import Guide
from mlx_hybridcache_server.settings import Settings

from mlx_hybridcache import SettingError
from mlx_hybridcache.demo import BUNDLED_MODEL

MESSAGES = [{"role": "user", "content": "Name the colours of a rainbow, please."}]
INSTANT = {
    "chat_template_kwargs": {"enable_thinking": False}
}  # reasoning is stripped and not stored
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "list",
        "schema": {
            "type": "object",
            "properties": {
                "colours": {"type": "array", "items": {"type": "string"}, "maxItems": 4}
            },
            "required": ["colours"],
            "additionalProperties": False,
        },
    },
}


def asked(*bodies, flags=("--draft-from-cache",)):
    """The replies to these requests, one after the other, and what /metrics says then."""

    async def work(serving, app):
        replies = []
        for body in bodies:
            asked = {"messages": MESSAGES, "max_tokens": 60, **INSTANT, **body}
            replies.append((await Client(app, CHAT, asked).answer()).reply)
        metrics = await Client(app, "/metrics", b"", method="GET").answer()
        told = b"".join(message.get("body", b"") for message in metrics.sent).decode()
        return replies, told

    return served(work, *flags)


def said(reply):
    """All that a reply is, but for names and times."""
    return [(each["message"], each["finish_reason"], each["logprobs"]) for each in reply["choices"]]


def test_a_reply_that_is_written_again_takes_fewer_forwards_and_is_the_same():
    """With its logprobs, by the target's own numbers; sampled too, and held to a schema."""
    for body in (
        {"logprobs": True, "top_logprobs": 3, "logit_bias": {"0": -100}},
        {"temperature": 1.0, "top_p": 0.9, "seed": 5, "logprobs": True},
        {"response_format": SCHEMA, "logprobs": True},
        {"stop": ["e"], "logprobs": True},
    ):
        (plain,), _ = asked(body, flags=())
        (first, again), told = asked(body, body)
        assert said(plain) == said(first) == said(again)
        assert "draft_n" not in plain["timings"]
        timings = again["timings"]
        assert timings["draft_n_accepted"] <= timings["draft_n"]
        if timings["predicted_n"] > 12:
            assert timings["forwards_n"] < timings["predicted_n"] / 2
        drafted = first["timings"]["draft_n"] + timings["draft_n"]
        assert f"mlx_hybridcache_drafted_tokens_total {float(drafted)}" in told


def test_a_request_bounds_its_drafts():
    """`num_draft_tokens`: 2 at a time, or none."""
    (_, two, none), _ = asked({}, {"num_draft_tokens": 2}, {"num_draft_tokens": 0})
    assert 2 * two["timings"]["forwards_n"] >= two["timings"]["draft_n"] > 0
    assert "draft_n" not in none["timings"]
    assert said(two) == said(none)


def test_quantized_rows_are_drafted_on_too():
    """`--kv-bits 8`: the reply is the one that such rows give without drafts."""
    body, bits = {"logprobs": True}, ("--kv-bits", "8", "--quantized-kv-start", "20")
    (plain,), _ = asked(body, flags=bits)
    (_, again), _ = asked(body, body, flags=("--draft-from-cache", *bits))
    assert said(plain) == said(again)
    assert again["timings"]["draft_n_accepted"] > 0


def test_what_a_schema_refuses_is_not_drafted(monkeypatch):
    """The same prompt's stored text is no such JSON: less of it is read, and the reply is the same."""
    bodies = ({}, {"response_format": SCHEMA})
    (_, filtered), _ = asked(*bodies)
    monkeypatch.setattr(Guide, "may_follow", lambda guide, tokens: len(tokens))
    (_, plain), _ = asked(*bodies)
    assert said(filtered) == said(plain)
    one, other = filtered["timings"], plain["timings"]
    assert one["draft_n"] < other["draft_n"]
    assert one["draft_n_accepted"] >= other["draft_n_accepted"] > 0


# Draft models: the bundled model for itself

BY_MODEL = ("--draft-model", str(BUNDLED_MODEL))


def test_a_draft_models_reply_is_the_same_in_fewer_forwards():
    """Greedy, sampled, held to a schema: with its logprobs. What the draft model took is told apart."""
    for body in (
        {"logprobs": True, "top_logprobs": 3},
        {"temperature": 0.4, "seed": 5, "logprobs": True},
        {"response_format": SCHEMA, "logprobs": True},
    ):
        (plain,), _ = asked(body, flags=())
        (found,), told = asked(body, flags=BY_MODEL)
        assert said(plain) == said(found)
        timings = found["timings"]
        assert 0 < timings["draft_n_accepted"] <= timings["draft_n"]
        assert timings["forwards_n"] < timings["predicted_n"]
        calls = float(timings["draft_forwards_n"])
        assert calls > timings["draft_n"]
        assert f"mlx_hybridcache_draft_model_forwards_total {calls}" in told


def test_the_next_turn_is_restored_for_both_models():
    """Of a long first turn, on a hybrid: the draft model reads what is new and no more."""
    begin = [{"role": "user", "content": "Name the colours of a rainbow, please. " * 20}]
    (first,), _ = asked({"messages": begin}, flags=BY_MODEL)
    reply = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    more = [*begin, reply, {"role": "user", "content": "And why?"}]
    (_, second), _ = asked({"messages": begin}, {"messages": more}, flags=BY_MODEL)
    timings = second["timings"]
    assert timings["draft_cache_n"] == timings["cache_n"] > 100


def test_both_kinds_of_drafts_go_together():
    """What is stored first: written again, the reply takes fewer forwards than by the model alone."""
    flags = ("--draft-from-cache", *BY_MODEL)
    (first, again), _ = asked({}, {}, flags=flags)
    assert said(first) == said(again)
    assert again["timings"]["forwards_n"] < first["timings"]["forwards_n"]
    assert again["timings"]["draft_forwards_n"] < first["timings"]["draft_forwards_n"]


def test_a_request_without_the_cache_or_without_tokens_at_once_has_no_drafts():
    """mlx-lm's own drafts could not go back in this hybrid's caches; the reply is the same."""
    bodies = ({}, {"cache_prompt": False}, {"num_draft_tokens": 0})
    (drafted, *others), _ = asked(*bodies, flags=BY_MODEL)
    assert "draft_n" in drafted["timings"]
    for each in others:
        assert said(each) == said(drafted)
        assert "draft_n" not in each["timings"]


def test_a_request_may_name_a_draft_model_where_models_are_switched():
    """As in mlx_lm.server: it is loaded for it, and the next request that names none has none."""
    flags = ("--allow-model-switching",)
    bodies = ({"draft_model": str(BUNDLED_MODEL)}, {"draft_model": "./nowhere"}, {})
    (drafted, missing, plain), _ = asked(*bodies, flags=flags)
    assert drafted["timings"]["draft_n_accepted"] > 0
    assert "./nowhere" in missing["error"]["message"]
    assert "draft_n" not in plain["timings"]
    assert said(plain) == said(drafted)


@pytest.mark.parametrize("drafts", [BY_MODEL, ("--draft-from-cache",), ("--draft-mtp",)])
def test_exact_refuses_drafts_when_it_starts(drafts, capsys):
    """In one sentence that names both flags."""
    assert started("--exact", *drafts) == 2
    assert f"{drafts[0]} cannot be used with --exact" in capsys.readouterr().err


def test_a_draft_model_of_another_vocabulary_is_refused_when_it_is_loaded(tmp_path):
    """The bundled model with a tokenizer that lacks a word, in one sentence."""
    shutil.copytree(BUNDLED_MODEL, tmp_path / "draft")
    file = tmp_path / "draft" / "tokenizer.json"
    told = json.loads(file.read_text())
    vocabulary, added = told["model"]["vocab"], {each["content"] for each in told["added_tokens"]}
    word = max(vocabulary.keys() - added, key=vocabulary.get)
    del vocabulary[word]
    told["model"]["merges"] = [
        each
        for each in told["model"]["merges"]
        if word not in ("".join(each), each.replace(" ", "") if isinstance(each, str) else "")
    ]
    file.write_text(json.dumps(told))
    settings = Settings(draft_model=str(file.parent))
    with pytest.raises(SettingError, match=r"has a vocabulary of \d+, .* one of \d+\."):
        load(settings, settings.model)
