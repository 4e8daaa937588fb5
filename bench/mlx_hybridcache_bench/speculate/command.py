"""`bench speculate`: forwards and CPU seconds of replies with drafts, beside the same without.

Those with drafts from what is stored are here, those of a draft model in `own_replies`. The replies are dictated: a small model quotes no file, so a logits processor lets it write the given tokens
and no others. Both arms pay for that, and read the same prompts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
from rich.console import Console

from mlx_hybridcache import HybridPromptCache, models
from mlx_hybridcache.caches.live import LiveCaches
from mlx_hybridcache.cli.flags import tokens
from mlx_hybridcache.decode.speculate.drafter import Drafter
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.request.request import Request

from ..kit.machine import machine, one_line
from ..kit.tables import Figure, show, show_figures, write_json
from ..kit.text import prompt_of
from . import own_replies

EVERY = 40
"""An edit comes once in so many tokens of a file."""

REPEATING = 1 / 2.5
"""Forwards for a token that replies which repeat something may take, and below the share of seconds."""

SECONDS, SECONDS_IN_VAIN = 1 / 1.8, 1.03
"""Of the CPU seconds without drafts, where the reply repeats something and where it does not."""

LOOKUP_MICROSECONDS = 20
"""What looking for a draft may take for each token of a reply."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A prompt and its reply, which was written before if `again`."""

    name: str
    prompt: list[int]
    reply: list[int]
    again: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one workload took: `seconds` of the CPU for all of a request, a pair for each round.

    Of those with drafts `lookup_seconds` went into looking for them.
    """

    name: str
    reply_tokens: int
    forwards: int
    drafted: int
    accepted: int
    same_tokens: bool
    plain_seconds: list[float]
    seconds: list[float]
    lookup_seconds: list[float]

    @property
    def lookup_microseconds(self) -> float:
        """For each token of the reply."""
        return statistics.median(self.lookup_seconds) / self.reply_tokens * 1e6

    @property
    def ratio(self) -> float:
        """Of the seconds with drafts to those without, the median of all rounds."""
        pairs = zip(self.seconds, self.plain_seconds, strict=True)
        return statistics.median(one / other for one, other in pairs)

    @property
    def forwards_per_token(self) -> float:
        return self.forwards / self.reply_tokens

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **asdict(self),
            "ratio": self.ratio,
            "forwards_per_token": self.forwards_per_token,
            "lookup_microseconds": self.lookup_microseconds,
        }


@dataclass
class _Timed:
    """A drafter, and the seconds of the CPU that it takes on its thread."""

    drafter: Drafter
    seconds: float = 0.0

    def propose(self, history: Sequence[int], most: int) -> list[int]:
        """As `Drafter.propose`."""
        began = time.thread_time()
        found = self.drafter.propose(history, most)
        self.seconds += time.thread_time() - began
        return found

    def accepted(self, drafted: int, accepted: int) -> None:
        """As `Drafter.accepted`."""
        self.drafter.accepted(drafted, accepted)

    def end(self, history: Sequence[int] | None) -> None:
        """As `Drafter.end`."""
        self.drafter.end(history)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench speculate`."""
    parser.add_argument("--model", help="directory, or owner/name (default: the bundled model)")
    parser.add_argument("--reply-tokens", type=tokens(), default=300, help="of each reply (300)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs for each workload (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the edits (0)")
    drafts = parser.add_mutually_exclusive_group()
    drafts.add_argument(
        "--draft-model", help="directory, or owner/name (default: a draft of the bundled model)"
    )
    drafts.add_argument(
        "--draft-mtp", action="store_true", help="by the mtp.* weights beside the model's own"
    )
    parser.add_argument(
        "--num-draft-tokens", type=tokens(), default=4, help="of what computes them at a time (4)"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure and print. 1 when a reply took more forwards than promised, or was another one."""
    found = machine()
    console.print(one_line(found), highlight=False)
    model, tokenizer = models.load(args.model)
    seen = []
    for workload in workloads(tokenizer, args.reply_tokens, args.seed):
        with console.status(f"measuring {workload.name}"):
            seen.append(_measured(model, tokenizer, workload, args.rounds))
    _show(console, seen)
    own = _own(args, console, model, tokenizer)
    figures = [*_figures(seen), *(own_replies.figures(own, _by(args)) if own is not None else ())]
    show_figures(console, figures)
    write_json(
        args.json,
        {
            "command": "speculate",
            "machine": found,
            "figures": [figure.as_json() for figure in figures],
            "workloads": [one.as_json() for one in seen],
            "own_replies": None if own is None else own.as_json(),
        },
    )
    return int(any(figure.counted and not figure.kept for figure in figures))


def _own(
    args: argparse.Namespace, console: Console, model: Any, tokenizer: Any
) -> own_replies.OwnReplies | None:
    """The model's own replies; None for another model than the bundled one where nothing computes drafts."""
    drafts_by: dict[str, Any]
    if args.draft_mtp:
        drafts_by = {"draft_mtp": args.model}
    elif args.draft_model is None and args.model != str(BUNDLED_MODEL):
        return None
    else:
        drafts_by = {
            "draft_model": models.load(args.draft_model or str(own_replies.BUNDLED_DRAFT))[0]
        }
    with console.status("measuring its own replies"):
        own = own_replies.measure(
            model,
            tokenizer,
            drafts_by,
            most=args.num_draft_tokens,
            rounds=args.rounds,
            seed=args.seed,
        )
    own_replies.show_own(console, own, _by(args))
    return own


def _by(args: argparse.Namespace) -> str:
    return "its head" if args.draft_mtp else "a draft model"


def workloads(tokenizer: Any, length: int, seed: int) -> list[Workload]:
    """Four, with replies of `length` tokens of text, the same for the same seed."""
    text = prompt_of(tokenizer, 5 * length)
    asked, file, other, more = (text[i * length : (i + 1) * length] for i in range(4))
    generator = random.Random(seed)
    edited = [
        other[at] if generator.random() < 1 / EVERY else token for at, token in enumerate(file)
    ]
    around = length // 10
    told = [*other[:around], *file[: length - 2 * around], *other[-around:]]
    return [
        Workload("regenerate", asked, more, again=True),
        Workload("quote a file with edits", [*asked, *file, *asked[:9]], edited),
        Workload("repeat a tool's result", [*asked, *file, *asked[:9]], told),
        Workload("nothing repeats", asked, more),
    ]


def _dictating(workload: Workload) -> Callable[[mx.array, mx.array], mx.array]:
    """A logits processor under which the reply is the workload's."""
    start, reply = len(workload.prompt), workload.reply

    def dictate(written: mx.array, logits: mx.array) -> mx.array:
        at = min(written.size - start, len(reply) - 1)
        return mx.where(mx.arange(logits.shape[-1]) == reply[at], 1e4, logits)

    return dictate


def _measured(model: Any, tokenizer: Any, workload: Workload, rounds: int) -> Outcome:
    """Both arms in turns, each request in a salt of its own; the first pair is the warm-up."""
    plain: list[float] = []
    drafted: list[float] = []
    lookups: list[float] = []
    with HybridPromptCache(model, tokenizer, memory_budget="4GiB") as cache:
        timed = _timing_drafters(cache)
        for at in range(rounds + 1):
            for salt, options, seconds in (
                (f"plain {at}", {}, plain),
                (f"drafted {at}", {"draft_from_cache": True}, drafted),
            ):
                if workload.again:
                    _asked(cache, workload, salt)
                else:  # what is measured is writing
                    list(cache.warm(workload.prompt, cache_salt=salt))
                spent, written, report = _asked(cache, workload, salt, **options)
                seconds.append(spent)
            lookups.append(timed[-1].seconds)
    return Outcome(
        workload.name,
        len(workload.reply),
        report.reply_forwards,
        report.drafted_tokens,
        report.accepted_tokens,
        written == workload.reply,
        plain[1:],
        drafted[1:],
        lookups[1:],
    )


def _asked(
    cache: HybridPromptCache, workload: Workload, salt: str, **options: Any
) -> tuple[float, list[int], Any]:
    """The seconds of one request, its reply and its report."""
    began = time.process_time()
    reply = cache.stream_generate(
        workload.prompt,
        len(workload.reply),
        cache_salt=salt,
        logits_processors=[_dictating(workload)],
        **options,
    )
    written = [response.token for response in reply]
    return time.process_time() - began, written, reply.report


def _timing_drafters(cache: HybridPromptCache) -> list[_Timed]:
    """The drafters that the cache's replies have from now on, the last one at the end."""
    timed: list[_Timed] = []
    make = cache.engine.drafting.recurring

    def make_timed(request: Request, live: LiveCaches) -> Drafter:
        timed.append(_Timed(make(request, live)))
        return timed[-1]

    cache.engine.drafting.recurring = make_timed  # type: ignore[method-assign]
    return timed


def _figures(seen: list[Outcome]) -> Iterator[Figure]:
    for one in seen:
        repeats = one.name != "nothing repeats"
        if repeats:
            yield Figure(
                f"forwards for a token: {one.name}", one.forwards_per_token, "", REPEATING, True
            )
        most = SECONDS if repeats else SECONDS_IN_VAIN
        yield Figure(f"CPU seconds, of those without: {one.name}", one.ratio, "", most, False)
        yield Figure(
            f"looking for a draft, a token: {one.name}",
            one.lookup_microseconds,
            "us",
            LOOKUP_MICROSECONDS,
            False,
        )
    yield Figure("replies that are others", sum(not one.same_tokens for one in seen), "", 0, True)


def _show(console: Console, seen: list[Outcome]) -> None:
    show(
        console,
        "Replies with drafts from what is stored",
        (
            "workload",
            "tokens",
            "forwards",
            "drafted",
            "right",
            "looking, us",
            "x the tokens/s",
            "same",
        ),
        [
            (
                one.name,
                f"{one.reply_tokens:,}",
                f"{one.forwards:,}",
                f"{one.drafted:,}",
                f"{one.accepted:,}",
                f"{one.lookup_microseconds:.1f}",
                f"{1 / one.ratio:.2f}",
                "yes" if one.same_tokens else "NO",
            )
            for one in seen
        ],
    )
