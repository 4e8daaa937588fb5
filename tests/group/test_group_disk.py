"""Each rank keeps a directory of its own: what all of them have is restored after a restart, and nothing else."""

import json
import random
import shutil
import time
from dataclasses import replace

import pytest
from directories.segment_files import FLOATS, content
from long import mostly_long
from matrix import shapes
from oracle import word_tokenizer
from ranks import scenarios
from ranks.scenarios import as_lists, replies_only
from ranks.started import group_of

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.disk.segment import read_header, write


def visits_in_one_process(tmp_path, family, seed, acts, visits, *, at_once):
    """What the acts of each start come to."""
    found = []
    for visit in range(visits):
        settings = {**scenarios.SETTINGS, "cache_dir": tmp_path / "alone"}
        with HybridPromptCache(shapes.build(family), word_tokenizer(), **settings) as cache:
            acted = scenarios.journey_of(cache, seed, acts, at_once=at_once, visit=visit)
            found.append(as_lists([*acted]))
    return found


def start(
    tmp_path, scenario, family="qwen3_next", how="pipeline", size=2, settings=None, **options
):
    """All that rank 0 of a group with directories below one folder says, and what it prints."""
    settings = {"cache_dir": str(tmp_path / "ranks"), **(settings or {})}
    asked = json.dumps({"settings": settings, **options})
    with group_of(size, tmp_path, scenario, family, how, asked) as ranks:
        for rank in ranks:
            assert rank.ends() == 0, rank.printed
        return ranks[0].said, ranks[0].printed


def of(said, key):
    return [each[key] for each in said if key in each]


@pytest.mark.parametrize(
    ("family", "how", "size", "acts", "visits"),
    mostly_long(
        [
            ("qwen3_next", "pipeline", 2, 10, 2),
            ("qwen3_next", "pipeline", 4, 20, 3),
            ("qwen3_5", "pipeline", 2, 50, 4),
            ("qwen3_5_moe", "pipeline", 2, 30, 3),
            ("qwen3_5_moe", "pipeline", 4, 10, 2),
            ("qwen3_moe", "pipeline", 2, 25, 3),  # rows alone
            ("ministral3", "pipeline", 2, 15, 2),
        ],
        always=[("qwen3_next", "pipeline", 2, 10, 2)],
    ),
)
def test_restarts_restore_what_one_process_would(tmp_path, family, how, size, acts, visits):
    """Replies, all log-probabilities and restored counts, for acts that several starts ask for."""
    expected = visits_in_one_process(tmp_path, family, 5, acts, visits, at_once=False)
    for visit in range(visits):
        options = {"seed": 5, "acts": acts, "at_once": False, "visit": visit}
        said, _ = start(tmp_path, "journey", family, how, size, **options)
        assert of(said, "one") == expected[visit]


@pytest.mark.parametrize(
    ("family", "size", "acts", "visits"),
    mostly_long(
        [("qwen3_5", 2, 10, 2), ("qwen3_next", 2, 25, 3), ("qwen3_5_moe", 4, 20, 3)],
        always=[("qwen3_5", 2, 10, 2)],
    ),
)
def test_in_company_after_evictions_and_restarts_the_bits_are_the_same(
    tmp_path, family, size, acts, visits
):
    expected = visits_in_one_process(tmp_path, family, 6, acts, visits, at_once=True)
    small, evictions = {"memory_budget": "800KB"}, 0
    for visit in range(visits):
        options = {"seed": 6, "acts": acts, "at_once": True, "visit": visit}
        said, _ = start(tmp_path, "journey", family, size=size, settings=small, **options)
        assert replies_only(of(said, "one")) == replies_only(expected[visit])
        evictions += of(said, "evictions")[0]
    assert evictions


@pytest.fixture
def asked(tmp_path):
    """Asks a group for prompts, in one directory, and compares what it says with what was said at first."""
    first = []

    def ask(how="pipeline", family="qwen3_next", **more):
        said, printed = start(tmp_path, "ask_for_each", family, how, seeds=[1, 2], **more)
        found = of(said, "hot")
        if not first:
            first.extend(found)
        assert [each[:2] for each in found] == [each[:2] for each in first]
        looked = [at for at, _ in of(said, "looked")]
        return [each[2] for each in found], looked, printed

    return ask


