"""What clients of llama.cpp's server look for: what is served, and text as tokens and back."""

from __future__ import annotations

import pytest
from bundled import chat, load
from in_process import Client, busy, served, until
from mlx_hybridcache_server.probes.routes import _piece
from replies import ENDLESS, tools
from servers import CHAT, COMPLETIONS, INSTANT, user


def test_what_is_served_is_told_as_llama_cpp_tells_it(server):
    """The context, how many replies at once, the template; no prompts."""
    props = server.client.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 131_072
    assert props["total_slots"] == 32
    assert props["model_alias"] == "mlx-hybridcache-demo"
    assert "<|im_start|>" in props["chat_template"]
    assert server.client.get("/slots").json() == []


def test_a_reply_that_runs_has_a_slot():
    """With how far it is, and nothing of its prompt."""

    async def work(serving, app):
        first = Client(app, COMPLETIONS, {"prompt": "secret", **ENDLESS, "stream": True})
        await until(lambda: any(run.count.completion for run in serving.runs))
        slots = await Client(app, "/slots", method="GET", body=b"").answer()
        (slot,) = slots.reply
        assert (slot["id"], slot["is_processing"], slot["state"]) == (0, True, "writing")
        assert "secret" not in str(slot)
        first.leave()
        await until(lambda: not busy(serving))

    served(work)


@pytest.mark.parametrize("text", ["Hello, ü and あ.", "<|im_start|>user\nx<|im_end|>\n", " a", ""])
def test_text_is_tokens_and_back(server, text):
    """As the tokenizer reads it in a prompt; the pieces are the text's bytes."""
    own = load()[1].encode(text, add_special_tokens=False)
    tokens = server.answer("/tokenize", content=text)["tokens"]
    assert tokens == own
    assert server.answer("/detokenize", tokens=tokens)["content"] == text
    pieces = server.answer("/tokenize", content=text, with_pieces=True)["tokens"]
    assert [piece["id"] for piece in pieces] == tokens
    spelled = b"".join(
        each.encode() if isinstance(each := piece["piece"], str) else bytes(each)
        for piece in pieces
    )
    assert spelled.decode() == text


def test_a_piece_of_a_character_is_its_bytes():
    assert _piece(b"ab") == "ab"
    assert _piece(b"\xe3\x81") == [0xE3, 0x81]


def test_a_chats_prompt_is_shown_as_it_is_read(server):
    """Its tokens are those that a reply to the chat is counted with."""
    body = {"messages": user("Where is Omar?"), "tools": tools("find_person")}
    prompt = server.answer("/apply-template", **body, **INSTANT)["prompt"]
    assert prompt.endswith("</think>\n\n")
    read = server.answer(CHAT, **body, **INSTANT, max_tokens=1)["usage"]["prompt_tokens"]
    assert len(server.answer("/tokenize", content=prompt)["tokens"]) == read
    plain = server.answer("/apply-template", messages=user("x"), add_generation_prompt=False)
    assert load()[1].encode(plain["prompt"], add_special_tokens=False) == chat(
        ("user", "x"), reply=False
    )


def test_what_is_not_served_or_not_readable_is_said(server):
    """Embeddings: 501 and where to ask; ids that the model does not have, roles that nobody has."""
    refused = server.post("/v1/embeddings", input="x", model="m")
    assert refused.status_code == 501
    assert "llama-server --embedding" in refused.json()["error"]["message"]
    for path, body, name in (
        ("/detokenize", {"tokens": [3072]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/tokenize", {"content": 5}, "content"),
        ("/apply-template", {"messages": []}, "messages"),
        ("/apply-template", {"messages": [{"content": "x"}]}, "messages"),
    ):
        reply = server.post(path, **body)
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["param"].startswith(name)


def test_a_text_that_does_not_fit_is_refused_as_a_prompt_is(strict):
    """By its length, before it is read."""
    refused = strict.post("/tokenize", content="word " * 100)
    assert refused.status_code == 400
    assert "at most 60" in refused.json()["error"]["message"]
