"""Several requests at once: turns, sharing, cancellation. Counted in forwards and tokens, not seconds.

Everything happens at a known moment: requests arrive, and go, in callbacks on the worker thread.
"""

import threading
from itertools import pairwise

import oracle
import pytest
import tiny
from long import mostly_long

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.decode.decoder import UNTAKEN
from mlx_hybridcache.worker.stream import AHEAD
from mlx_hybridcache.worker.turns import PAUSE

STEP = 64
QUARTER = STEP // 4


@pytest.fixture
def cache():
    with new_cache("qwen3_next") as made:
        yield made


def new_cache(name, **settings):
    return HybridPromptCache(
        tiny.build(name),
        oracle.word_tokenizer(),
        memory_budget="300MB",
        prefill_step_size=STEP,
        checkpoint_every=settings.pop("checkpoint_every", STEP),
        checkpoint_min_step=QUARTER,
        **settings,
    )


def said(log, name):
    """A view that notes each token in `log`, on the worker thread, as it is made."""

    def through(responses):
        for response in responses:
            if response is PAUSE:
                yield PAUSE
                continue
            log.append(name)
            yield response

    return through


def ask(cache, prompt, log, name, count=4, **options):
    return cache.stream_generate(
        prompt, count, sampler=oracle.never_ending, through=said(log, name), seed=0, **options
    )


def at(position, action):
    """A progress callback that acts once, when so many tokens are read."""
    done = []

    def progress(read, total):
        if read >= position and not done:
            done.append(read)
            action()

    return progress


def alone(name, prompt, count=4):
    """The reply from an empty cache with nobody else about."""
    with new_cache(name) as cache:
        return [(r.token, r.logprobs) for r in ask(cache, prompt, [], "", count)]


def same(replies, expected):
    assert [r.token for r in replies] == [token for token, _ in expected]
    for reply, (_, logprobs) in zip(replies, expected, strict=True):
        assert oracle.agree(reply.logprobs, logprobs)


def events(cache):
    """The model's forwards and the tokens given out, in order: one list."""
    return oracle.forwards(cache.engine.model)


def test_between_two_tokens_at_most_one_slice_is_read(cache):
    """While one writes 30 tokens another reads 700: slices of a quarter step, one at a time."""
    short, long = oracle.prompt(20, seed=1), oracle.prompt(700, seed=2)
    started = []
    with events(cache) as log:

        def begin():
            started.append(ask(cache, long, log, "long"))

        writer = ask(cache, short, log, "token", 30, prompt_progress_callback=at(20, begin))
        replies = list(writer)
        others = list(started[0])
    places = [i for i, event in enumerate(log) if event == "token"]
    for a, b in pairwise(places):
        slices = [n for n in log[a + 1 : b] if n not in (1, "long")]
        assert len(slices) <= 1
        assert all(n <= QUARTER for n in slices)
    assert any(n == QUARTER for n in log[places[0] : places[-1]])
    same(replies, alone("qwen3_next", short, 30))
    same(others, alone("qwen3_next", long))


def test_a_short_question_starts_after_at_most_two_slices_of_a_long_read(cache):
    """20 tokens arrive when 128 of 900 are read: one slice, then its own, then its first token."""
    short, long = oracle.prompt(20, seed=1), oracle.prompt(900, seed=2)
    started = []
    with events(cache) as log:

        def begin():
            log.append("arrives")
            started.append(ask(cache, short, log, "short"))

        reader = ask(cache, long, log, "long", prompt_progress_callback=at(128, begin))
        replies = list(reader)
        others = list(started[0])
    between = log[log.index("arrives") + 1 : log.index("short")]
    assert sum(n > 1 for n in between) <= 2 + 1  # its own slice is the third
    assert log.index("short") < log.index("long")
    same(others, alone("qwen3_next", short))
    same(replies, alone("qwen3_next", long))


def test_a_prompt_alone_is_read_in_whole_slices(cache):
    """Nobody else: 640 tokens in slices of 64."""
    with events(cache) as log:
        list(ask(cache, oracle.prompt(641, seed=3), [], "", 1))
    assert [n for n in log if n > 1] == [STEP] * 10


