"""The cache as requests see it: in usage, reports, metrics, and under `/v1/cache`."""

from __future__ import annotations

import json
from itertools import pairwise

from bundled import load, text
from prometheus_client.parser import text_string_to_metric_families
from replies import cached, tools
from servers import (
    CHAT,
    COMPLETIONS,
    INSTANT,
    user,
)

from mlx_hybridcache import Reason


def test_what_was_read_is_told_in_usage_and_timings(server):
    """Cold nothing, again all but one; `cache_n + prompt_n` is the prompt, in streams too."""
    prompt = text(300, 900)
    body = {"prompt": prompt, "max_tokens": 3}
    replies = [server.answer(COMPLETIONS, **body) for _ in range(2)]
    stream = server.stream(COMPLETIONS, **body, stream_options={"include_usage": True})
    last = stream.events[-1]
    for reply, expected in zip([*replies, last], [0, 1, 1], strict=True):
        count, timings = reply["usage"]["prompt_tokens"], reply["timings"]
        assert cached(reply) == timings["cache_n"] == (count - 1 if expected else 0)
        assert timings["cache_n"] + timings["prompt_n"] == count
        assert timings["predicted_n"] == reply["usage"]["completion_tokens"] == 3
        assert timings["prompt_ms"] > 0
        assert timings["predicted_ms"] > 0
    without = server.stream(COMPLETIONS, **body).events[-1]
    assert without["timings"]["cache_n"] == cached(replies[1])
    assert replies[0]["choices"] == replies[1]["choices"]


def test_salts_share_and_reveal_nothing(server):
    """The same prompt under another salt, and under none: 0 cached, reason `cold`."""
    body = {"messages": user(f"Read this.\n{text(200, 1300)}"), "max_tokens": 2, **INSTANT}
    for salt in ({"cache_salt": "a"}, {"cache_salt": "b"}, {}, {"cache_salt": ""}):
        reply = server.answer(CHAT, **body, **salt)
        report = server.client.get("/v1/cache/recent").json()["data"][0]
        if salt == {"cache_salt": ""}:
            assert cached(reply) > 0  # no salt
        else:
            assert cached(reply) == 0
            assert report["matched_tokens"] <= 1 or not salt
            assert report["reason"] in {Reason.COLD, Reason.BRANCH}
            assert report["reason"] == Reason.COLD or not salt
            assert "namespace" not in report["sentence"]
    again = server.answer(CHAT, **body, cache_salt="a")
    assert cached(again) == again["usage"]["prompt_tokens"] - 1


def test_recent_reports_say_what_happened_and_show_no_text(server):
    """Newest first: reason, counts, and the kind of thing that changed; text only on request."""
    prompt = text(250, 1700) + " Today is {}. The word is xylophone."
    for date in ("2026-01-31", "2026-02-01"):
        server.answer(COMPLETIONS, prompt=prompt.format(date), max_tokens=1)
    answer = server.client.get("/v1/cache/recent")
    newest, before = answer.json()["data"][:2]
    assert newest["endpoint"].endswith("/completions")
    assert before["reason"] in {Reason.COLD, Reason.BRANCH}
    assert newest["reason"] == Reason.BRANCH
    assert newest["restored_tokens"] + newest["replayed_tokens"] == newest["prompt_tokens"]
    assert newest["diverged_at"] == newest["matched_tokens"] > 250
    assert newest["restored_tokens"] > 150
    assert newest["changed"] == "date"
    assert newest["created"] >= before["created"]
    assert newest["sentence"]
    assert newest["id"] != before["id"]
    assert "xylophone" not in answer.text


def test_texts_are_shown_only_when_started_so_and_never_for_salted_requests(strict):
    """With --show-prompts the prompt's text around the change, without a salt."""
    prompt = "The lamp of Ada is red. The lamp of Zoe is {}, and so on and on."
    mine = {"cache_salt": "s"}
    for colour, salt in (("grey", mine), ("blue", {}), ("pink", {}), ("green", mine)):
        strict.answer(COMPLETIONS, prompt=prompt.format(colour), max_tokens=1, **salt)
    salted, shown = strict.client.get("/v1/cache/recent").json()["data"][:2]
    assert "pink" in json.dumps(shown["text"])
    assert not salted.get("text")
    assert salted["diverged_at"]
    assert "grey" not in json.dumps(salted)


def test_prompts_are_not_logged(server):
    """At the default level neither the prompt nor the reply is in the log."""
    server.answer(COMPLETIONS, prompt="A quixotic marmalade", max_tokens=3)
    server.post(COMPLETIONS, prompt="A quixotic marmalade", max_tokens=0)
    assert "marmalade" not in server.log


def test_statistics_and_clearing(server):
    """Held bytes are what is stored, running and retained; after DELETE nothing is stored."""
    server.answer(COMPLETIONS, prompt=text(100, 2100), max_tokens=2)
    told = server.client.get("/v1/cache").json()
    assert told["held_bytes"] == sum(
        told[name] for name in ("rows_bytes", "snapshot_bytes", "running_bytes", "retained_bytes")
    )
    assert 0 < told["held_bytes"] <= told["budget_bytes"]
    assert told["checkpoints"] > 0
    assert told["tokens"] >= 100
    assert server.client.delete("/v1/cache").status_code == 200
    told = server.client.get("/v1/cache").json()
    assert (told["rows_bytes"], told["snapshot_bytes"], told["tokens"]) == (0, 0, 0)
    reply = server.answer(COMPLETIONS, prompt=text(100, 2100), max_tokens=2)
    assert cached(reply) == 0


