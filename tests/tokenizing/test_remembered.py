"""What is remembered of texts stays within its bound, and the least recently used goes first."""

import gc
import random
import tracemalloc
from threading import Thread

import numpy as np

from mlx_hybridcache.tokenizing.remembered import Remembered

ONE = np.arange(3, dtype=np.int32)


def kept(remembered, salt, text):
    """Whether a text is remembered, which makes it the last to go."""
    return remembered.find(salt, [text])[0] is not None


def test_the_bound_holds_and_what_was_used_last_stays():
    """200 texts where 20 have room, of which one is asked for again and again."""
    remembered = Remembered(most_bytes=20 * 500)
    for index in range(200):
        remembered.keep("", [f"text {index}"], [ONE])
        assert remembered.nbytes <= remembered.most_bytes
        assert kept(remembered, "", "text 0")
    assert not kept(remembered, "", "text 1")
    assert len(remembered) > 10


def test_a_text_beyond_the_bound_is_not_kept_and_pushes_nothing_out():
    """A text of 10,000 letters where 5,000 bytes have room."""
    remembered = Remembered(most_bytes=5_000)
    remembered.keep("", ["short", "a" * 10_000], [ONE, ONE])
    assert kept(remembered, "", "short")
    assert not kept(remembered, "", "a" * 10_000)


def test_nothing_of_a_long_prompt_is_kept_alive_by_a_short_part():
    """A hundred views of arrays of 4 MB hold as much as they say."""
    tracemalloc.start()
    remembered = Remembered()
    for index in range(100):
        remembered.keep("", [f"text {index}"], [np.zeros(2**20, dtype=np.int32)[:10]])
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2 * remembered.nbytes


def test_bytes_are_counted_and_given_back():
    """What is replaced is not counted twice; forgetting everything leaves nothing."""
    remembered = Remembered()
    remembered.keep("a", ["text"], [ONE])
    once = remembered.nbytes
    remembered.keep("a", ["text"], [ONE])
    assert remembered.nbytes == once > ONE.nbytes
    remembered.keep("b", ["text"], [ONE])
    remembered.clear("a")
    assert (len(remembered), remembered.nbytes) == (1, once)
    remembered.clear()
    assert (len(remembered), remembered.nbytes) == (0, 0)


def test_what_many_threads_keep_is_counted_right():
    """Four threads keep and find a thousand texts in a memory for fifty."""
    remembered = Remembered(most_bytes=50 * 500)

    def work(seed):
        rng = random.Random(seed)
        for _ in range(1_000):
            text = "x" * rng.randrange(100)
            remembered.keep(str(seed % 2), [text], [ONE])
            found = remembered.find(str(seed % 2), [text])[0]
            assert found is None or found.tolist() == [0, 1, 2]

    threads = [Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < remembered.nbytes <= remembered.most_bytes
