"""A mapping that never changes, beside a dictionary that does."""

import random

from mlx_hybridcache.store.frozen import FEW, FrozenMap


def test_each_version_is_what_a_dictionary_was_then():
    """3,000 changes that let it grow to a thousand items and shrink to nothing; ten versions are kept."""
    draw = random.Random(1)
    expected, found, kept = {}, FrozenMap(), []
    for step in range(3_000):
        grows = step % 1_000 < 700
        keys = draw.sample(range(1_500), draw.randrange(4))
        changes = {key: step if draw.random() < (0.9 if grows else 0.1) else None for key in keys}
        if step % 1_000 == 999:
            changes = dict.fromkeys(expected)
        found = found.differing(changes)
        expected = {
            key: value for key, value in {**expected, **changes}.items() if value is not None
        }
        assert len(found) == len(expected)
        assert dict(found) == expected
        assert sorted(found.values()) == sorted(expected.values())
        assert all((key in found) == (key in expected) for key in keys)
        if step % 300 == 0:
            kept.append((found, expected))
    assert len(kept) == 10
    assert all(dict(version) == was for version, was in kept)


def test_a_version_shares_what_does_not_differ():
    """One of ten thousand items is another: at most two of a hundred parts are new."""
    before = FrozenMap({key: key for key in range(10_000)})
    after = before.differing({5: -1})
    parts = {id(part) for part in before._parts}
    new = [part for part in after._parts if id(part) not in parts]
    assert len(new) == 1
    assert len(new[0]) < 10 * FEW
    assert len(after._parts) < 10 * FEW
    assert after.differing({}) is after
