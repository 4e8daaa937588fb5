"""A rank that is lost: who waits hears of it soon, nothing wrong is served, and nothing is left running."""

import json
import random
import signal
import time

import pytest
from long import forms, mostly_long
from ranks.started import group_of

from mlx_hybridcache.group.group import BEAT_SECONDS, LOOKS, LOST_SECONDS

assert LOOKS * BEAT_SECONDS == LOST_SECONDS, "what is stated"

BUSY_SECONDS = 10
"""What a busy machine may take beside that."""


def lost(tmp_path, size, victim, asked, how, looks=LOOKS):
    """Ask on and on; when so many replies are there, a rank is lost."""
    options = json.dumps({"looks": looks})
    with group_of(size, tmp_path, "for_ever", "qwen3_next", "pipeline", options) as ranks:
        ranks[0].hears("asked", asked)
        at = time.time()
        ranks[victim].kill(how)
        others = [rank for rank in ranks if rank.number != victim]
        if victim:
            said = ranks[0].hears("lost")[0]
            assert f"Rank {victim}" in said or "Rank 0 failed" in said, said
            within = (looks * BEAT_SECONDS if how == signal.SIGSTOP else 0) + BUSY_SECONDS
            assert ranks[0].hears("at")[0] - at < within
            assert ranks[0].hears("refused") == [said]
        if how == signal.SIGSTOP:
            ranks[victim].kill(signal.SIGCONT)
            others = ranks
        assert [rank.ends() for rank in others] == [3] * len(others), [r.printed for r in others]
        for rank in others:
            assert not any(each["alive"] for each in rank.said if "alive" in each)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_group_with_a_sentence(tmp_path, victim):
    lost(tmp_path, 2, victim, 3, signal.SIGKILL)


@pytest.mark.parametrize("looks", forms(6, LOOKS))
def test_a_rank_that_stands_still_is_lost(tmp_path, looks):
    """Who waits for it keeps a core busy, as MLX waits: in the short form not for as long."""
    lost(tmp_path, 2, 1, 3, signal.SIGSTOP, looks)


def test_ranks_that_stood_still_together_go_on(tmp_path):
    """Machines that slept have heard nobody meanwhile: that is nobody's end."""
    looks = 6
    with group_of(
        2, tmp_path, "for_ever", "qwen3_next", "pipeline", json.dumps({"looks": looks})
    ) as ranks:
        asked = len(ranks[0].hears("asked", 3))
        for rank in ranks:
            rank.kill(signal.SIGSTOP)
        time.sleep(looks * BEAT_SECONDS + 2)
        for rank in ranks:
            rank.kill(signal.SIGCONT)
        at = time.monotonic()
        while time.monotonic() < at + 2:
            asked = len(ranks[0].hears("asked", asked + 1))


@pytest.mark.parametrize("seed", mostly_long(range(20), always=[0]))
def test_kills_at_any_moment(tmp_path, seed):
    chance = random.Random(seed)
    size = chance.choice([2, 2, 3])
    with group_of(size, tmp_path, "for_ever", "qwen3_next", "pipeline", "{}") as ranks:
        ranks[0].hears("ready")
        time.sleep(chance.uniform(0, 1.5))
        victim = chance.randrange(1, size)
        ranks[victim].kill()
        assert [rank.ends() for rank in ranks if rank.number != victim] == [3] * (size - 1)
        assert ranks[0].hears("lost")


def test_who_does_not_come_is_named(tmp_path):
    """Ranks that were started with other settings, or whose model cannot be spread."""
    with group_of(2, tmp_path, "journey", "llama", "pipeline", "{}") as ranks:
        assert [rank.ends() for rank in ranks] == [1, 1]
        assert "llama cannot be split by layers" in ranks[0].printed
