"""One round of hostile concurrency, made of nothing but its seed: who requests, who lags, who leaves, what goes.

The events happen on the worker's own thread, between its turns, so that a round is the same every time. At
its end every checkpoint of every namespace, and every reply, is held against a cold run of its tokens.
"""

from __future__ import annotations

import copy
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import tiny
from mlx_lm.sample_utils import make_sampler

from hostile.clients import Accompanied, Asked, BrokenSamplerError, Log, Reader, breaks, ends
from hostile.families import COLD_STEP, FAMILIES, Family, log_probabilities
from mlx_hybridcache import BudgetError, HybridPromptCache
from mlx_hybridcache.caches.room import ROW_STEP
from mlx_hybridcache.decode import decoder as generate
from mlx_hybridcache.errors import CacheMismatchError, NotStoredError, PinnedError
from mlx_hybridcache.worker import stream as streams
from mlx_hybridcache.worker.turns import PAUSE, Pause

SALTS = ("", "other")
LENGTHS = (20, 23, 31, 32, 33, 40, 48, 49, 64, 77, 90)
FORKS = (16, 25, 32, 47, 60)
LONGEST = 110
"""Tokens of a prompt at most."""

THEN = oracle.prompt(4, seed=77)
"""What is read behind a stored history that no run goes on with."""

FED = 3
"""Tokens read behind each restored position."""

BETWEEN = 4
"""Places that are looked at in a store that restores anywhere, beside its runs' ends."""

TURNS = 3000
"""No round takes so many turns of the worker, unless something waits for ever."""


