"""`bench hotpath`: its model, its vocabularies, what it asks, and what it makes of the answers."""

import importlib.util
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlx_hybridcache_bench import cli
from mlx_hybridcache_bench.hotpath import asked as asking
from mlx_hybridcache_bench.hotpath import results, vocabulary
from mlx_hybridcache_bench.hotpath.asked import Asked, Request, ask_in_turns
from mlx_hybridcache_bench.hotpath.chats import (
    CHANGED,
    NEXT_TURN,
    REGENERATE,
    REPEAT,
    STEPS,
    conversation,
    hot_chat,
)
from mlx_hybridcache_bench.hotpath.floor import Floor, measure_floors
from mlx_hybridcache_bench.hotpath.model import WORD, make_model
from mlx_hybridcache_bench.kit.paired import Paired, Spent
from mlx_hybridcache_bench.kit.text import tokenizer_of
from mlx_hybridcache_bench.serving.client import Reply
from mlx_hybridcache_bench.serving.remote import RemoteServer
from mlx_hybridcache_bench.serving.scenarios import COLD, Material
from mlx_hybridcache_bench.serving.servers import (
    OURS,
    THEIRS,
    Launch,
    ServerError,
    ServerProcess,
)
from places import ROOT, SUPPORT

from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.errors import SettingError

REPLY = Reply(0.01, 0.02, 600, 599, 1, "length", WORD)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """The model with the bundled vocabulary: where it is, and its parameters."""
    directory = tmp_path_factory.mktemp("made")
    return str(directory), make_model(directory, vocabulary.BUNDLED)


@pytest.fixture(scope="module")
def material() -> Material:
    """Text by the token of the bundled vocabulary."""
    return Material(tokenizer_of(str(BUNDLED_MODEL)), 4_000)


# The model and its vocabularies


def test_the_model_computes_almost_nothing(made: tuple[str, int]) -> None:
    """About 120,000 parameters, most of them the vocabulary's."""
    assert 100_000 < made[1] < 140_000


def test_a_repeat_is_one_forward(made: tuple[str, int]) -> None:
    """600 tokens, one layer of attention with rows of 2 x 16 numbers of 4 bytes: all but the last token's."""
    model, _ = made
    (floor,) = measure_floors(
        model, Material(tokenizer_of(model), 700), [600], 1, lambda said: None
    )
    assert floor.forwards == 1
    assert floor.row_bytes == (floor.tokens - 1) * 2 * 16 * 4
    assert 550 < floor.tokens < 700
    assert [len(each.a) for each in (floor.parts, floor.by_ids, floor.by_text)] == [1, 1, 1]


def test_replies_are_found_again_in_the_next_prompt(made: tuple[str, int]) -> None:
    """Whatever it has read it writes one digit, which is a token of its own wherever it stands."""
    from mlx_lm import generate, load

    model, tokenizer, *_ = load(made[0])
    for prompt in ("a", "The lamp of Ada is red."):
        assert generate(model, tokenizer, prompt, max_tokens=3) == 3 * WORD
    (word,) = tokenizer.encode(WORD, add_special_tokens=False)
    assert tokenizer.encode(3 * WORD, add_special_tokens=False) == [word] * 3


