"""Who is let in and who gets a turn, without sockets: counted before the work, given back behind it."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
from bundled import text
from in_process import CHAT, COMPLETIONS, ENDLESS, WARM, Client, busy, served, until
from mlx_hybridcache_server.errors import ApiError
from mlx_hybridcache_server.generation.admission import Admission
from mlx_hybridcache_server.prompts.threads import Rendering
from mlx_hybridcache_server.prompts.tokenizing import Room
from mlx_hybridcache_server.prompts.vocabulary import longest_token
from mlx_hybridcache_server.settings import Settings

from mlx_hybridcache.models import longest_context

# Replies are counted before anything is done for them


def test_of_sixty_requests_at_once_as_many_are_let_in_as_may_run_and_wait():
    """One runs and two wait; the other 57 are refused though none was rendered yet."""

    async def work(serving, app):
        clients = [Client(app, COMPLETIONS, ENDLESS) for _ in range(60)]
        await until(lambda: sum(client.status == 429 for client in clients) == 57)
        await until(lambda: serving.admission.waiting == 2)
        assert serving.admission.taken == 3
        for client in clients:
            client.leave()
        await asyncio.gather(*(client.answer() for client in clients))
        await until(lambda: not busy(serving))
        assert (await Client(app, COMPLETIONS, {**ENDLESS, "max_tokens": 1}).answer()).status == 200
        return [client for client in clients if client.status == 429]

    refused = served(work, "--decode-concurrency", "1", "--max-queue", "2")
    assert all(int(one.headers[b"retry-after"]) > 0 for one in refused)
    assert {one.reply["error"]["code"] for one in refused} == {"queue_full"}


def test_every_reply_of_a_request_counts():
    """2,500 prompts and n: 8 are 20,000 replies, and two prompts with n: 2 are four: one too many."""

    async def work(serving, app):
        many = {"prompt": [f"a{i}" for i in range(2_500)], "n": 8, "max_tokens": 1}
        few = {"prompt": ["a", "b"], "n": 2, "max_tokens": 1}
        told = [await Client(app, COMPLETIONS, body).answer() for body in (many, few)]
        chat = {"messages": [{"role": "user", "content": "Hi"}], "n": 4, "max_tokens": 1}
        told.append(await Client(app, CHAT, chat).answer())
        assert {one.status for one in told} == {429}
        assert "20,000 replies" in told[0].reply["error"]["message"]
        # It would be refused at any other time too.
        assert {one.headers.get(b"x-should-retry") for one in told} == {b"false"}
        assert not any(b"retry-after" in one.headers for one in told)
        fits = await Client(app, COMPLETIONS, {**few, "prompt": ["a", "b", "c"], "n": 1}).answer()
        assert len(fits.reply["choices"]) == 3

    served(work, "--decode-concurrency", "1", "--max-queue", "2")


def test_places_are_free_again_however_a_request_ends():
    """Refused, failed, too long, streamed, left while it waits, while it is read, while it writes."""

    async def work(serving, app):
        hello = [{"role": "user", "content": "Hi"}]
        for path, body, status in (
            (CHAT, {"messages": hello, "chat_template_kwargs": {"tokenize": 1}}, 400),
            (COMPLETIONS, {"prompt": text(3_000)}, 400),
            (COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "max_tokens": 1, "stream": True}, 200),
            (COMPLETIONS, {"prompt": ["a", text(3_000)], "max_tokens": 1}, 400),
            (WARM, {"prompt": text(3_000)}, 400),
            (WARM, {}, 400),
            ("/tokenize", {"content": "a"}, 200),
            ("/detokenize", {"tokens": [10**6]}, 400),
            ("/v1/cache/drop", {"key": "0" * 32}, 404),
        ):
            assert (await Client(app, path, body).answer()).status == status
            assert not serving.admission.taken
        for stream in (False, True):
            clients = [Client(app, COMPLETIONS, {**ENDLESS, "stream": stream}) for _ in range(3)]
            await until(lambda: serving.generations and serving.admission.waiting == 2)
            for client in clients:
                client.leave()
            await asyncio.gather(*(client.answer() for client in clients))
            await until(lambda: not busy(serving))
        early = Client(app, COMPLETIONS, {**ENDLESS, "stream": True})
        early.leave()
        await early.answer()
        await until(lambda: not busy(serving))

    served(work, "--decode-concurrency", "1", "--max-queue", "4", "--max-prompt-tokens", "2000")


def test_a_place_is_given_back_once():
    """A reply that ends behind its request, whose time was over, frees nobody else's place."""
    admission = Admission(Settings(decode_concurrency=1, max_queue=1), mock.Mock())
    late, other = admission.admit(1), admission.admit(1)
    late.close()
    late.leave()
    assert admission.taken == 1
    other.leave()
    assert admission.taken == 0


