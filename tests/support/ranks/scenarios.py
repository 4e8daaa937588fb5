"""What rank 0 of a group is asked for, the same as a cache in one process."""

import hashlib
import random
import threading
import time
from contextlib import suppress

import numpy as np
import tiny

from mlx_hybridcache import GroupError, HybridCacheError
from mlx_hybridcache.disk import thread as disk_thread

SETTINGS = {
    "memory_budget": "300MB",
    "memory_reserve": 0,
    "prefill_step_size": 64,
    "checkpoint_every": 64,
    "checkpoint_min_step": 16,
}


OF_ALL_VISITS = 12
"""Prompts that every start in a directory asks for."""


def reply(cache, prompt, count, **options):
    """Its tokens, a digest of all log-probabilities, and the tokens restored."""
    digest, tokens = hashlib.sha256(), []
    generation = cache.stream_generate(prompt, count, **options)
    for response in generation:
        tokens.append(response.token)
        digest.update(np.array(response.logprobs, np.float32).tobytes())
    return tokens, digest.hexdigest(), generation.report.restored_tokens


def as_lists(value):
    """As JSON gives it back."""
    return [as_lists(each) for each in value] if isinstance(value, list | tuple) else value


def replies_only(found):
    """Without the counts of tokens restored, which follow from what fits and from who comes first."""
    return [each[:2] if isinstance(each[1], str) else each for each in found]


def journey(cache, say, *, seed, acts, at_once=True, visit=None):
    """Seeded acts: prompts that go on, part ways and change their endings, alone and together, cancels, pins.

    Of a `visit`, the number of a start in one directory, the prompts are those of every other visit.
    """
    for one in journey_of(cache, seed, acts, at_once=at_once, visit=visit):
        say(one=one)
    say(evictions=cache.stats().evictions)


def journey_of(cache, seed, acts, *, at_once=True, visit=None):
    """What each act came to."""
    chance = random.Random(seed)
    prompts = [tiny.random_tokens(100, seed)]
    if visit is not None:
        for _ in range(OF_ALL_VISITS):
            _next_prompt(chance, prompts)
        chance = random.Random(1000 * seed + visit)
    for _ in range(acts):
        kind = chance.choices(
            ["ask", "together", "cancel", "pin", "drop", "clear"], [12, 3 * at_once, 2, 2, 1, 0.2]
        )[0]
        asked = [
            _next_prompt(chance, prompts) if visit is None else chance.choice(prompts)
            for _ in range(3)
        ]
        counts = [chance.randrange(1, 12) for _ in asked]
        salt = chance.choice(["", "", "other"])
        if kind == "ask":
            yield reply(cache, asked[0], counts[0], cache_salt=salt)
        elif kind == "together":
            yield [each[:2] for each in _together(cache, asked, counts)]
        elif kind == "cancel":
            with cache.stream_generate(asked[0], 12, cache_salt=salt) as generation:
                for _ in range(chance.randrange(3)):
                    next(generation, None)
        else:
            with suppress(HybridCacheError):
                _keep(cache, kind, chance.choice(prompts), salt)


def _keep(cache, kind, prompt, salt):
    if kind == "clear":
        cache.clear()
    else:
        getattr(cache, kind)(prompt, cache_salt=salt)
        if kind == "pin":
            cache.unpin(prompt, cache_salt=salt)


def _next_prompt(chance, prompts):
    """One that goes on from an earlier one, or parts ways with it, or is new."""
    before = chance.choice(prompts)
    cut = chance.choice([len(before), chance.randrange(len(before)), 0])
    more = tiny.random_tokens(chance.randrange(1, 150), chance.randrange(10**6))
    prompts.append((before[:cut] + more)[:600])
    return prompts[-1]


