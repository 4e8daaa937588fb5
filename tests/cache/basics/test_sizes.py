"""Sizes as people write them."""

import pytest

from mlx_hybridcache.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("16GB", 16 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("2k", 2000),
        ("7B", 7),
    ],
)
def test_a_size_is_bytes_or_a_number_with_a_unit(written, expected):
    """GB and a bare letter, as in mlx_lm.server, count in thousands, GiB in 1,024s."""
    assert parse_bytes(written) == expected


@pytest.mark.parametrize("written", ["", "much", "-1", -1, "12 parsecs", True, "1e9"])
def test_what_is_no_size_is_refused(written):
    """The message quotes what was found and shows the form."""
    with pytest.raises(ValueError, match="16GB"):
        parse_bytes(written)


def test_sizes_are_shown_in_binary_units():
    """74.25 MiB is one checkpoint of Qwen3-Next-80B."""
    assert format_bytes(77_856_768) == "74.2 MiB"
    assert format_bytes(999) == "999 B"