def test_bodies_that_are_held_together_are_bounded():
    """Four of the largest size: the fifth is refused, small ones never; then there is room again."""

    async def work(serving, app):
        part = b'{"prompt": "' + b"a" * 99_000
        waiting = [Client(app, COMPLETIONS) for _ in range(4)]
        for client in waiting:
            client.send(part, more=True)
        await asyncio.sleep(0)
        await until(lambda: not any(client._coming.qsize() for client in waiting))
        fifth = Client(app, COMPLETIONS)
        fifth.send(part, more=True)
        announced = Client(app, COMPLETIONS, headers=[(b"content-length", b"90014")])
        for client in (fifth, announced):
            assert (await client.answer()).status == 429
            assert int(client.headers[b"retry-after"]) > 0
        small = b'{"prompt": "a", "max_tokens": 1' + b" " * 30_000 + b"}"  # not what is left
        assert (await Client(app, COMPLETIONS, small).answer()).status == 200
        for client in waiting:
            client.leave()
        await asyncio.gather(*(client.task for client in waiting), return_exceptions=True)
        again = await Client(app, COMPLETIONS, part + b'", "max_tokens": 0}').answer()
        assert again.status == 400

    served(work, "--max-body-bytes", "100000")


def test_no_more_pages_watch_than_may_however_they_come():
    """Twenty at once: sixteen watch, four are refused; when they leave, others may."""

    async def work(serving, app):
        clients = [Client(app, "/v1/cache/watch", {}) for _ in range(20)]
        await until(lambda: all(client.sent for client in clients))
        statuses = sorted(client.status for client in clients)
        for client in clients:
            client.leave()
        await asyncio.gather(*(client.answer() for client in clients))
        return statuses, serving.watching

    assert served(work) == ([200] * 16 + [429] * 4, 0)


# Rendering


def test_a_short_conversation_is_not_rendered_behind_a_long_one():
    """A template that takes 2 MB does not end before one of ten bytes does."""

    async def work():
        rendering, may_end = Rendering(), threading.Event()
        long = asyncio.create_task(rendering.call(may_end.wait, 2_000_000))
        await asyncio.sleep(0.05)
        assert await rendering.call(lambda: "short", 10) == "short"
        assert not long.done()
        may_end.set()
        await long
        rendering.close()

    asyncio.run(work())


def test_long_texts_are_read_in_turns():
    """Of two texts of three pieces, the second's first piece is read before the first's last."""

    async def work():
        rendering, order = Rendering(), []

        def steps(name):
            for _ in range(3):
                yield 20_000
                order.append(name)
            return name

        assert await asyncio.gather(*(rendering.steps(steps(name), 50_000) for name in "ab")) == [
            "a",
            "b",
        ]
        rendering.close()
        return "".join(order)

    assert asyncio.run(work()) == "ababab"


def test_a_text_whose_client_left_is_read_no_further():
    """Twenty pieces, left behind the first: one more may be under way."""

    async def work():
        rendering, read = Rendering(), []
        reached, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def steps():
            for piece in range(20):
                yield 20_000
                read.append(piece)
                loop.call_soon_threadsafe(reached.set)
                go_on.wait()

        task = asyncio.create_task(rendering.steps(steps(), 50_000))
        await reached.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        go_on.set()
        await rendering.call(lambda: None, 10)
        rendering.close()
        return read

    assert len(asyncio.run(work())) == 1


