"""The command `mlx-hybridcache launch`: a coding agent on a server of ours, which is started if none runs."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from ...demo.process import running
from ...errors import HybridCacheError, SettingError
from ..asking import NobodyError, key, served_model
from ..flags import Parser
from .agents import AGENTS, Agent, Place

URL = "http://127.0.0.1:8080"


def main(argv: Sequence[str], prog: str) -> int:
    """The agent's own status; 0 when it is only shown what would be run."""
    own, words = _parted(argv)
    options = _parser(prog).parse_args(own)
    agent = AGENTS[options.agent]
    if options.print:
        place = _look(options.url or URL) or _unknown(options.url or URL)
        _show(agent, place, words)
        return 0
    program = shutil.which(agent.program)
    if program is None:
        raise SettingError(f"{agent.program} is not installed. Install it: {agent.install}")
    with _served(options) as place:
        return _run([program, *agent.words(place), *words], agent.environment(place))


def _parted(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own words, and those behind `--`, which are the agent's."""
    at = [*argv].index("--") if "--" in argv else len(argv)
    return [*argv[:at]], [*argv[at + 1 :]]


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        usage="%(prog)s AGENT [--url URL] [--model MODEL] [--cache-dir DIR] [--print] [-- ARGUMENTS]",
        description=__doc__,
        epilog="What stands behind -- goes to the agent. Its own settings are left as they are.",
    )
    add = parser.add_argument
    add("agent", choices=AGENTS, metavar="AGENT", help=", ".join(AGENTS))
    add("--url", help=f"a server that runs already (default: {URL}, or one is started there)")
    add("--model", help="directory, or owner/name, for a server that is started")
    add("--cache-dir", help="where such a server keeps its cache, for the next time")
    add("--print", action="store_true", help="show the lines that do the same, and run nothing")
    return parser


# The server


@contextmanager
def _served(options: argparse.Namespace) -> Iterator[Place]:
    """A server that runs, or one that lives as long as the agent. Raises `HybridCacheError`."""
    url = options.url or URL
    place = _look(url)
    if place is not None:
        if options.model or options.cache_dir:
            raise SettingError(
                f"A server runs at {url} already, with a model and a cache of its own: leave out "
                "--model and --cache-dir, or stop it."
            )
        yield place
        return
    if options.url is not None:
        raise HybridCacheError(f"No server answers at {url}. Start one, or leave out --url.")
    flags = ["--port", str(urlsplit(url).port)]
    for name, value in (("--model", options.model), ("--cache-dir", options.cache_dir)):
        flags += [name, value] if value else []
    print("Starting a server ...", file=sys.stderr)
    with running(flags) as server:
        started = _look(server.wait_until_ready())
        if started is None:
            raise HybridCacheError("The server that was started does not answer.")
        print(f"It serves at {started.url}, and shows there what its cache does.", file=sys.stderr)
        yield started


def _look(url: str) -> Place | None:
    """The server of ours at `url`; None where nobody listens. Raises `HybridCacheError` for another's."""
    url = url.rstrip("/")
    try:
        return Place(url, key(), served_model(url).get("context_length"))
    except NobodyError:
        return None


def _unknown(url: str) -> Place:
    return Place(url.rstrip("/"), key(), None)


# The agent


def _run(command: list[str], variables: Mapping[str, str]) -> int:
    """Ctrl-C is the agent's: it may mean no more there than to stop a reply."""
    before = signal.signal(signal.SIGINT, _nothing)
    try:
        return subprocess.run(command, env={**os.environ, **variables}, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def _nothing(number: int, frame: Any) -> None:
    """A handler, and not SIG_IGN, which the agent would inherit."""


def _show(agent: Agent, place: Place, words: list[str]) -> None:
    for name, value in agent.environment(place).items():
        print(f"export {name}={shlex.quote(value)}")
    print(shlex.join([agent.program, *agent.words(place), *words]))