class Round:
    """All of it follows from `seed`, for one family of models."""

    def __init__(self, name: str, seed: int):
        self.chance = random.Random(f"{name} {seed}")
        self.family: Family = FAMILIES[name]
        self.seen: Counter[str] = Counter()
        self.asked: list[Asked] = []
        self.readers: list[Reader] = []
        self.leaving: list[Reader] = []
        self.to_come = self.chance.randint(4, 6)
        self.turns = 0

    def run(self) -> Counter[str]:
        """The events, then the comparison; what happened, counted."""
        pick = self.chance.choice
        with (
            _short(ahead=pick((1, 2, 4)), untaken=pick((1, 3, 8))),
            self.new_cache() as cache,
            oracle.batch_sizes(self.family.model) as sizes,
        ):
            self.cache = cache
            self.perform()
            if self.chance.random() < 0.3:
                self.compare_stored()  # what running requests hold is restored, too
            for reader in [*self.readers, *self.leaving]:
                reader.stream.cancel()
                reader.hear_the_end()
            self.readers.clear()
            self.leaving.clear()
            stats = cache.stats()
            self.seen["evicted"] += stats.evictions
            self.seen["taken over"] += stats.taken_over
            assert stats.running_bytes == 0, "all claims are given back"
            assert stats.held_bytes <= stats.budget_bytes
            self.compare_stored()
            self.compare_replies()
        self.seen["batched"] += sum(size > 1 for size in sizes)
        return self.seen

    def new_cache(self) -> HybridPromptCache:
        pick, model = self.chance.choice, self.family.model
        step = pick((16, 32, 64))
        options: dict[str, Any] = {}
        if self.chance.random() < 0.1:
            options["exact"] = True
        if self.chance.random() < 0.15:
            options["swa_full"] = True
        if self.chance.random() < 0.15:
            options["max_conversations"] = pick((1, 2, 4))
        if self.chance.random() < 0.15:
            options["max_checkpoints"] = pick((1, 2, 3))
        cache = oracle.new_cache(
            model,
            tokenizer=oracle.word_tokenizer(),
            prefill_step_size=step,
            checkpoint_every=step,
            checkpoint_min_step=8,
            paused=self.chance.random() < 0.2,
            **options,
        )
        layout, store = cache.engine.layout, cache.engine.tiers.memory
        least = layout.running_bytes(ROW_STEP) + layout.snapshot_bytes + ROW_STEP * layout.row_bytes
        store.budget.limit(int(least * pick((1.0, 2.2, 4, 12, 60, 400))))
        return cache

    # What happens

    def perform(self) -> None:
        """The events, on the worker's thread."""
        self.cache.load.__class__ = Accompanied
        for _ in self.cache.worker.stream(self.conduct()):
            raise AssertionError("a conductor says nothing")

    def conduct(self) -> Iterator[Pause]:
        """Between two turns of the worker each reader takes what it takes, and now and then something happens."""
        wait = 0
        while self.to_come or self.stirs():
            self.turns += 1
            assert self.turns < TURNS, "somebody waits for ever"
            for reader in self.leaving:
                reader.hear_the_end()
            self.leaving = []
            for reader in list(self.readers):
                if not reader.take():
                    self.let_go(reader)
            wait -= 1
            if self.to_come and wait < 0:
                self.event()
                wait = self.chance.choice((0, 0, 0, 1, 4, 12))
            yield PAUSE

    def stirs(self) -> bool:
        """Whether something will still happen without being asked."""
        waits = self.cache.load
        busy = waits.reading + waits.waiting > 0 or bool(self.leaving)
        return busy or any(
            reader.pace
            or (len(reader.log.tokens) - reader.taken < streams.AHEAD and not reader.log.over)
            for reader in self.readers
        )

    def event(self) -> None:
        """One of what can happen."""
        what: list[tuple[int, Callable[[], object]]] = [
            (4, self.start),
            (6, self.start_several),
            (3, self.change_pace),
            (3, self.leave),
            (1, self.drop),
            (1, self.pin),
            (1, self.press),
            (1, self.save_own),
            (1, self.look_up),
        ]
        weights = [weight for weight, _ in what]
        self.chance.choices([do for _, do in what], weights)[0]()
        if self.chance.random() < 0.02:
            self.cache.clear()
            self.seen["cleared"] += 1

    def start(self) -> None:
        tokens, salt = self.question()
        count, log = self.chance.choice((1, 4, 8, 14, 20)), Log()
        draws, is_broken = self.sampler(count)
        stream = self.cache.stream_generate(
            tokens, count, sampler=draws, seed=len(self.asked), cache_salt=salt, through=log.through
        )
        pace = self.chance.choice((0, 0, 1, 1, 2, 50))
        stays = self.chance.random() < 0.5
        patience = -1 if stays else self.chance.randint(0, count)
        self.readers.append(Reader(stream, log, pace, patience, is_broken))
        self.asked.append(Asked(tokens, salt, log))
        self.to_come -= 1
        self.seen["asked"] += 1

    def start_several(self) -> None:
        for _ in range(min(self.to_come, self.chance.randint(2, 4))):
            self.start()

    def question(self) -> tuple[list[int], str]:
        """What the next request asks, and under which salt."""
        return self.prompt(), self.chance.choice((*SALTS, ""))

    def prompt(self) -> list[int]:
        """A new text, one from before, how one from before goes on, or where it parts ways."""
        pick = self.chance.choice
        how = self.chance.random()
        if self.asked and how < 0.2:
            return pick(self.asked).tokens
        if self.asked and how < 0.5:
            history = pick(self.asked).history
            kept = history if how < 0.4 else history[: self.chance.randint(1, len(history))]
            fresh = oracle.prompt(pick((1, 5, 18)), seed=self.chance.randint(0, 3))
            if len(kept) + len(fresh) <= LONGEST:
                return [*kept, *fresh]
        tokens = oracle.prompt(90, seed=self.chance.randint(0, 2), openers=[10, 30, 50])
        if self.chance.random() < 0.4:
            at = pick(FORKS)
            tokens[at:] = oracle.prompt(90 - at, seed=100 + at + self.chance.randint(0, 1))
        return tokens[: pick(LENGTHS)]

    def sampler(self, count: int) -> tuple[Callable[[mx.array], mx.array], bool]:
        """Mostly the likeliest token; sometimes a drawn one, an early end, an error."""
        how, at = self.chance.random(), self.chance.randint(1, count)
        if how < 0.7:
            return oracle.never_ending, False
        if how < 0.8:
            return make_sampler(1.0), False
        return (ends(at), False) if how < 0.95 else (breaks(at), True)

    def change_pace(self) -> None:
        if self.readers:
            self.chance.choice(self.readers).pace = self.chance.choice((0, 1, 3, 50))

    def leave(self) -> None:
        if self.readers:
            self.let_go(self.chance.choice(self.readers))

    def let_go(self, reader: Reader) -> None:
        """It cancels and listens to the end, or is heard of no more."""
        self.readers.remove(reader)
        self.seen["left behind"] += len(reader.log.tokens) - reader.taken > 0
        if self.chance.random() < 0.5:
            reader.stream.cancel()
            self.leaving.append(reader)
        else:  # an error's traceback may still know the reader
            reader.stream = None

    def drop(self) -> None:
        if self.asked:
            asked = self.chance.choice(self.asked)
            with suppress(NotStoredError, PinnedError):
                self.cache.drop(asked.tokens, cache_salt=asked.salt)
                self.seen["dropped"] += 1

    def pin(self) -> None:
        if self.asked:
            asked = self.chance.choice(self.asked)
            change = self.chance.choice((self.cache.pin, self.cache.unpin))
            with suppress(NotStoredError, BudgetError):
                change(asked.tokens, cache_salt=asked.salt)
                self.seen["pinned"] += 1

    def press(self) -> None:
        """The system lacks memory."""
        store, part = self.cache.engine.tiers.memory, self.chance.choice((1, 2, 4))
        self.cache.worker.call(lambda: store.shrink(store.budget.stored_bytes // part))

    def save_own(self) -> None:
        """A framework brings caches that it read itself, first with tokens that are not theirs."""
        if self.cache.info.exact:
            return
        tokens = self.prompt()
        salt, lie = self.chance.choice(SALTS), self.chance.choice((-5, -1, 1, 4))
        caches = tiny.cold_caches(self.family.model, tokens, COLD_STEP)
        try:
            self.cache.save([*tokens, *THEN][: len(tokens) + lie], caches, cache_salt=salt)
        except CacheMismatchError:
            self.seen["lies"] += 1
        else:
            raise AssertionError(f"{len(tokens)} tokens' caches were taken with {lie:+} tokens")
        with suppress(BudgetError):
            self.cache.save(tokens, caches, cache_salt=salt)
            self.seen["saved"] += 1

    def look_up(self) -> None:
        tokens = self.prompt()
        found = self.cache.lookup(tokens, cache_salt=self.chance.choice(SALTS))
        assert 0 <= found.restored_tokens < len(tokens)

    # What must be true then

    def compare_stored(self) -> None:
        """Restore every stored checkpoint through the public surface, read on, and compare with cold."""
        store = self.cache.engine.tiers.memory
        budget = store.budget.limit_bytes
        store.budget.limit(1 << 30)  # looking evicts nothing
        count = 0
        for salt, tokens in self.stored():
            if tokens:
                self.compare(salt, tokens)
                count += 1
        self.seen["compared"] += count
        if store.needs_checkpoints:
            assert count == self.cache.stats().checkpoints, (
                "one in a namespace that nobody asked in"
            )
        store.budget.limit(budget)

    def stored(self) -> list[tuple[str, list[int]]]:
        """The tokens of every checkpoint, longest first, with their salts.

        Where rows alone restore, those of every path's end, of every place where paths part, and of a few
        places in between.
        """
        store = self.cache.engine.tiers.memory
        if store.needs_checkpoints:
            found = [(s, each) for s in SALTS for each in self.cache.checkpoints(cache_salt=s)]
        else:
            found = self.cache.worker.call(self.places)
        return sorted(found, key=lambda each: -len(each[1]))

    def places(self) -> list[tuple[str, list[int]]]:
        """Those of a store without checkpoints."""
        store = self.cache.engine.tiers.memory
        ends, between = [], []
        for namespace, tree in store._trees.items():
            for node in tree.nodes():
                tokens = [token for part in node.path() for token in part.tokens.tolist()]
                for at in (node.end, self.chance.randint(node.start + 1, node.end)):
                    is_end = at == node.end and len(node.children or ()) != 1
                    (ends if is_end else between).append((namespace.salt, tokens[:at]))
        chosen = [*ends, *self.chance.sample(between, min(BETWEEN, len(between)))]
        sharing = self.cache.engine.sharing
        step = sharing.step if sharing.exact else 1
        return [(salt, each[: len(each) - len(each) % step]) for salt, each in chosen]

    def compare(self, salt: str, tokens: list[int]) -> None:
        whole, cold = self.family.cold(tokens, THEN)
        at, rest = len(tokens), whole[len(tokens) :][:FED]
        ready = self.cache.restore([*tokens, rest[0]], max_tokens=FED, cache_salt=salt)
        assert (ready.position, ready.rest) == (at, rest[:1]), f"{at} tokens were not restored"
        logits = self.family.model(mx.array([rest]), cache=ready.prompt_cache)
        mx.eval(logits)
        ready.release()
        off = oracle.distance(np.array(logits[0]), cold[at : at + FED])
        assert off <= self.bound, f"what {at} tokens left under {salt!r} is off by {off:.3g}"

    @property
    def bound(self) -> float:
        return self.family.bound if tiny.device_is_split_invariant() else oracle.OTHER_DEVICES

    def compare_replies(self) -> None:
        """Every token that was made, with all log-probabilities in its place."""
        for asked in sorted(self.asked, key=lambda asked: -len(asked.history)):
            if not asked.log.tokens:
                continue
            _, cold = self.family.cold(asked.history, THEN)
            first = len(asked.tokens) - 1
            expected = log_probabilities(cold[first : len(asked.history) - 1])
            found = np.stack([np.array(each) for each in asked.log.logprobs])
            off = oracle.distance(found, expected)
            assert off <= self.bound, f"a reply to {first + 1} tokens is off by {off:.3g}"
            self.seen["replies"] += 1


class ThreadedRound(Round):
    """The same by clients on threads of their own, whose turns nobody decides."""

    def perform(self) -> None:
        """Each client does one thing after another, and waits for it."""
        self.errors: list[BaseException] = []
        clients = [
            threading.Thread(target=self.client, args=(random.Random(self.chance.random()),))
            for _ in range(self.chance.randint(3, 4))
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        for error in self.errors:
            raise error

    def client(self, chance: random.Random) -> None:
        """A view of this round with chances of its own."""
        view = copy.copy(self)
        view.chance, view.readers, view.leaving = chance, [], []
        try:
            for _ in range(chance.randint(2, 3)):
                view.act()
        except BaseException as error:
            self.errors.append(error)

    def act(self) -> None:
        """Ask, and take some of the reply; or something between two questions."""
        how = self.chance.random()
        if how < 0.15:
            with suppress(BudgetError):
                tokens, salt = self.prompt(), self.chance.choice(SALTS)
                fetch = self.chance.choice((self.cache.prefill, self.cache.restore))
                fetch(tokens, max_tokens=3, cache_salt=salt).release()
        elif how < 0.3:
            self.chance.choice((self.drop, self.pin, self.press, self.look_up))()
        self.start()
        reader = self.readers.pop()
        try:
            for _ in range(reader.patience):
                if next(reader.stream, None) is None:
                    break
            how = self.chance.random()
            if reader.patience < 0 or how < 0.3:
                reader.hear_the_end()
            elif how < 0.6:
                reader.stream.close()
            else:
                reader.stream.cancel()
                reader.hear_the_end()
        except BudgetError:
            self.seen["refused"] += 1
        except BrokenSamplerError:
            assert reader.is_broken


@contextmanager
def _short(ahead: int, untaken: int) -> Iterator[None]:
    """So many tokens are made ahead of a reader, and of one in a batch."""
    before = streams.AHEAD, generate.UNTAKEN
    streams.AHEAD, generate.UNTAKEN = ahead, untaken
    try:
        yield
    finally:
        streams.AHEAD, generate.UNTAKEN = before


def run(kind: type[Round], name: str, seeds: Sequence[int]) -> Counter[str]:
    """Several rounds of one family; the first that goes wrong says how to run it alone."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        try:
            seen += kind(name, seed).run()
        except BaseException as error:
            again = f"HOSTILE_ROUND={seed} pytest -n0 tests/proof/test_hostile.py -k 'any_order and {name}'"
            error.add_note(f"Round {seed} of {name}; alone: {again}")
            raise
    return seen