def test_exact_mode_keeps_its_slices_under_load():
    """Two long prompts at once: every slice is a whole step but the last of each."""
    with new_cache("qwen3_next", exact=True) as cache:
        first, second = oracle.prompt(200, seed=1), oracle.prompt(200, seed=2)
        started = []
        with events(cache) as log:

            def begin():
                started.append(ask(cache, second, log, "second"))

            list(ask(cache, first, log, "first", prompt_progress_callback=at(0, begin)))
            list(started[0])
    assert sorted(n for n in log if isinstance(n, int) and n > 1) == [7] * 2 + [STEP] * 6


@pytest.mark.parametrize(
    "name", mostly_long(["qwen3_next", "jamba", "gemma3_text", "qwen3"], ["qwen3_next", "qwen3"])
)
def test_eight_agents_with_one_system_prompt_read_it_once(name):
    """650 shared tokens and 20 of each agent's own, all at once: 650 + 8 x 20 are read.

    The checkpoint where they part is taken for the followers; the regular ones are at 640 and 704.
    """
    system = oracle.prompt(650, seed=9)
    prompts = [system + oracle.prompt(20, seed=seed) for seed in range(8)]
    with new_cache(name) as cache:
        started = []
        with events(cache) as log:

            def begin():
                started.extend(ask(cache, prompt, log, "agent") for prompt in prompts[1:])

            first = ask(cache, prompts[0], log, "agent", prompt_progress_callback=at(0, begin))
            replies = [list(first)]
            replies += [list(other) for other in started]
        read = sum(n for n in log if isinstance(n, int) and n > 1)
    assert read <= 650 + 8 * 20
    for prompt, reply in zip(prompts, replies, strict=True):
        same(reply, alone(name, prompt))


@pytest.mark.parametrize("length", [10, 500])
def test_equal_prompts_at_once_are_read_once(cache, length):
    """Four times the same tokens: one reading, three restores of all but the last, however few.

    While there is more than a slice of them, three are counted as waiting, and not as reading.
    """
    prompt = oracle.prompt(length, seed=4)
    started, loads = [], []
    with events(cache) as log:

        def begin():
            started.extend(ask(cache, prompt, log, "other") for _ in range(3))

        begins = at(0, begin)

        def progress(read, total):
            begins(read, total)
            loads.append((cache.load.reading, cache.load.waiting))

        replies = [list(ask(cache, prompt, log, "x", prompt_progress_callback=progress))]
        replies += [list(other) for other in started]
    assert sum(n for n in log if isinstance(n, int) and n > 1) == length - 1
    assert length < STEP or (1, 3) in loads
    expected = alone("qwen3_next", prompt)
    for reply in replies:
        same(reply, expected)


def test_a_follower_takes_over_from_a_leader_that_goes_away(cache):
    """Cancelled at 256 of 640 shared tokens: the follower resumes there, and nothing is read twice."""
    system = oracle.prompt(640, seed=5)
    prompt, other = system + oracle.prompt(20, seed=6), system + oracle.prompt(20, seed=7)
    started, leader = [], []
    with events(cache) as log:

        def begin():
            started.append(ask(cache, other, log, "follower"))

        def leave():
            leader[0].cancel()

        ready = threading.Event()
        acts = [at(0, begin), at(256, leave)]

        def held(read, total):
            ready.wait()
            for act in acts:
                act(read, total)

        leader.append(ask(cache, prompt, log, "leader", prompt_progress_callback=held))
        ready.set()
        replies = list(leader[0])
        followers = list(started[0])
    assert replies == []
    read = sum(n for n in log if isinstance(n, int) and n > 1)
    assert read <= 660 + STEP  # at most the slice that was under way
    same(followers, alone("qwen3_next", other))


def test_a_cancelled_request_leaves_what_was_read_to_its_last_token():
    """Cancelled at 128 of 900 tokens, where checkpoints are 640 apart: the next one resumes at 128."""
    prompt, running = oracle.prompt(900, seed=8), []
    begun = threading.Event()

    def leave():
        begun.wait()
        running[0].cancel()

    with new_cache("qwen3_next", checkpoint_every=640) as cache:
        running.append(ask(cache, prompt, [], "x", prompt_progress_callback=at(128, leave)))
        begun.set()
        assert list(running[0]) == []
        assert cache.lookup(prompt).restored_tokens == 128


