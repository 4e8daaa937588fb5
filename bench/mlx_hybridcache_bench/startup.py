"""What a start costs: CPU seconds until a server has answered its first request, ours and mlx_lm.server's in pairs.

The first request asks for one token, as mlx_lm.server listens before its model is loaded. Both are
started once before, so that no start compiles what an installed package has compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

from mlx_hybridcache.demo import BUNDLED_MODEL

PAIRS = 5
PATIENCE_SECONDS = 300
OURS, THEIRS = "mlx_hybridcache.server", "mlx_lm.server"


def cpu_seconds_to_first_reply(module: str, model: str, environment: Mapping[str, str]) -> float:
    """User and system time of a fresh process, all its threads, until its first reply is there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runner = f"import sys; from {module} import main; sys.exit(main())"
    command = [sys.executable, "-c", runner, "--model", model, "--port", str(port)]
    before = os.times()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            _wait_for_reply(f"http://127.0.0.1:{port}/v1/completions", process)
        finally:
            process.kill()
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system


def _wait_for_reply(url: str, process: subprocess.Popen[bytes]) -> None:
    opener = build_opener(ProxyHandler({}))
    body = json.dumps({"prompt": "The", "max_tokens": 1}).encode()
    request = Request(url, body, {"Content-Type": "application/json"})
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            with opener.open(request, timeout=PATIENCE_SECONDS) as reply:
                reply.read()
                return
        except URLError:
            time.sleep(0.02)
    raise RuntimeError(f"{process.args!r} does not answer")


def main(argv: Sequence[str] | None = None) -> int:
    """Print each pair and the median of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(BUNDLED_MODEL))
    parser.add_argument("--pairs", type=int, default=PAIRS)
    args = parser.parse_args(argv)
    with TemporaryDirectory() as compiled:
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment = {**kept, "PYTHONPYCACHEPREFIX": compiled}
        for module in (OURS, THEIRS):
            cpu_seconds_to_first_reply(module, args.model, environment)
        ratios = []
        for number in range(args.pairs):
            order = (OURS, THEIRS) if number % 2 else (THEIRS, OURS)
            took = {
                each: cpu_seconds_to_first_reply(each, args.model, environment) for each in order
            }
            ratios.append(took[OURS] / took[THEIRS])
            print(f"ours {took[OURS]:.2f} s, theirs {took[THEIRS]:.2f} s: {ratios[-1]:.2f}")
    print(f"median {statistics.median(ratios):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
