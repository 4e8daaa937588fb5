"""Generated traces: what agents, chats and services send, as token ids from a seeded generator.

Token ids are random; what matters is where prompts agree. A conversation is rendered as ChatML-like
templates do: `<|im_start|>user` and a newline open a turn, `<|im_end|>` and a newline close it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from mlx_hybridcache.errors import SettingError

from .traces import TracedRequest

VOCABULARY = 150_000
OPEN, CLOSE, NEWLINE, THINK, UNTHINK = range(VOCABULARY, VOCABULARY + 5)
ROLES = {"system": 1_000, "user": 1_001, "assistant": 1_002}


class Chance:
    """The random numbers of one trace."""

    def __init__(self, seed: int) -> None:
        self.numbers = np.random.default_rng(seed)

    def text(self, length: int) -> list[int]:
        """`length` tokens that nobody else has written."""
        return [int(token) for token in self.numbers.integers(2_000, VOCABULARY, length)]

    def between(self, low: int, high: int) -> int:
        """A whole number in `[low, high]`."""
        return int(self.numbers.integers(low, high + 1))

    def about(self, median: int, low: int, high: int) -> int:
        """A size around `median`, with a long tail, within `[low, high]`."""
        return int(np.clip(self.numbers.lognormal(np.log(median), 1.0), low, high))

    def happens(self, probability: float) -> bool:
        """True so often."""
        return bool(self.numbers.random() < probability)

    def popular(self, count: int, exponent: float = 1.1) -> int:
        """An index below `count`, the first ones by far the most often (Zipf)."""
        weights = 1 / np.arange(1, count + 1) ** exponent
        return int(self.numbers.choice(count, p=weights / weights.sum()))


@dataclass
class Talk:
    """One conversation: its turns, and the prompts they render to.

    With `thinks`, replies begin with reasoning, which later prompts leave out once a user speaks.
    """

    name: str
    chance: Chance
    thinks: bool = False
    turns: list[tuple[str, list[int], list[int]]] = field(default_factory=list)

    def say(self, role: str, words: list[int]) -> None:
        """Add what somebody but the model says."""
        self.turns.append((role, words, []))

    def ask(self, answer: int, reasoning: int = 0, *, calls: bool = False) -> TracedRequest:
        """The request whose reply is `answer` tokens, after so much `reasoning`; it is added.

        A tool call (`calls`) keeps its reasoning until the user speaks again.
        """
        tokens, starts = self._render()
        tokens += [OPEN, ROLES["assistant"], NEWLINE] + [THINK, NEWLINE] * self.thinks
        starts.append(len(tokens) - 2 - 2 * self.thinks)
        thought = [*self.chance.text(reasoning), UNTHINK, NEWLINE] if self.thinks else []
        said = self.chance.text(answer)
        self.turns.append(("assistant", said, thought))
        reply = np.array([*thought, *said, CLOSE], dtype=np.int32)
        return TracedRequest(
            seconds=0.0,
            conversation=self.name,
            tokens=np.array(tokens, dtype=np.int32),
            turns=tuple(starts),
            reply=reply,
            reply_tokens=len(reply),
            keeps_reply=calls or not self.thinks,
        )

    def rejected(self, asked: TracedRequest) -> TracedRequest:
        """The same prompt with another reply, which the user did not like."""
        reply = np.array([*self.chance.text(len(asked.reply) - 1), CLOSE], dtype=np.int32)
        return dataclasses.replace(asked, reply=reply)

    def back_to(self, turns: int) -> None:
        """Forget all but the first `turns` turns, and of those what was said last if not by the model."""
        del self.turns[turns:]
        if self.turns[-1][0] in ("tool", "user"):
            del self.turns[-1]

    def users(self) -> list[int]:
        """The indices of the user's turns."""
        return [i for i, (role, _, _) in enumerate(self.turns) if role == "user"]

    def _render(self) -> tuple[list[int], list[int]]:
        tokens: list[int] = []
        starts: list[int] = []
        asked = max((i for i, (role, _, _) in enumerate(self.turns) if role == "user"), default=0)
        for index, (role, words, thought) in enumerate(self.turns):
            shown = "user" if role == "tool" else role  # as most templates do
            tokens += [OPEN, ROLES[shown], NEWLINE]
            starts.append(len(tokens) - (0 if shown == "user" else 2))
            if thought and index > asked:
                tokens += [THINK, NEWLINE, *thought]
            tokens += [*words, CLOSE, NEWLINE]
        return tokens, starts


def interleaved(
    chance: Chance, talks: list[Iterator[TracedRequest]], *, at_once: int, stays: float
) -> Iterator[TracedRequest]:
    """Requests of several conversations; the one that asked last asks again with `stays`."""
    waiting, active = list(talks), list[Iterator[TracedRequest]]()
    last = 0
    while waiting or active:
        while waiting and len(active) < at_once:
            active.append(waiting.pop(0))
        last = (
            last
            if last < len(active) and chance.happens(stays)
            else chance.between(0, len(active) - 1)
        )
        asked = next(active[last], None)
        if asked is None:
            del active[last]
        else:
            yield asked


