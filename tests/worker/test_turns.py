"""Whose turn it is to read, as numbers."""

import random

from mlx_hybridcache.worker.turns import AGEING_TOKENS, next_reader


def test_the_shortest_rest_reads_first():
    """A question of 100 tokens before a document of 12,000; alike, who came first."""
    assert next_reader([12_000, 100, 3_000], [0, 0, 0]) == 1
    assert next_reader([500, 500], [0, 0]) == 0


def test_being_passed_over_counts_as_having_read():
    """12,000 tokens, passed over 47 times, come before a newcomer of 100."""
    times = -(-12_000 // AGEING_TOKENS)
    assert next_reader([12_000, 100], [times, 0]) == 0
    assert next_reader([12_000, 100], [times // 2, 0]) == 1


def test_nobody_waits_forever_whatever_arrives():
    """Seeded floods of short prompts, always one more than there was time for: all get through."""
    for seed in range(20):
        generator = random.Random(seed)
        slice_tokens = 512
        waiting: list[list[int]] = [[20_000, 0, 0]]  # left, passed over, arrived in round
        longest = 0
        for turn in range(2_000):
            for _ in range(generator.choice((1, 1, 2))):
                if len(waiting) < 9:
                    waiting.append([generator.choice((1, 60, 500, 4_000)), 0, turn])
            chosen = next_reader([job[0] for job in waiting], [job[1] for job in waiting])
            for job in waiting:
                job[1] += job is not waiting[chosen]
            waiting[chosen][0] -= slice_tokens
            if waiting[chosen][0] <= 0:
                longest = max(longest, turn - waiting.pop(chosen)[2])
        # 20,000 tokens: 79 rounds until they outrank any newcomer, 40 to read them, and what eight
        # others that came earlier may still have to read.
        assert longest < 400
