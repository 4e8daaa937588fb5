"""Memory pressure on a real store: it shrinks between turns, and replies stay right."""

import oracle
import pytest
import tiny

from mlx_hybridcache import machine as pressure
from mlx_hybridcache.errors import SettingError


def test_a_store_on_a_system_without_room_keeps_pins_only():
    """A reserve of all memory but a byte: everything goes but what is pinned."""
    model, tokens = tiny.build("qwen3_next"), oracle.prompt(100, seed=1)
    with oracle.new_cache(model, memory_reserve=0) as cache:
        for seed in (1, 2, 3):
            oracle.read(cache, oracle.prompt(100, seed=seed))
        assert cache.stats().checkpoints > 3
        cache.pin(tokens)
        cache.engine.relief.pressure = pressure.Pressure(pressure.memory_bytes() - 1)
        oracle.read(cache, oracle.prompt(100, seed=4))
        assert cache.lookup(tokens).restored_tokens == 99
        assert cache.lookup(oracle.prompt(100, seed=2)).restored_tokens == 0


def test_what_a_request_is_about_to_allocate_is_left_for_it():
    """Two bytes are left, of which one is reserved: what is stored goes before the next one's caches come."""
    tokens = oracle.prompt(100, seed=1)
    with oracle.new_cache(tiny.build("qwen3_next"), memory_reserve=0) as cache:
        oracle.read(cache, tokens)
        little = pressure.MemoryLeft(2)
        cache.engine.relief.pressure = pressure.Pressure(1, read=lambda: little)
        assert cache.lookup(tokens).restored_tokens == 99
        oracle.read(cache, oracle.prompt(100, seed=2))
        assert cache.lookup(tokens).restored_tokens == 0


def test_a_reserve_that_the_system_does_not_have_is_refused():
    """A million TB."""
    with pytest.raises(SettingError, match="memory_reserve"):
        oracle.new_cache(tiny.build("qwen3_next"), memory_reserve="1000000TB")