def by_ranks(text: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The lowest rank merges first, as tiktoken does it; a space begins a word."""
    found = []
    for word in text.replace(b" ", b"\0 ").split(b"\0"):
        parts = [word[at : at + 1] for at in range(len(word))]
        while True:
            joined = [ranks.get(parts[at] + parts[at + 1]) for at in range(len(parts) - 1)]
            known = [each for each in joined if each is not None]
            if not known:
                break
            at = joined.index(min(known))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        found += [ranks[part] for part in parts]
    return found


def test_a_vocabulary_of_ranks_reads_text_as_the_ranks_do() -> None:
    """200 texts over five letters, one of two bytes, with tokens of up to five bytes."""
    longer = ["ab", "bc", " a", "abc", "aa", "é", " ab", "abbc", "bcé", "aabc", "ab ab"[:2] + "ca"]
    ranks = {bytes([each]): each for each in range(256)}
    for each in dict.fromkeys(longer):
        ranks.setdefault(each.encode(), len(ranks))
    made = vocabulary.byte_level(ranks, r" ?[^ ]+| ")
    draw = random.Random(1)
    for _ in range(200):
        text = "".join(draw.choice("abcé ") for _ in range(draw.randrange(1, 30)))
        text = " ".join(text.split())
        assert made.encode(text).ids == by_ranks(text.encode(), ranks), text
        assert made.decode(made.encode(text).ids) == text


def test_a_vocabulary_that_is_not_installed_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With what to install, and what to ask for instead."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"pip install dashscope.*--vocabulary trained"):
        vocabulary.write_tokenizer(vocabulary.QWEN, tmp_path)


def test_a_vocabulary_is_trained_where_none_is_at_hand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of 500 entries here, with the markers of the chat template behind them."""
    monkeypatch.setattr(vocabulary, "ENTRIES", 500)
    monkeypatch.setattr(vocabulary, "TEXT", 10_000)
    assert vocabulary.write_tokenizer(vocabulary.TRAINED, tmp_path) == 509
    tokenizer: Any = tokenizer_of(str(tmp_path))
    said = [{"role": "user", "content": "7"}]
    ids = tokenizer.apply_chat_template(said, add_generation_prompt=True)
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>") >= 500


# What is asked


@pytest.mark.parametrize("size", [600, 1_500, 3_300])
def test_a_conversation_has_its_size_and_ends_with_a_question(
    material: Material, size: int
) -> None:
    """Within a tenth, markers left out; two speak in turn; nothing of it was asked before."""
    messages = conversation(material, "Case 1.", size)
    tokenizer = tokenizer_of(str(BUNDLED_MODEL))
    text = "".join(each["content"] for each in messages)
    assert len(tokenizer.encode(text)) == pytest.approx(size, rel=0.1)  # type: ignore[attr-defined]
    assert [each["role"] for each in messages] == [
        ("user", "assistant")[at % 2] for at in range(len(messages))
    ]
    assert messages[-1]["role"] == "user"
    assert messages[0]["content"].startswith("Case 1.")


def test_every_way_to_ask_it_again_is_asked(material: Material) -> None:
    """A repeat is the same; a turn goes on from the reply; a regenerated reply has its turn's prompt."""
    script = hot_chat(material, "Case 1.", 900)
    steps = [next(script)]
    steps += [script.send(REPLY) for _ in STEPS[1:]]
    assert tuple(each.name for each in steps) == STEPS
    said = [each.body["messages"] for each in steps]
    by = {name: [m for s, m in zip(steps, said, strict=True) if s.name == name] for name in STEPS}
    assert all(each == said[0] for each in by[REPEAT])
    assert by[REGENERATE] == by[NEXT_TURN]
    assert by[NEXT_TURN][0][:-1] == [*said[0], REPLY.message()]
    assert by[NEXT_TURN][1][: len(by[NEXT_TURN][0])] == by[NEXT_TURN][0]
    assert said[-1][:-1] == said[0][:-1] != said[-1][-1] != said[0][-1]
    with pytest.raises(StopIteration):
        script.send(REPLY)


class Working:
    """A server whose clock goes on for a while after each reply: 5 ms each time somebody looks."""

    url = "http://127.0.0.1:1"

    def __init__(self, name: str, order: list[str], fails: bool = False) -> None:
        self.name, self.order, self.fails = name, order, fails
        self.used, self.left = 0.0, 0

    def cpu_seconds(self) -> float | None:
        if self.left:
            self.left -= 1
            self.used += 0.005
        return self.used

    def lead(self, scenario: str, script: Any) -> Iterator[Any]:
        step = next(script)
        while True:
            self.order.append(f"{self.name} {step.name}")
            self.used += 0.1
            self.left = 3
            yield step, "no memory" if self.fails else REPLY
            try:
                step = script.send(REPLY)
            except StopIteration:
                return

    def asked(self) -> Asked:
        anything: Any = self
        return Asked(anything, anything)


def test_servers_are_asked_in_turns_until_they_are_quiet(
    monkeypatch: pytest.MonkeyPatch, material: Material
) -> None:
    """A b, b a; what a server does behind its reply is part of the request."""
    monkeypatch.setattr(asking, "QUIET_SECONDS", 0.0)
    order: list[str] = []
    servers = [Working(name, order).asked() for name in "ab"]
    found = [*ask_in_turns(servers, material, [600], 1, lambda said: None)]
    assert order[:4] == ["a cold", "b cold", "b repeat", "a repeat"]
    assert len(found) == 2 * len(STEPS)
    assert {round(each.cpu_seconds or 0, 3) for each in found} == {0.115}


def test_a_server_that_fails_ends_the_run(material: Material) -> None:
    """By name, with what it said."""
    servers = [Working("a", [], fails=True).asked()]
    with pytest.raises(ServerError, match=r"a failed \(cold, 600 tokens\): no memory"):
        list(ask_in_turns(servers, material, [600], 1, lambda said: None))


def test_a_server_elsewhere_is_seen_if_it_runs_on_this_machine() -> None:
    """Its process is the one that listens at the port; of another machine's nothing is known."""
    stand_in = Launch("stand-in", (str(SUPPORT / "serving" / "stand_in_server.py"),))
    with ServerProcess(stand_in) as process:
        process.wait_ready()
        seen, own = RemoteServer("it", process.url, None).cpu_seconds(), process.cpu_seconds()
    assert seen is not None
    assert own is not None
    assert 0 < seen <= own
    assert RemoteServer("far", "http://192.0.2.1:80", None).cpu_seconds() is None


# What is made of it


def request(server: str, size: int, name: str, cpu: float | None, run: int = 0) -> Request:
    return Request(server, size, run, name, 2 * (cpu or 1.0), cpu, size, 0)


def test_requests_are_compared_pair_by_pair() -> None:
    """10/40, 20/50 and 30/100: 0.3, not 20/50."""
    pairs = [(10, 40), (20, 50), (30, 100)]
    asked = [
        request(server, 12_000, REPEAT, cpu, run)
        for run, pair in enumerate(pairs)
        for server, cpu in zip((OURS, THEIRS), pair, strict=True)
    ]
    found = results.ratio(asked, THEIRS, 12_000, REPEAT, results.cpu_of)
    assert found is not None
    assert (found.median, found.low, found.high) == (0.3, 0.25, 0.4)
    hidden = [replace(each, cpu_seconds=None) for each in asked]
    assert results.ratio(hidden, THEIRS, 12_000, REPEAT, results.cpu_of) is None
    assert results.figures(hidden, []) == []
    assert results.ratio([hidden[0], *asked[1:]], THEIRS, 12_000, REPEAT, results.cpu_of) is None
    assert results.ratio(hidden, THEIRS, 12_000, REPEAT, results.ttft_of) == found


def test_a_long_prompt_is_promised_more_than_a_short_one() -> None:
    """0.4 x keeps a half at 12K and misses a quarter from 100K on; cold is promised 1; a library 1.5;
    of a changed line nothing.
    """
    asked = [
        request(server, size, name, cpu)
        for size in (12_000, 100_000)
        for name in (COLD, REPEAT, CHANGED)
        for server, cpu in ((OURS, 0.4), (THEIRS, 1.0))
    ]
    floor = Paired((Spent(1.0, 1.0),), (Spent(3.0, 1.6),))
    floors = [Floor(120_000, 120_000, 2, 1, floor, floor, floor)]
    told = results.figures(asked, floors)
    assert [(each.value, each.target, each.kept) for each in told] == [
        *((0.4, 1.0, True), (0.4, 0.5, True), (0.4, 1.0, True), (0.4, 0.25, False)),
        (1.6, 1.5, False),
    ]


@pytest.mark.long
def test_servers_are_measured_beside_each_other(tmp_path: Path) -> None:
    """This checkout beside itself, and mlx_lm.server: as many requests each, and the documented keys."""
    file = tmp_path / "hotpath.json"
    words = ["hotpath", "--quick", "--sizes", "600", "--against", str(ROOT), "--json", str(file)]
    assert cli.main(words) == 0
    told = json.loads(file.read_text(encoding="utf-8"))
    assert set(told) == {
        *("command", "machine", "parameters", "vocabulary", "against"),
        *("figures", "requests", "ratios", "floors"),
    }
    assert len(told["requests"]) == 3 * len(STEPS)
    hot = [each for each in told["requests"] if each["server"] == OURS and each["name"] == REPEAT]
    assert all(each["prompt_tokens"] - each["cached_tokens"] == 1 for each in hot)
    assert all(each["cpu_seconds"] > 0 for each in told["requests"])
