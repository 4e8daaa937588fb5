#!/bin/sh
# mlx 0.32.4: mlx.launch keeps a core of the machine that it runs on busy for as long as its ranks run, whatever they do.
#
# For each rank it has a thread that waits in select() until the rank has printed something, or until there is room in the
# rank's stdin. There is always room, so select() returns at once, and the thread goes round again. The threads share one
# interpreter, so together they take one core; on the first machine that is beside rank 0, which computes there.
#
# Seen on two cores that do nothing else, ranks that sleep for ten seconds and print nothing: the launcher alone used 10.0 s
# of processor time with one rank and 12.7 s with two, where waiting takes none (1 to 3 s while other processes kept both
# cores busy). Ranks that are started by hand, with MLX_RANK and MLX_HOSTFILE as the launcher sets them, form the same group
# without it.
#
# Not part of CI: it installs packages. Exits with 1 when what it sees has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4"
"$folder/venv/bin/python" - "$folder/venv/bin" <<'PYTHON'
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

SLEEP, BUSY, IDLE = 10, 0.5, 0.1
tools = Path(sys.argv[1])


def seconds(command, **variables):
    """Processor time of a command and of all that it waits for; its stdin stays open."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env={**os.environ, **variables}
    )
    process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


started = seconds([tools / "mlx.launch", "-n", "1", "--backend", "ring", "--", "/bin/true"])
found = {"sleep alone": seconds(["/bin/sleep", str(SLEEP)])}
for ranks in ("1", "2"):
    command = [tools / "mlx.launch", "-n", ranks, "--backend", "ring", "-p", "39471"]
    found[f"{ranks} under mlx.launch"] = seconds([*command, "--", "/bin/sleep", str(SLEEP)]) - started
print(f"processor seconds while ranks sleep for {SLEEP} s:", json.dumps(found, indent=1))
waits = found.pop("sleep alone")
assert waits < IDLE, "sleep itself is busy"
assert min(found.values()) > BUSY, "mlx.launch waits now"
PYTHON
