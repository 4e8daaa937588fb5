"""A stream is never silent, whatever it waits for: counted in comments, not in seconds."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, aclosing

from in_process import COMPLETIONS, ENDLESS, Client, busy, served, until
from mlx_hybridcache_server.http.keepalive import COMMENT, kept_alive

OFTEN = ("--keepalive-seconds", "0.02")


def said(client: Client) -> bytes:
    return b"".join(message.get("body", b"") for message in client.sent[1:])


def comments(client: Client) -> int:
    return said(client).count(b": keepalive")


def test_comments_stand_between_chunks_for_as_long_as_none_comes():
    """Three comments before the first chunk, two before the second, none behind; nothing is lost."""
    goes_on = asyncio.Event()

    async def slow():
        for chunk in (b"a", b"b"):
            await goes_on.wait()
            goes_on.clear()
            yield chunk

    async def work():
        got = []
        async with aclosing(kept_alive(slow(), 0.001)) as chunks:
            async for chunk in chunks:
                got.append(chunk)
                if got in ([COMMENT] * 3, [COMMENT] * 3 + [b"a"] + [COMMENT] * 2):
                    goes_on.set()
                if b"b" in got:
                    break
        return [chunk for chunk in got if chunk != COMMENT], got.index(b"a"), got.count(COMMENT)

    chunks, first, count = asyncio.run(work())
    assert chunks == [b"a", b"b"]
    assert first >= 3
    assert count >= 5


def test_who_stops_listening_ends_what_is_waited_for():
    """Closed while nothing comes, the generator behind it is closed too; its errors come through."""
    ended = []

    async def silent():
        try:
            await asyncio.Event().wait()
            yield b""
        finally:
            ended.append(True)

    async def failing():
        raise ValueError("why")
        yield b""

    async def work():
        async with aclosing(kept_alive(silent(), 0.001, iter((b"1", b"2")).__next__)) as chunks:
            assert [await anext(chunks), await anext(chunks)] == [b"1", b"2"]
        try:
            await anext(kept_alive(failing(), 1))
        except ValueError as error:
            return str(error)

    assert asyncio.run(work()) == "why"
    assert ended == [True]


def test_a_stream_that_is_queued_or_holds_its_text_back_says_so():
    """One writes for ever what might become its stop text; the next one waits for its turn."""

    async def work(serving, app):
        token = serving.loaded.tokenizer.decode([700])
        holds = {**ENDLESS, "stop": token * 100_000, "stream": True}
        first = Client(app, COMPLETIONS, holds)
        await until(lambda: any(run.count.completion for run in serving.runs))
        second = Client(app, COMPLETIONS, {"prompt": "x", "max_tokens": 1, "stream": True})
        await until(lambda: serving.admission.waiting == 1)
        begun = comments(first)
        await until(lambda: comments(first) >= begun + 3 and comments(second) >= 3)
        assert b"data:" not in said(first) + said(second)
        first.leave()
        await second.answer()
        assert said(second).endswith(b"data: [DONE]\n\n")
        await until(lambda: not busy(serving))

    served(work, *OFTEN, "--decode-concurrency", "1")


def test_a_streams_usage_and_its_end_go_out_as_one():
    """Each piece passes all that stands before the application, and is sent alone."""

    async def work(serving, app):
        body = {"prompt": "x", "max_tokens": 1, "stream": True}
        body["stream_options"] = {"include_usage": True}
        client = await Client(app, COMPLETIONS, body).answer()
        return [message["body"] for message in client.sent[1:]]

    *_, told, nothing = served(work)
    assert (told.count(b"data: "), nothing) == (2, b"")
    assert b'"usage":{' in told
    assert told.endswith(b"data: [DONE]\n\n")


def test_a_stream_that_waits_for_its_model_says_so_and_tells_what_came_of_it():
    """The one that is served is in use, so the other is not loaded yet: comments; then an error event,
    as there is no such model. One that leaves meanwhile leaves nothing behind.
    """

    async def work(serving, app):
        body = {"prompt": "x", "max_tokens": 1, "stream": True, "model": "/nowhere/at/all"}
        with ExitStack() as held:
            await serving.slot.any_model(held)
            stays, leaves = Client(app, COMPLETIONS, body), Client(app, COMPLETIONS, body)
            await until(lambda: comments(stays) >= 3 and comments(leaves) >= 3)
            leaves.leave()
            await leaves.answer()
            assert serving.admission.taken == 1
        await stays.answer()
        assert stays.status == 200
        assert b'"code":"model_not_found"' in said(stays)
        assert said(stays).endswith(b"data: [DONE]\n\n")
        await until(lambda: not busy(serving))

    served(work, *OFTEN, "--allow-model-switching")


def test_a_stream_that_began_before_its_answer_has_its_warnings_in_the_log(caplog):
    """Its header is long sent when it is known what was not followed."""

    async def work(serving, app):
        steps, goes_on = serving.rendering.steps, asyncio.Event()

        async def waiting(*given):
            await goes_on.wait()
            return await steps(*given)

        serving.rendering.steps = waiting
        body = {"prompt": "x", "max_tokens": 1, "stream": True, "mirostat": 2}
        late = Client(app, COMPLETIONS, body)
        await until(lambda: comments(late))
        assert "mirostat" not in caplog.text
        goes_on.set()
        await late.answer()
        assert late.status == 200
        assert "mirostat" in caplog.text

    served(work, *OFTEN)