def test_a_cancelled_request_reads_at_most_one_more_slice(cache):
    """Cancelled when 256 of 2,000 tokens are read."""
    prompt = oracle.prompt(2000, seed=8)
    running = []
    ready = threading.Event()
    with events(cache) as log:

        def leave():
            log.append("cancelled")
            running[0].cancel()

        act = at(256, leave)

        def held(read, total):
            ready.wait()
            act(read, total)

        running.append(ask(cache, prompt, log, "x", prompt_progress_callback=held))
        ready.set()
        assert list(running[0]) == []
    assert len([n for n in log[log.index("cancelled") + 1 :] if n != "x"]) <= 1
    assert cache.lookup(prompt).restored_tokens >= 256
    assert not cache.engine.followers.under_way


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3", "gemma3_text", "mamba2"])
def test_a_client_that_does_not_listen_holds_nobody_up(name):
    """One reply is never taken, another one behind it is. When it is closed, what it leaves behind
    continues its prompt by what was made of it, each state where it belongs.
    """
    stalled_prompt, prompt = oracle.prompt(60, seed=1), oracle.prompt(80, seed=2)
    with new_cache(name) as cache, oracle.batch_sizes(cache.engine.model) as sizes:
        log = []
        stalled = ask(cache, stalled_prompt, log, "stalled", 500)
        replies = list(ask(cache, prompt, log, "x", 40))
        stalled.close()
        assert log.count("stalled") == AHEAD
        assert (max(sizes) > 1) is (name != "gemma3_text")
        assert cache.stats().running_bytes == 0
        expected = alone(name, stalled_prompt, AHEAD + 2 * UNTAKEN), alone(name, prompt, 40)
        histories = [
            [*asked, *(token for token, _ in reply)]
            for asked, reply in zip((stalled_prompt, prompt), expected, strict=True)
        ]
        assert cache.lookup(histories[0]).restored_tokens >= len(stalled_prompt) + AHEAD
        oracle.assert_same_reading(oracle.check(cache, histories))
    same(replies, expected[1])


def test_a_prompt_is_read_whether_its_client_listens_or_not(cache):
    """A client that takes none of 40 reports of progress does not stall its followers."""
    system = oracle.prompt(40 * QUARTER, seed=3)

    def reports(responses):
        yield from (str(response) for response in responses)

    leader = cache.stream_generate([*system, 1, 2], 500, through=reports)
    follower = ask(cache, [*system, 3, 4], [], "x")
    same(list(follower), alone("qwen3_next", [*system, 3, 4]))
    assert cache.lookup([*system, 5]).restored_tokens == len(system)
    leader.close()
    assert cache.stats().running_bytes == 0


def arriving(cache, first, second, position):
    """Two replies, where the second request comes when so many tokens of the first are read.

    And the order of the first one's reports of progress and the second one's tokens; nobody ever waits.
    """
    log, started = [], []
    begins = at(position, lambda: started.append(ask(cache, second, log, "second")))

    def progress(read, total):
        begins(read, total)
        log.append(read)
        assert cache.load.waiting == 0

    replies = list(ask(cache, first, [], "first", prompt_progress_callback=progress))
    same(replies, alone("qwen3_next", first))
    same(list(started[0]), alone("qwen3_next", second))
    return log


def test_nobody_waits_for_who_has_passed_what_they_share(cache):
    """100 tokens in common, of which 64 are stored, when the other one has read 256 of 640: it left no
    checkpoint at 100, nor will it.
    """
    first = oracle.prompt(640, seed=3)
    log = arriving(cache, first, [*first[:100], *oracle.prompt(20, seed=4)], 256)
    assert log.index("second") < log.index(640)