def _together(cache, prompts, counts):
    found = [None] * len(prompts)

    def ask(index):
        found[index] = reply(cache, prompts[index], counts[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def left_while_files_are_read(cache, say):
    """Requests that go away while a slow disk reads for them, others beside them, and then what is counted."""
    prompts = [tiny.random_tokens(300, seed) for seed in range(3)]
    running = cache.stats().running_bytes
    for prompt in prompts:
        generation = cache.stream_generate(prompt, 4)
        time.sleep(3 * READ_SECONDS)  # of ten files some are read
        beside = threading.Thread(target=reply, args=(cache, tiny.random_tokens(40, 9), 2))
        beside.start()
        generation.close()
        beside.join()
    say(left=cache.stats().running_bytes - running)
    for prompt in prompts:
        say(hot=reply(cache, prompt, 8))


def ask_for_each(cache, say, *, seeds, length=300):
    """A reply to each prompt, and what a look said before."""
    for seed in seeds:
        prompt = tiny.random_tokens(length, seed)
        looked = cache.lookup(prompt)
        say(looked=[looked.restored_tokens, looked.tier], hot=reply(cache, prompt, 8))


def hot_and_cold(cache, say):
    """One prompt twice, and once where nothing of it is stored."""
    prompt = tiny.random_tokens(300, 1)
    reply(cache, prompt, 1)
    say(hot=reply(cache, prompt, 8))
    say(cold=reply(cache, prompt, 8, cache_salt="other"))


def kept_and_dropped(cache, say):
    """One prompt that is pinned and one that is dropped, before more are read than the budget holds."""
    kept, gone = (tiny.random_tokens(300, seed) for seed in (1, 2))
    for prompt in (kept, gone):
        reply(cache, prompt, 1)
    cache.pin(kept)
    cache.drop(gone)
    say(gone=cache.lookup(gone).restored_tokens)
    for seed in range(10, 20):
        reply(cache, tiny.random_tokens(300, seed), 1)
    say(evictions=cache.stats().evictions, kept=reply(cache, kept, 8), gone=reply(cache, gone, 8))


def messages(cache, say):
    """How many messages a prompt and its reply took, beside the forwards."""
    sent, send = [], cache.engine.acts._send
    cache.engine.acts._send = lambda message: (sent.append(message["do"]), send(message))
    for prompt in (tiny.random_tokens(300, 1), tiny.random_tokens(320, 1)):
        sent.clear()
        tokens, _, _ = reply(cache, prompt, 8)
        told = [do for do in sent if do != "relieve"]
        say(messages=told, turns=cache.last_report.forwards + len(tokens))


def failing(cache, say):
    """Functions of a request that raise there, at once or later: the ranks stay together."""

    def after(count, function):
        calls = []

        def raising(*args):
            calls.append(1)
            if len(calls) > count:
                raise ValueError("a caller's own")
            return function(*args)

        return raising

    prompt = tiny.random_tokens(300, 1)
    for count in (0, 1, 3):
        for options in (
            {"sampler": after(count, lambda logprobs: logprobs.argmax(-1))},
            {"logits_processors": [after(count, lambda tokens, logits: logits)]},
            {"prompt_progress_callback": after(count, lambda read, total: None)},
        ):
            try:
                reply(
                    cache,
                    tiny.random_tokens(300, 10 + count),
                    8,
                    cache_salt=str(options),
                    **options,
                )
            except ValueError as error:
                say(failed_with=str(error))
    say(hot=reply(cache, prompt, 8))
    say(hot=reply(cache, prompt, 8))


def for_ever(cache, say, *, seed=0):
    """Ask on and on, until a rank is lost; then what is asked next fails too, at once."""
    chance, prompts = random.Random(seed), [tiny.random_tokens(300, seed)]
    try:
        while True:
            reply(cache, _next_prompt(chance, prompts), 8)
            say(asked=len(prompts))
    except GroupError as error:
        say(lost=str(error), at=time.time())
    try:
        cache.stream_generate([1, 2, 3], 1)
    except GroupError as error:
        say(refused=str(error))
    raise GroupError("as was said")


READ_SECONDS = 0.3


def _read_slowly():
    """A disk that takes its time with every file."""
    read = disk_thread.read_data

    def slowly(*args):
        time.sleep(READ_SECONDS)
        return read(*args)

    disk_thread.read_data = slowly


def break_rank(how, rank, cache):
    """A fault that only rank 1 has: it must be noticed, and nothing wrong be served."""
    if how == "reads slowly" or (how == "reads more slowly" and rank == 1):
        _read_slowly()
    if how is None or rank != 1:
        return
    engine = cache.engine
    if how == "evicts alone":
        begin = engine.answer

        def answer(request, options):
            engine.tiers.memory.shrink(1)
            return begin(request, options)

        engine.answer = answer
    elif how == "restores elsewhere":
        find = engine.tiers.memory.find

        def elsewhere(namespace, tokens, known=None):
            return find(namespace, tokens[: max(1, len(tokens) // 2)], None)

        engine.tiers.memory.find = elsewhere
    elif how == "fails":

        def failing(request, live):
            raise RuntimeError("a layer cannot be computed here")
            yield

        engine._resume = failing