# Warming


def test_a_warm_waits_in_the_queue_like_a_reply():
    """Behind a reply that runs and one that waits there is no place; nor for a reply behind warms."""

    async def work(serving, app):
        clients = [Client(app, COMPLETIONS, ENDLESS) for _ in range(2)]
        await until(lambda: serving.admission.waiting == 1)
        for path in (WARM, "/v1/cache/pin", "/v1/cache/drop"):
            assert (await Client(app, path, {"prompt": "abc"}).answer()).status == 429
        clients[0].leave()
        await until(lambda: serving.admission.taken == 1)
        warm = Client(app, WARM, {"prompt": text(300)})
        await until(lambda: serving.admission.waiting == 1)
        assert [run.progress()["state"] for run in serving.runs][1:] == ["queued"]
        slots = (await Client(app, "/slots", method="GET").answer()).reply
        assert [slot["is_processing"] for slot in slots] == [True]  # a warm is no reply
        assert (await Client(app, COMPLETIONS, ENDLESS).answer()).status == 429
        clients[1].leave()
        assert (await warm.answer()).status == 200
        await until(lambda: not busy(serving))

    served(work, "--decode-concurrency", "1", "--max-queue", "1")


def test_a_warm_ends_with_its_client_and_keeps_what_was_read():
    """Of 9,000 tokens some are read when it leaves, then no more: what is stored is less than all."""

    async def work(serving, app):
        warm = Client(app, WARM, {"prompt": text(9_000)})
        await until(lambda: any(run.progress()["read_tokens"] > 0 for run in serving.runs))
        warm.leave()
        await warm.answer()
        await until(lambda: not busy(serving))
        return serving.loaded.cache.stats().tokens

    assert 0 < served(work, "--prefill-step-size", "512") < 8_000


def test_a_warm_has_no_more_time_than_a_reply():
    """After half a second: 504, and what was read is there."""

    async def work(serving, app):
        late = await Client(app, WARM, {"prompt": text(12_000)}).answer()
        await until(lambda: not busy(serving))
        return late.status, late.reply["error"]["code"], serving.loaded.cache.stats().tokens

    flags = ("--prefill-step-size", "256", "--request-timeout", "0.5")
    status, code, tokens = served(work, *flags)
    assert (status, code) == (504, "timeout")
    assert tokens < 12_000


def test_the_cache_is_cleared_beside_twelve_warms():
    """Between two turns of the worker: none of the twelve needs to end first, nor a thread of theirs."""

    async def work(serving, app):
        held = threading.Event()
        few = ThreadPoolExecutor(
            1
        )  # what asyncio.to_thread has is taken, by whatever else there is
        asyncio.get_running_loop().set_default_executor(few)
        few.submit(held.wait)
        try:
            warms = [Client(app, WARM, {"prompt": text(4_000, 500 * i)}) for i in range(12)]
            await until(lambda: serving.generations)
            cleared = await Client(app, "/v1/cache", method="DELETE").answer()
            done = sum(warm.task.done() for warm in warms)
            for warm in warms:
                warm.leave()
            await asyncio.gather(*(warm.answer() for warm in warms))
            await until(lambda: not busy(serving))
            return cleared.status, done
        finally:
            held.set()

    assert served(work, "--prefill-step-size", "512") == (200, 0)


def test_a_server_that_stops_ends_its_warms():
    """503, as for replies."""

    async def work(serving, app):
        warm = Client(app, WARM, {"prompt": text(9_000)})
        await until(lambda: serving.generations)
        serving.stop()
        return (await warm.answer()).status

    assert served(work, "--prefill-step-size", "512") == 503