def test_one_lost_directory_costs_its_entries(tmp_path, asked):
    asked()
    shutil.rmtree(tmp_path / "ranks" / "rank-1-of-2")
    counts, looked, printed = asked()
    assert counts == looked == [0, 0]
    assert printed.count("Rank 1 has no files that restore a prompt at 299 tokens") == 1
    # It was written again.
    counts, looked, printed = asked()
    assert counts == looked == [299, 299]
    assert printed == ""


@pytest.mark.long
def test_what_only_some_ranks_have_is_passed_over(tmp_path, asked):
    asked()
    for rank in (0, 1):
        states = sorted((tmp_path / "ranks" / f"rank-{rank}-of-2").rglob("*.state.safetensors"))
        for path in random.Random(rank).sample(states, len(states) // 2):
            path.unlink()
    counts, looked, _ = asked()
    assert counts == looked
    assert all(0 <= each < 299 for each in counts)
    assert any(counts)
    assert asked()[0] == [299, 299]


def test_a_damaged_file_on_one_rank_is_passed_over_by_all(tmp_path, asked):
    asked()
    for path in (tmp_path / "ranks" / "rank-1-of-2").rglob("*.safetensors"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    counts, looked, _ = asked()
    assert (counts, looked) == ([0, 0], [299, 299])  # who looks reads no file


@pytest.mark.parametrize("victim", mostly_long([0, 1], always=[]))
def test_a_file_of_other_tensors_on_one_rank_is_passed_over_by_all(tmp_path, asked, victim):
    """Which that rank sees before it reads any, while others have begun to read theirs."""
    asked()
    root = tmp_path / "ranks" / f"rank-{victim}-of-2"
    for index in root.glob("index.sqlite*"):
        index.unlink()
    for path in root.rglob("*.state.safetensors"):
        segment = replace(read_header(path), tensors=FLOATS)
        path.unlink()
        write(root, segment, [content(segment)])
    counts, looked, _ = asked()
    assert (counts, looked) == ([0, 0], [299, 299])


def test_directories_that_changed_places_restore_nothing(tmp_path, asked):
    """Tensors on ranks are of one shape, so only its name tells a file of one rank from one of another."""
    asked("tensor", "qwen3_5")
    root = tmp_path / "ranks"
    for a, b in (
        ("rank-0-of-2", "aside"),
        ("rank-1-of-2", "rank-0-of-2"),
        ("aside", "rank-1-of-2"),
    ):
        (root / a).rename(root / b)
    assert asked("tensor", "qwen3_5")[0] == [0, 0]


@pytest.mark.long
def test_another_split_restores_nothing_of_it(asked):
    asked("pipeline", "qwen3_5")
    assert asked("pipeline", "qwen3_5", size=3)[0] == [0, 0]


@pytest.mark.parametrize(
    "how", mostly_long(["reads slowly", "reads more slowly"], always=["reads more slowly"])
)
def test_a_request_that_goes_away_while_files_are_read_leaves_nothing(tmp_path, how):
    cold, _ = start(tmp_path, "ask_for_each", seeds=[0, 1, 2])
    said, _ = start(tmp_path, "left_while_files_are_read", broken=how)
    assert of(said, "left") == [0]
    assert replies_only(of(said, "hot")) == replies_only(of(cold, "hot"))
    assert [each[2] for each in of(said, "hot")] == [299] * 3


def test_a_rank_that_cannot_use_its_directory_is_named(tmp_path):
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "rank-1-of-2").write_text("in the way")
    options = json.dumps({"settings": {"cache_dir": str(tmp_path / "ranks")}})
    with group_of(2, tmp_path, "ask_for_each", "qwen3_next", "pipeline", options) as ranks:
        assert [rank.ends() for rank in ranks] == [1, 1]
        for rank in ranks:
            assert "Rank 1: The cache directory" in rank.printed


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_kills_while_files_are_written_and_read_leave_nothing_wrong(tmp_path, asked, seed):
    """At a random moment, of any rank; the next start is right, and the one after that finds everything."""
    chance = random.Random(seed)
    asked()
    options = json.dumps({"settings": {"cache_dir": str(tmp_path / "ranks")}, "seed": seed})
    with group_of(2, tmp_path, "for_ever", "qwen3_next", "pipeline", options) as ranks:
        ranks[0].hears("asked", chance.randrange(1, 8))
        time.sleep(chance.uniform(0, 0.3))
        ranks[chance.randrange(2)].kill()
        for rank in ranks:
            assert rank.ends() in (3, -9), rank.printed
    asked()
    assert asked()[0] == [299, 299]