def agents(chance: Chance) -> Iterator[TracedRequest]:
    """Twelve coding agents, at most four at once, on two sets of tools (5K and 7K tokens).

    Each is given a task and takes 14 to 30 steps: a tool call and its result (median 900 tokens, up to
    9K), so that prompts grow to between 20K and 60K. Half of them think; their reasoning stays while they call
    tools and goes when the user speaks again, every ten steps or so. 4 % of requests are asked again
    as they are, 4 % go back up to four steps (an edited result, another try).
    """
    tools = [chance.text(5_000), chance.text(7_000)]

    def agent(index: int) -> Iterator[TracedRequest]:
        talk = Talk(str(index), chance, thinks=index % 2 == 1)
        talk.say("system", tools[index % 4 // 2])
        talk.say("user", chance.text(chance.between(150, 1_200)))
        for _ in range(chance.between(14, 30)):
            asked = talk.ask(chance.about(150, 40, 800), chance.about(150, 20, 1_200), calls=True)
            if chance.happens(0.04):
                yield talk.rejected(asked)
            yield asked
            if chance.happens(0.1):
                yield talk.ask(chance.between(100, 500), chance.about(150, 20, 1_200))
                talk.say("user", chance.text(chance.between(30, 400)))
                continue
            if chance.happens(0.04) and len(talk.turns) > 12:
                talk.back_to(len(talk.turns) - 2 * chance.between(1, 4))
            talk.say("tool", chance.text(chance.about(900, 60, 9_000)))

    return interleaved(chance, [agent(i) for i in range(12)], at_once=4, stays=0.6)


def chats(chance: Chance) -> Iterator[TracedRequest]:
    """Fourteen chats of 20 to 40 turns with a thinking model, six at once, four system prompts.

    Questions of 15 to 300 tokens, one in ten with 1K to 4K of pasted text; 100 to 2,500 tokens of
    reasoning that the next prompt leaves out; answers of 80 to 900. One answer in twenty is regenerated.
    """
    systems = [chance.text(chance.between(200, 1_500)) for _ in range(4)]

    def chat(index: int) -> Iterator[TracedRequest]:
        talk = Talk(str(index), chance, thinks=True)
        talk.say("system", systems[index % 4])
        for _ in range(chance.between(20, 40)):
            pasted = chance.between(1_000, 4_000) if chance.happens(0.1) else 0
            talk.say("user", chance.text(chance.about(60, 15, 300) + pasted))
            asked = talk.ask(chance.about(300, 80, 900), chance.about(500, 100, 2_500))
            if chance.happens(0.05):
                yield talk.rejected(asked)
            yield asked

    return interleaved(chance, [chat(i) for i in range(14)], at_once=6, stays=0.3)


def rag(chance: Chance) -> Iterator[TracedRequest]:
    """400 questions about sixteen documents of 2K to 4K tokens, the first ones the most asked about.

    The system prompt (600 tokens), one to three documents, most relevant first, and a question of 15
    to 80 tokens in one message. A quarter of the users ask once more.
    """
    system = chance.text(600)
    documents = [chance.text(chance.between(2_000, 4_000)) for _ in range(16)]

    def question(index: int) -> Iterator[TracedRequest]:
        first = chance.popular(16, 0.9)
        found = [first, *(chance.popular(16, 0.9) for _ in range(chance.between(0, 2)))]
        talk = Talk(str(index), chance)
        talk.say("system", system)
        context = [token for each in dict.fromkeys(found) for token in documents[each]]
        talk.say("user", context + chance.text(chance.between(15, 80)))
        yield talk.ask(chance.between(60, 400))
        if chance.happens(0.25):
            talk.say("user", chance.text(chance.between(15, 80)))
            yield talk.ask(chance.between(60, 400))

    return interleaved(chance, [question(i) for i in range(320)], at_once=5, stays=0.2)


def few_shot(chance: Chance) -> Iterator[TracedRequest]:
    """Eight labelling tasks with 2K to 9K tokens of examples, in batches of 25 raw completions, twice.

    Every prompt is the task's examples and an item of 50 to 400 tokens; replies are 5 to 60 tokens.
    """
    tasks = [chance.text(chance.between(2_000, 9_000)) for _ in range(8)]
    for batch in [*range(8), *(chance.popular(8, 0.5) for _ in range(8))]:
        for _ in range(25):
            tokens = np.array(tasks[batch] + chance.text(chance.between(50, 400)), dtype=np.int32)
            reply = np.array(chance.text(chance.between(5, 60)), dtype=np.int32)
            yield TracedRequest(0.0, str(batch), tokens, (), reply, len(reply), keeps_reply=True)


def system_prompts(chance: Chance) -> Iterator[TracedRequest]:
    """Short chats behind fifty system prompts of 1K to 6K tokens, the first ones by far the most used.

    One to four turns each with questions of 20 to 400 tokens and answers of 50 to 500, six at once.
    """
    systems = [chance.text(chance.between(1_000, 6_000)) for _ in range(50)]

    def visit(index: int) -> Iterator[TracedRequest]:
        talk = Talk(str(index), chance)
        talk.say("system", systems[chance.popular(50)])
        for _ in range(chance.between(1, 4)):
            talk.say("user", chance.text(chance.about(80, 20, 400)))
            yield talk.ask(chance.between(50, 500))

    return interleaved(chance, [visit(i) for i in range(170)], at_once=6, stays=0.2)


def volatile_line(chance: Chance) -> Iterator[TracedRequest]:
    """Chats whose system prompt (3K tokens) has a line that changes every fifteen requests: the time.

    In half of the chats it stands after 300 tokens, in the other half it is the last line. What was
    read before the line changed serves no request any more beyond it.
    """
    heads = [chance.text(300), chance.text(3_000)]
    tails = [chance.text(2_700), []]
    line: list[int] = []

    def chat(index: int) -> Iterator[TracedRequest]:
        talk = Talk(str(index), chance)
        talk.say("system", [])
        for _ in range(chance.between(6, 16)):
            talk.turns[0] = ("system", heads[index % 2] + line + tails[index % 2], [])
            talk.say("user", chance.text(chance.about(100, 20, 1_500)))
            yield talk.ask(chance.between(80, 600))

    chats = [chat(i) for i in range(30)]
    for count, asked in enumerate(interleaved(chance, chats, at_once=5, stays=0.4)):
        if count % 15 == 0:
            line = chance.text(24)
        yield asked


def jump_back(chance: Chance) -> Iterator[TracedRequest]:
    """Ten long conversations (grown to 12K to 35K tokens); one request in eight goes back.

    Going back means to an earlier turn, anywhere, with another question; after one to three turns on the
    new branch two thirds return to the old one, a third stays.
    """
    system = chance.text(1_200)

    def conversation(index: int) -> Iterator[TracedRequest]:
        talk = Talk(str(index), chance)
        talk.say("system", system)
        for _ in range(chance.between(16, 26)):
            talk.say("user", chance.text(chance.about(400, 30, 4_000)))
            yield talk.ask(chance.about(400, 60, 2_000))
            users = talk.users()
            if len(users) > 3 and chance.happens(0.125):
                branch = dataclasses.replace(talk, turns=list(talk.turns))
                branch.back_to(users[chance.between(1, len(users) - 2)] + 1)
                for _ in range(chance.between(1, 3)):
                    branch.say("user", chance.text(chance.about(200, 30, 2_000)))
                    yield branch.ask(chance.about(400, 60, 2_000))
                if chance.happens(1 / 3):
                    talk = branch

    return interleaved(chance, [conversation(i) for i in range(10)], at_once=4, stays=0.5)


def alternating(chance: Chance) -> Iterator[TracedRequest]:
    """Eight sessions that take turns, always in the same order, for forty rounds in all but pauses.

    Each has a system prompt of its own (1K to 3K tokens) and grows to 10K to 20K. In every eighth round a session is
    closed and another begins in its place.
    """

    def session(name: str) -> Iterator[TracedRequest]:
        talk = Talk(name, chance)
        talk.say("system", chance.text(chance.between(1_000, 3_000)))
        talk.say("user", chance.text(chance.between(1_000, 6_000)))
        while True:
            yield talk.ask(chance.between(80, 500))
            talk.say("user", chance.text(chance.about(150, 20, 1_500)))

    sessions = [session(str(i)) for i in range(8)]
    for turn in range(40):
        if turn % 8 == 7:
            sessions[turn // 8] = session(f"{turn // 8} again")
        for each in sessions:
            yield next(each)


WORKLOADS: dict[str, Callable[[Chance], Iterator[TracedRequest]]] = {
    "agents": agents,
    "chats": chats,
    "rag": rag,
    "few-shot": few_shot,
    "system-prompts": system_prompts,
    "volatile-line": volatile_line,
    "jump-back": jump_back,
    "alternating": alternating,
}


def workload(name: str, seed: int, *, requests: int | None = None) -> list[TracedRequest]:
    """The trace `name` of a seed, or its first `requests`. Raises `SettingError` for another name."""
    if name not in WORKLOADS:
        raise SettingError(f"There is no workload {name!r}; there are {', '.join(WORKLOADS)}.")
    chance = Chance(seed)
    trace: list[TracedRequest] = []
    seconds = 0.0
    for asked in WORKLOADS[name](chance):
        if requests is not None and len(trace) >= requests:
            break
        seconds += float(chance.numbers.exponential(20.0))
        trace.append(dataclasses.replace(asked, seconds=round(seconds, 1)))
    return trace