def test_the_budget_is_what_was_asked_for(strict):
    """--cache-ram 64 counts MiB, as in llama.cpp."""
    assert strict.client.get("/v1/cache").json()["budget_bytes"] == 64 * 2**20


def test_a_warmed_prefix_is_hot_for_the_first_request(server):
    """A system message and tools are read ahead; the first question reads only itself."""
    system = {"role": "system", "content": text(200, 2300)}
    shared = {"tools": tools("get_time"), **INSTANT}
    warmed = server.client.post("/v1/cache/warm", json={"messages": [system], **shared})
    assert warmed.status_code == 200
    position = warmed.json()["position"]
    assert position > 200
    question = [system, *user("What time is it in Oslo?")]
    reply = server.answer(CHAT, messages=question, **shared)
    assert cached(reply) >= position - 1
    assert reply["choices"][0]["finish_reason"] == "tool_calls"
    raw = text(150, 2600)
    assert server.client.post("/v1/cache/warm", json={"prompt": raw}).status_code == 200
    assert cached(server.answer(COMPLETIONS, prompt=raw + " and", max_tokens=1)) >= 100
    salted = {"prompt": text(150, 2800), "cache_salt": "s"}
    assert server.client.post("/v1/cache/warm", json=salted).status_code == 200
    assert cached(server.answer(COMPLETIONS, prompt=salted["prompt"], max_tokens=1)) == 0
    assert cached(server.answer(COMPLETIONS, **salted, max_tokens=1)) > 100
    assert server.client.post("/v1/cache/warm", json={}).status_code == 400


def test_pins_are_set_and_taken_back(server):
    """Pinning reads what is not stored; unpinning what is not stored is 404."""
    body = {"prompt": text(150, 3000)}
    pinned = server.client.post("/v1/cache/pin", json=body)
    assert pinned.status_code == 200
    assert cached(server.answer(COMPLETIONS, **body, max_tokens=1)) > 100
    assert server.client.request("DELETE", "/v1/cache/pin", json=body).status_code == 200
    unknown = {"prompt": "never seen " + text(50, 3300)}
    assert server.client.request("DELETE", "/v1/cache/pin", json=unknown).status_code == 404


def test_metrics_are_prometheus(server):
    """They parse, and requests and cached tokens are counted."""

    def read() -> dict[str, float]:
        answer = server.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(answer.text):
            assert family.documentation
            for sample in family.samples:
                if not sample.name.endswith(("_created", "_bucket")):
                    totals[sample.name] = totals.get(sample.name, 0) + sample.value
        return totals

    before = read()
    replies = [server.answer(COMPLETIONS, prompt=text(80, 3400), max_tokens=2) for _ in range(2)]
    after = read()
    restored = cached(replies[1])
    for name, grown in {
        "requests_total": 3,  # the first reading of the metrics is one
        "prompts_total": 2,
        "restored_tokens_total": restored,
        "replayed_tokens_total": 160 - restored,
        "generated_tokens_total": 4,
        "time_to_first_token_seconds_count": 2,
    }.items():
        full = f"mlx_hybridcache_{name}"
        assert after[full] - before.get(full, 0) == grown, name


def test_unused_prompt_tokens_are_those_of_the_template(server):
    """The prompt is what the chat template gives, tools included."""
    _, tokenizer = load()
    rendered = tokenizer.apply_chat_template(
        user("Hi"), tools=tools("get_time"), tokenize=False, add_generation_prompt=True
    )
    expected = len(tokenizer.encode(rendered, add_special_tokens=False))
    reply = server.answer(CHAT, messages=user("Hi"), tools=tools("get_time"), max_tokens=1)
    assert reply["usage"]["prompt_tokens"] == expected


def test_neighbouring_prompts_restore_from_each_other(server):
    """Longer, shorter and changed endings of one text: each restores most of it."""
    base = text(400, 3600)
    server.answer(COMPLETIONS, prompt=base, max_tokens=1)
    asked = [base + " and more", text(350, 3600), text(380, 3600) + " but other"]
    replies = [server.answer(COMPLETIONS, prompt=prompt, max_tokens=1) for prompt in asked]
    for reply in replies:
        assert cached(reply) >= 0.5 * reply["usage"]["prompt_tokens"]
    assert all(a["usage"] != b["usage"] for a, b in pairwise(replies))


def test_what_is_remembered_of_texts_is_told_beside_the_budget(server):
    """A chat's text is remembered within its bound, and forgotten with everything else."""
    server.answer(CHAT, messages=user("Which lamp is red?"), max_tokens=1, **INSTANT)
    told = server.client.get("/v1/cache").json()["tokenizing"]
    assert told["whole"] is None
    assert told["texts"] > 0
    assert 0 < told["bytes"] < told["most_bytes"]
    server.client.delete("/v1/cache")
    left = server.client.get("/v1/cache").json()["tokenizing"]
    assert (left["texts"], left["bytes"]) == (0, 0)
