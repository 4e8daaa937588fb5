"""What is remembered of texts stays within its bound, and the least recently used goes first."""

import ctypes
import gc
import random
import sys
import tracemalloc
from threading import Thread

import numpy as np
import pytest

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


@pytest.mark.parametrize("grows", ["before", "after"])
def test_a_text_that_is_read_as_utf8_is_given_back_as_it_was_counted(grows):
    """Python counts those bytes too, once they are there: with the text kept, or not with its equal."""
    remembered = Remembered()
    text, equal = (f"{letter}lève" for letter in "éé")
    if grows == "before":
        as_utf8(text)
    remembered.keep("", [text], [ONE])
    if grows == "after":
        as_utf8(text)
    else:
        assert kept(remembered, "", equal)
    remembered.clear()
    assert (len(remembered), remembered.nbytes) == (0, 0)


def as_utf8(text):
    """Read a text as C code does; Python keeps what it made of it."""
    before = sys.getsizeof(text)
    read = ctypes.pythonapi.PyUnicode_AsUTF8
    read.argtypes, read.restype = [ctypes.py_object], ctypes.c_char_p
    assert read(text) == text.encode()
    assert sys.getsizeof(text) > before


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
