#!/bin/sh
# mlx 0.32.4 (Linux, CPU): each Python thread that evaluates anything leaves an operating-system thread behind that
# stays until the process ends, and neither the end of the Python thread nor mx.clear_streams() ends it.
#
# A thread's first evaluation makes it a default stream of its own, and a CPU stream is a thread. Streams are counted,
# not freed: one that a thread has made itself (mx.new_stream) stays as well, although clear_streams says that it destroys
# all streams of the current thread. A server with a thread for each request, or a worker for each model that it
# loads, grows by one thread each time; a pool of threads that lives on does not.
#
# Seen: 200 Python threads one after the other, none alive at the end: 201 more tasks of the process, with clear_streams
# 200, with a stream of their own beside the default one about 400; 200 evaluations on one thread of a pool: 1 more.
#
# Not part of CI: it installs packages. Exits with 1 when what it sees has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4"
"$folder/venv/bin/python" - <<'PYTHON'
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx

COUNT = 200


def tasks():
    return len(os.listdir("/proc/self/task"))


def default_stream():
    mx.eval(mx.ones(4) + 1)


def cleared():
    default_stream()
    mx.clear_streams()


def own_stream_cleared():
    with mx.stream(mx.new_stream(mx.cpu)):
        mx.eval(mx.ones(4) + 1)
    mx.synchronize()
    mx.clear_streams()


def one_after_the_other(work):
    before = tasks()
    for _ in range(COUNT):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert threading.active_count() == 1
    return tasks() - before


def in_a_pool():
    before = tasks()
    with ThreadPoolExecutor(1) as pool:
        for _ in range(COUNT):
            pool.submit(default_stream).result()
        return tasks() - before - 1  # the pool's own thread


default_stream()
left = [one_after_the_other(work) for work in (default_stream, cleared, own_stream_cleared)]
pooled = in_a_pool()
print(f"left of {COUNT} threads: {left[0]}; with clear_streams: {left[1]}; with a stream of their own: {left[2]}")
print(f"of {COUNT} evaluations in a pool of one: {pooled}")
raise SystemExit(0 if min(left) >= COUNT and pooled == 1 else 1)
PYTHON
echo "as seen with mlx 0.32.4"
