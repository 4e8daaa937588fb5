"""Kill a server under load: replies stay those of a server without a cache, and what is on disk is found."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from mlx_hybridcache.disk.catalogue import Catalogue
from mlx_hybridcache.disk.index import scan
from mlx_hybridcache.disk.segment import SEGMENTS, check_file
from mlx_hybridcache.errors import HybridCacheError
from mlx_hybridcache.tokens import as_tokens

from ..serving.client import COMPLETIONS
from ..serving.servers import OURS, Launch, ServerProcess

CLIENTS = 3
PROMPTS = 6
FAMILIES = 2
SHARED_TOKENS = 600
TAIL_TOKENS = (50, 1_000)
LONGEST_SECONDS = 1.5
"""The load lasts so long at most before the server is killed."""

FRESH_EVERY = 4
"""So often the directory is removed between two servers: else nothing would be written any more."""

REPLY: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "logprobs": 3}

Prompt = tuple[int, ...]


@dataclass(eq=False)
class ServerAccount:
    """What was done and found. Whatever is in `faults` must not be."""

    kills: int = 0
    replies: int = 0
    restored: int = 0
    checkpoints: int = 0
    verified: int = 0
    faults: list[str] = field(default_factory=list)


class Victim(ServerProcess):
    """A server to be killed, whose log is read afterwards."""

    @property
    def log(self) -> str:
        """What it logged since its start: warnings and worse."""
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace")


def prompts(seed: int) -> list[Prompt]:
    """Token ids, 650 to 1,600 each; those of one family begin alike."""
    drawn = random.Random(seed)

    def some(count: int) -> Prompt:
        return tuple(drawn.randrange(100, 2_000) for _ in range(count))

    families = [some(SHARED_TOKENS) for _ in range(FAMILIES)]
    return [families[i % FAMILIES] + some(drawn.randint(*TAIL_TOKENS)) for i in range(PROMPTS)]


def kill_servers(
    model: str,
    folder: Path,
    kills: int,
    seed: int,
    on_kill: Callable[[int], None] = lambda number: None,
) -> ServerAccount:
    """Kill so many servers, one after the other, all with their cache in `folder`."""
    drawn, account = random.Random(seed), ServerAccount()
    asked = prompts(seed)
    root = folder / "cache"
    launch = Launch.of(OURS, model, ("--cache-dir", str(root)))
    with Victim(launch) as server:
        server.wait_ready()
        cold = {one: _ask(server.url, one, cache_prompt=False)[0] for one in asked}
        server.kill()
        for number in range(kills + 1):
            if number % FRESH_EVERY == 0 and number < kills:
                shutil.rmtree(root, ignore_errors=True)
            known = _Known(root, account)
            server.start()
            server.wait_ready()
            _ask_first(server, known, asked, cold, account, drawn)
            if number == kills:
                _ask_all(server.url, asked, cold, account)
                break
            reported = _kill_under_load(server, asked, cold, account, drawn)
            account.checkpoints += reported
            if (left := _Known(root, account).checkpoints) < reported:
                account.faults.append(f"{reported} checkpoints were durable, {left} are left")
            on_kill(number + 1)
            if account.faults:
                account.faults.insert(0, f"at kill {number} of seed {seed}")
                break
        if said := server.log:
            account.faults.append(f"it logged: {said}")
    return account


class _Known:
    """What the files of a directory without a server promise."""

    def __init__(self, root: Path, account: ServerAccount) -> None:
        entries = scan(root, None, adopt=False, on_rejected=self._rejected)
        for entry in entries:
            check_file(root / SEGMENTS / entry.segment.name)
        account.verified += len(entries)
        self._catalogue = Catalogue(1 << 40, needs_checkpoints=True)
        orphans = self._catalogue.load(entries)
        if orphans:
            account.faults.append(f"{len(orphans)} files lead to nothing")
        self._namespaces = {entry.segment.namespace for entry in entries}

    @property
    def checkpoints(self) -> int:
        return self._catalogue.checkpoints

    def position(self, prompt: Prompt) -> int:
        """Where the next server resumes this prompt, when it asks first."""
        tokens = as_tokens(prompt)
        return max(
            (self._catalogue.find(name, tokens).position for name in self._namespaces), default=0
        )

    def _rejected(self, path: Path, error: HybridCacheError) -> None:
        raise HybridCacheError(f"{path} was left behind: {error}") from error


def _kill_under_load(
    server: Victim,
    asked: Sequence[Prompt],
    cold: dict[Prompt, Any],
    account: ServerAccount,
    drawn: random.Random,
) -> int:
    """Let clients send until a random moment; the checkpoints that were said to be on disk then."""
    over = threading.Event()
    url = server.url
    replies: list[tuple[Prompt, Any]] = []

    def client(seed: int) -> None:
        own = random.Random(seed)
        while not over.is_set():
            prompt = own.choice(asked)
            try:
                replies.append((prompt, _ask(url, prompt)[0]))
            except httpx2.TransportError:  # the server is gone
                return

    threads = [
        threading.Thread(target=client, args=(drawn.getrandbits(32),)) for _ in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    time.sleep(drawn.uniform(0, LONGEST_SECONDS))
    reported = _reported(url)
    time.sleep(drawn.uniform(0, 0.05))
    server.kill()
    account.kills += 1
    over.set()
    for thread in threads:
        thread.join()
    for prompt, reply in replies:
        _compare(account, cold[prompt], reply)
    return reported


def _ask_first(
    server: Victim,
    known: _Known,
    asked: Sequence[Prompt],
    cold: dict[Prompt, Any],
    account: ServerAccount,
    drawn: random.Random,
) -> None:
    """What is served at once is what the files have."""
    reported = _reported(server.url)
    if reported < known.checkpoints:
        account.faults.append(f"{known.checkpoints} checkpoints, {reported} are served")
    durable = [prompt for prompt in asked if known.position(prompt)]
    first = drawn.choice(durable or asked)
    reply, cached = _ask(server.url, first)
    account.restored += cached > 0
    _compare(account, cold[first], reply)
    if cached != known.position(first):
        account.faults.append(f"{cached} cached, the files have {known.position(first)}")


def _ask_all(
    url: str, asked: Sequence[Prompt], cold: dict[Prompt, Any], account: ServerAccount
) -> None:
    for prompt in asked:
        _compare(account, cold[prompt], _ask(url, prompt)[0])


def _ask(url: str, prompt: Prompt, **options: Any) -> tuple[Any, int]:
    """Tokens and log-probabilities of a reply, to the last bit, and the cached tokens."""
    body = {"prompt": list(prompt), **REPLY, **options}
    response = httpx2.post(f"{url}{COMPLETIONS}", json=body, timeout=120, trust_env=False)
    response.raise_for_status()
    reply = response.json()
    return reply["choices"][0], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def _reported(url: str) -> int:
    """How many checkpoints the server says are on disk."""
    found = httpx2.get(f"{url}/v1/cache", timeout=120, trust_env=False).json()
    return int(found["disk"]["checkpoints"])


def _compare(account: ServerAccount, cold: Any, reply: Any) -> None:
    account.replies += 1
    if reply != cold:
        account.faults.append(f"a reply differs: {reply} instead of {cold}")
