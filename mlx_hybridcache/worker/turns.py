"""Whose turn it is to read a slice of its prompt: pure functions over numbers.

Shortest remaining first, so that a short question does not wait behind a long document. Alone that
would starve the long one under a stream of short ones; so each slice that a prompt is passed over
counts as `AGEING_TOKENS` read, and a prompt of n tokens is passed over by newcomers n / AGEING_TOKENS
times at most.
"""

from __future__ import annotations

from collections.abc import Sequence

AGEING_TOKENS = 256


def next_reader(left_tokens: Sequence[int], passed_over: Sequence[int]) -> int:
    """The index of the prompt that reads next, of several in order of arrival.

    `left_tokens` is what each has to read until somebody gets a first token of it, `passed_over`
    how many slices others have read while it could have.
    """
    return min(
        range(len(left_tokens)), key=lambda i: left_tokens[i] - AGEING_TOKENS * passed_over[i]
    )