def test_a_prompt_that_no_budget_holds_is_refused_by_its_length():
    """32 MB have room for so many tokens: a text that must have more is not read at all."""

    async def work(serving, app):
        room = serving.loaded.renderer.room.budget
        said = "a" * (longest_token(serving.loaded.tokenizer) * (room + 1))
        answer = await Client(app, COMPLETIONS, {"prompt": said}).answer()
        assert answer.status == 400
        error = answer.reply["error"]
        assert error["code"] == "context_length_exceeded"
        assert f"{room:,} (--prompt-cache-bytes)" in error["message"]

    served(work, "--prompt-cache-bytes", "32MB")


def test_the_longest_prompt_is_what_a_budget_has_room_for():
    """One token more and its caches do not fit: refused while rendering, not by the worker."""

    async def work(serving, app):
        room = serving.loaded.renderer.room.budget
        assert serving.loaded.cache.info.longest_prompt == room
        with pytest.raises(ApiError, match=rf"{room + 1:,} tokens.*room for {room:,}"):
            next(serving.loaded.renderer.text([5] * (room + 1)))
        next(serving.loaded.renderer.text([5] * room))

    served(work, "--prompt-cache-bytes", "32MB")


@pytest.mark.parametrize("stream", [False, True])
def test_what_can_never_fit_is_refused_once_and_what_fits_is_served(stream):
    """3 MB have room for 2,815 tokens and one of the reply. 2,812 and 512 more were 503 for ever; now
    the reply ends behind four. 2,816 are 400 with both numbers, streams included.
    """

    async def work(serving, app):
        room = serving.loaded.renderer.room.budget
        fits = {"prompt": [5] * (room - 3), "max_tokens": 512, "stream": stream}
        answer = await Client(app, COMPLETIONS, {**fits, "logit_bias": {"700": 100}}).answer()
        said = b"".join(message.get("body", b"") for message in answer.sent[1:])
        assert answer.status == 200
        assert b'"finish_reason":"length"' in said
        assert b'"predicted_n":4' in said
        answer = await Client(app, COMPLETIONS, {**fits, "prompt": [5] * (room + 1)}).answer()
        assert answer.status == 400
        assert answer.reply["error"]["code"] == "context_length_exceeded"
        assert f"{room + 1:,}" in answer.reply["error"]["message"]
        assert f"{room:,} (--prompt-cache-bytes)" in answer.reply["error"]["message"]

    served(work, "--prompt-cache-bytes", "3MB")


def test_a_prompt_beyond_the_models_context_is_refused_with_the_flag_that_changes_it():
    """131,072 by its configuration; 100 by --context-length, of which one is the reply's."""

    async def work(serving, app):
        assert serving.loaded.renderer.room.context == 100
        for stream in (False, True):
            body = {"prompt": [5] * 100, "stream": stream}
            answer = await Client(app, COMPLETIONS, body).answer()
            assert answer.status == 400
            assert answer.reply["error"]["code"] == "context_length_exceeded"
            assert (
                "context length lets 99 in (--context-length)" in answer.reply["error"]["message"]
            )
        body = {"prompt": [5] * 98, "max_tokens": 9, "logit_bias": {"700": 100}}
        answer = await Client(app, COMPLETIONS, body).answer()
        assert answer.reply["usage"]["completion_tokens"] == 2

    served(work, "--context-length", "100")


def test_the_smallest_limit_is_the_one_that_is_named():
    """Of 10, 8 and 6 the last; a reply has what the least of them leaves."""
    with pytest.raises(ApiError, match=r"9 tokens; .* lets 5 in"):
        Room(10, 8, 6).check(9, "prompt")
    assert Room(10, 8, 6).beside(4) == 2
    assert Room(None, 8, None).beside(4) == 5
    assert Room(10).beside(4) is None
    assert Room(context=6).check(5, "prompt") is None


def test_the_context_of_a_model_is_what_its_configuration_says():
    """Its positions, those that YaRN makes of them, those of the text part; or nothing."""
    assert longest_context({"max_position_embeddings": 40_960}) == 40_960
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    assert longest_context({"max_position_embeddings": 40_960, "rope_scaling": yarn}) == 131_072
    assert longest_context({"text_config": {"max_position_embeddings": 8_192}}) == 8_192
    assert longest_context({}) is None
