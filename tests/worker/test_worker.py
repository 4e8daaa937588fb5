"""One thread does the work, whoever asks; nobody who stops listening blocks it."""

import gc
import threading
import time
from contextlib import contextmanager

import pytest

from mlx_hybridcache.errors import ClosedError
from mlx_hybridcache.worker.stream import AHEAD, Task
from mlx_hybridcache.worker.turns import PAUSE, Job
from mlx_hybridcache.worker.worker import Worker


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()


def test_calls_from_any_thread_run_on_the_worker_thread(worker):
    """Eight threads ask for the thread's name and get one."""
    names = []
    threads = [
        threading.Thread(target=lambda: names.append(worker.call(threading.get_ident)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 8
    assert set(names) == {worker.call(threading.get_ident)}
    assert threading.get_ident() not in names


def test_an_error_reaches_the_caller_and_the_worker_goes_on(worker):
    """A call that divides by zero raises where it was made."""
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 // 0)
    assert worker.call(lambda: 5) == 5


def test_two_requests_take_turns(worker):
    """Steps of two requests alternate once both are under way."""
    order = []
    gate = threading.Event()

    def steps(name):
        gate.wait()
        for _ in range(3):
            order.append(name)
            yield PAUSE
        yield name

    a, b = worker.stream(steps("a")), worker.stream(steps("b"))
    time.sleep(0.05)  # both are queued before the first step is allowed to end
    gate.set()
    assert [*a, *b] == ["a", "b"]
    assert order == ["a", "b"] * 3


def test_a_request_ends_with_its_own_error(worker):
    """Items before the error are delivered; another request is not touched."""

    def failing():
        yield 1
        raise RuntimeError("broken")

    stream, other = worker.stream(failing()), worker.stream(iter([7]))
    assert next(stream) == 1
    with pytest.raises(RuntimeError, match="broken"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert list(other) == [7]


def test_a_reader_that_stops_parks_its_request(worker):
    """An endless request runs at most AHEAD items ahead of a reader that took three."""
    made = []

    def endless():
        while True:
            made.append(len(made))
            yield made[-1]

    stream = worker.stream(endless())
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    worker.call(lambda: None)
    settled = 0
    while settled != len(made):  # turns go on until it is parked
        settled = len(made)
        worker.call(lambda: None)
    assert len(made) <= 3 + AHEAD
    assert worker.call(lambda: "still here") == "still here"
    stream.close()


def test_closing_waits_for_the_requests_own_clean_up(worker):
    """When close returns, what the request does in `finally` is done, on the worker thread."""
    cleaned = []

    def steps():
        try:
            while True:
                yield 1
        finally:
            cleaned.append(threading.get_ident())

    stream = worker.stream(steps())
    next(stream)
    stream.close()
    assert cleaned == [worker.call(threading.get_ident)]
    assert list(stream) == []


def test_a_dropped_stream_cancels_its_request(worker):
    """No close, only the last reference gone."""
    cleaned = threading.Event()

    def steps():
        try:
            while True:
                yield 1
        finally:
            cleaned.set()

    stream = worker.stream(steps())
    next(stream)
    del stream
    gc.collect()
    assert cleaned.wait(5)


def test_a_closed_worker_says_so(worker):
    """Calls and requests after the end raise ClosedError, and so do requests that it cuts short."""
    stream = worker.stream(iter(lambda: 1, 0))
    next(stream)
    worker.close()
    with pytest.raises(ClosedError):
        worker.call(lambda: 1)
    with pytest.raises(ClosedError):
        worker.stream(iter([1]))
    with pytest.raises(ClosedError):
        assert set(stream) <= {1}


def test_what_is_held_is_entered_and_left_on_the_worker_thread():
    """The wired limit's context lives as long as the thread."""
    seen = []

    @contextmanager
    def held():
        seen.append(threading.get_ident())
        yield
        seen.append(threading.get_ident())

    worker = Worker(held)
    ident = worker.call(threading.get_ident)
    worker.close()
    assert seen == [ident, ident]


def test_a_dropped_worker_ends_its_thread():
    """No thread is left behind by a worker that nobody refers to."""
    worker = Worker(name="dropped")
    worker.call(lambda: None)
    del worker
    gc.collect()
    assert "dropped" not in [thread.name for thread in threading.enumerate()]


def test_all_who_wait_for_an_item_look():
    """The one that is woken first may have been cancelled by then; nobody else would be told."""
    task, woken = Task(iter(()), Job()), []
    task.wakers |= {lambda: woken.append(1), lambda: woken.append(2)}
    task.put("item", "a")
    assert sorted(woken) == [1, 2]


def test_who_comes_to_wait_while_others_are_woken_is_not_woken_for_nothing():
    """It looks before it waits, and finds the item or that another has it; a reader on a busy loop would else go round."""
    task, woken = Task(iter(()), Job()), []

    def back_again():
        woken.append(len(woken))
        if len(woken) < 100:
            task.wakers.add(back_again)

    task.wakers.add(back_again)
    for count in (1, 2):
        task.put("item", "a")
        assert (woken, task.wakers) == ([*range(count)], {back_again})


def test_who_waits_for_a_sleeper_is_not_asked_again_and_again():
    """Until somebody else than those who wait can go on: a third request, and the sleeper once it wakes."""
    asleep, waits, asked = Job(left=1), Job(left=1), []

    def sleeping():
        asleep.asleep = True
        yield PAUSE
        yield "slept"

    def waiting():
        waits.waits = True
        while asleep.asleep:
            asked.append(1)
            yield PAUSE
        yield "waited"

    worker = Worker()
    try:
        sleeper = worker.stream(sleeping(), asleep)
        waiter = worker.stream(waiting(), waits)
        for _ in range(20):
            worker.call(lambda: None)
        assert len(asked) <= 2
        assert list(worker.stream(iter(["another"]), Job())) == ["another"]
        worker.post(lambda: setattr(asleep, "asleep", False))
        assert [*sleeper, *waiter] == ["slept", "waited"]
    finally:
        worker.close()
