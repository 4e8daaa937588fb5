"""`--draft-from-cache`: a reply that is written again takes fewer forwards, says so, and is the same."""

from in_process import CHAT, Client, served
from mlx_hybridcache_server.grammar.constrain import Guide

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