def test_nobody_waits_for_less_than_a_slice(cache):
    """70 tokens in common, of which 64 are read: the other six are read again, and no checkpoint is
    taken at 70 for their sake.
    """
    first = oracle.prompt(640, seed=5)
    second = [*first[:70], *oracle.prompt(20, seed=6)]
    log = arriving(cache, first, second, 64)
    assert log.index("second") < log.index(640)
    cuts = [tokens for tokens in cache.checkpoints() if tokens == first[: len(tokens)]]
    assert len(cuts) >= 10
    assert first[:70] not in cuts


def test_requests_under_different_salts_know_nothing_of_each_other(cache):
    """Two of 160 tokens with 90 in common, at once: neither waits for what the other reads, and neither
    leaves a checkpoint where the other's prompt parts from it.
    """
    system = oracle.prompt(90, seed=3)
    prompts = [[*system, *oracle.prompt(70, seed=seed)] for seed in (4, 5)]
    log, started = [], []

    def reads(name):
        return lambda read, total: log.append(name)

    def begin():
        started.append(
            ask(
                cache,
                prompts[1],
                [],
                "b",
                cache_salt="b",
                prompt_progress_callback=reads("b"),
            )
        )

    begins = at(0, begin)

    def progress(read, total):
        begins(read, total)
        log.append("a")
        assert cache.load.waiting == 0

    first = ask(cache, prompts[0], [], "a", cache_salt="a", prompt_progress_callback=progress)
    replies = [list(first), list(started[0])]
    assert log.index("b") < len(log) - 1 - log[::-1].index("a"), "they read in turns"
    for prompt, reply, salt in zip(prompts, replies, "ab", strict=True):
        same(reply, alone("qwen3_next", prompt))
        cuts = [len(tokens) for tokens in cache.checkpoints(cache_salt=salt)]
        assert len(system) not in cuts
        assert max(cuts) == len(prompt) + 4
    assert cache.checkpoints() == []


def failing_once(model, at, message):
    """The model, whose forward number `at` raises what MLX raises when there is no memory."""
    original = type(model).__call__
    count = []

    def counted(self, inputs, *args, **options):
        count.append(inputs.shape[1])
        if len(count) == at:
            raise RuntimeError(message)
        return original(self, inputs, *args, **options)

    return original, counted


def test_memory_that_runs_out_is_made_and_the_request_served(cache, monkeypatch):
    """The fifth slice of ten fails to allocate: half the store goes, and the second try goes on."""
    list(ask(cache, oracle.prompt(900, seed=1), [], "x"))
    before = cache.stats().evictions
    model, prompt = cache.engine.model, oracle.prompt(640, seed=2)
    _, broken = failing_once(model, 5, "[malloc] Unable to allocate 10 bytes.")
    monkeypatch.setattr(type(model), "__call__", broken)
    replies = list(ask(cache, prompt, [], "x"))
    monkeypatch.undo()
    same(replies, alone("qwen3_next", prompt))
    assert cache.stats().evictions > before
    assert cache.stats().running_bytes == 0


def test_a_forward_that_fails_ends_its_request_and_no_other(cache, monkeypatch):
    """Not for lack of memory: no second try; the next request is served."""
    model, prompt = cache.engine.model, oracle.prompt(300, seed=2)
    _, broken = failing_once(model, 3, "something else")
    monkeypatch.setattr(type(model), "__call__", broken)
    with pytest.raises(RuntimeError, match="something else"):
        list(ask(cache, prompt, [], "x"))
    monkeypatch.undo()
    assert cache.stats().running_bytes == 0
    assert not cache.engine.followers.under_way
    same(list(ask(cache, prompt, [], "x")), alone("qwen3_next", prompt))


def test_a_worker_that_fails_goes_on(cache):
    """A call of the library's own that raises ends what is under way, and nothing else."""
    running = ask(cache, oracle.prompt(60, seed=1), [], "x", 2000)
    next(running)

    def fails():
        raise MemoryError("no room for a list")

    cache.worker.post(fails)
    with pytest.raises(MemoryError):
        list(running)
    assert cache.is_alive
    assert cache.stats().running_bytes == 0
    prompt = oracle.prompt(70, seed=3)
    same(list(ask(cache, prompt, [], "x")), alone("qwen3_next", prompt))
