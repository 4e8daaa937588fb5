"""The trace of `--record-trace`: what was asked and answered, without a token of it.

`mlx-hybridcache bench policies` replays such traces. A file is JSON lines. The first says
`{"format": "mlx_hybridcache trace 1"}`, every other one tells of a request that was read:

* `t`: seconds from the beginning of the recording to that of the request. Lines are in the order in
  which requests ended.
* `conversation`: null; a server does not know them.
* `tokens`: a number for each token of the prompt. Number i is a keyed hash, 32 bits, of the
  namespace and tokens [0, i]: equal numbers at i mean equal prefixes, and nothing else can be learnt.
* `turns`: the positions just behind the tokens that open a turn.
* `reply`: the number of tokens generated; `reply_tokens`: their numbers, which go on behind the
  prompt's, so that a next turn is known by them.
* `keeps_reply`: whether the next turn's history holds the whole reply.

The key is drawn anew for each recording and written nowhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import secrets
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, TypeVar

from mlx_lm.generate import GenerationResponse

from mlx_hybridcache.cache import Through
from mlx_hybridcache.errors import SettingError
from mlx_hybridcache.request.info import CacheInfo
from mlx_hybridcache.tokens import Namespace, Tokens, TurnMarks
from mlx_hybridcache.worker.turns import Pause

log = logging.getLogger("mlx_hybridcache.server")

HEADER = b'{"format": "mlx_hybridcache trace 1"}\n'

MOST_WAITING = 64
"""Requests that may wait to be written; more are left out, so that a slow disk costs no memory."""

AT_ONCE = 1024
"""Tokens hashed before the thread that runs the model may go on: less than a millisecond."""

CLOSING_SECONDS = 10

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Served:
    """A request as its end left it. `began` is `time.monotonic()`; the ids are shared, not copied."""

    began: float
    namespace: Namespace
    marks: TurnMarks
    tokens: Tokens
    reply: Sequence[int] = ()

    @classmethod
    def now(cls, info: CacheInfo, tokens: Tokens, salt: str | None) -> Self:
        """A request that begins at this moment."""
        namespace = Namespace(info.settings, salt or "")
        return cls(time.monotonic(), namespace, info.marks, tokens)

    def line(self, key: bytes, since: float) -> bytes:
        """Its line, for a recording that began at `since`."""
        chain = hashlib.blake2b(json.dumps(self.namespace).encode(), digest_size=4, key=key)
        told = {
            "t": round(max(0.0, self.began - since), 3),
            "conversation": None,
            "tokens": _numbers(chain, self.tokens.tolist()),
            "turns": self.marks.starts(self.tokens),
            "reply": len(self.reply),
            "keeps_reply": not self.marks.strips(self.reply, self.tokens),
            "reply_tokens": _numbers(chain, self.reply),
        }
        return json.dumps(told, separators=(",", ":")).encode() + b"\n"


def _numbers(chain: hashlib.blake2b, tokens: Sequence[int]) -> list[int]:
    """The chain's value behind each token; `chain` then stands behind the last."""
    found = []
    for index, token in enumerate(tokens):
        chain.update(token.to_bytes(4, "little"))
        found.append(int.from_bytes(chain.copy().digest(), "little"))
        if index % AT_ONCE == AT_ONCE - 1:
            time.sleep(0)
    return found


class Recorder:
    """Appends what it is handed to a file, on a thread of its own. No request waits for it.

    Raises `SettingError` for a file that cannot be made, or that holds requests already: their
    numbers were made with another key.
    """

    def __init__(self, path: str):
        self.path = path
        self._file = _opened(path)
        self._key = secrets.token_bytes(32)
        self._since = time.monotonic()
        self._waiting: queue.Queue[Served | None] = queue.Queue(MOST_WAITING)
        self._has_stopped = False
        self._left_out = 0
        self._thread = threading.Thread(target=self._write, name="record-trace", daemon=True)
        self._thread.start()

    def put(self, served: Served) -> None:
        """Hand a request over, from any thread. Never waits and never fails."""
        if self._has_stopped:
            return
        try:
            self._waiting.put_nowait(served)
        except queue.Full:
            if not self._left_out:
                log.warning("%s is written too slowly; some requests are left out.", self.path)
            self._left_out += 1

    def watching(self, through: Through[T], served: Served) -> Through[T]:
        """`through`, and `served` handed over with its reply when that ends, cancelled or not.

        A request of which nothing was generated was not read to its end and is left out.
        """

        def watched(responses: Iterator[GenerationResponse | Pause]) -> Iterator[T | Pause]:
            reply: list[int] = []
            try:
                yield from through(_noted(responses, reply))
            finally:
                if reply:
                    self.put(replace(served, reply=reply))

        return watched

    def close(self) -> None:
        """Write what waits. Gives up on a disk that does not answer."""
        with suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSING_SECONDS)
            self._thread.join(CLOSING_SECONDS)
        if self._left_out:
            log.warning("%s lacks %d requests.", self.path, self._left_out)

    def _write(self) -> None:
        try:
            while (served := self._waiting.get()) is not None:
                _append(self._file, served.line(self._key, self._since))
        except OSError as error:
            log.error(  # noqa: TRY400  # its trace would say nothing more
                "The recording of requests ends: %s: %s.", self.path, error.strerror
            )
        except Exception:
            log.exception("The recording of requests ends.")
        finally:
            self._has_stopped = True
            os.close(self._file)


def _noted(
    responses: Iterator[GenerationResponse | Pause], reply: list[int]
) -> Iterator[GenerationResponse | Pause]:
    for response in responses:
        if not isinstance(response, Pause):
            reply.append(response.token)
        yield response


def _opened(path: str) -> int:
    """A file for this user alone, with its first line."""
    try:
        # A pipe that nobody reads would hold the start up for ever.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK
        file = os.open(Path(path).expanduser(), flags, 0o600)
        try:
            why = _unsuitable(file)
            if why is None:
                os.fchmod(file, 0o600)
                os.ftruncate(file, 0)
                _append(file, HEADER)
                return file
        except OSError:
            os.close(file)
            raise
    except OSError as error:
        why = f"it cannot be written ({error.strerror})"
    else:
        os.close(file)
    raise SettingError(f"--record-trace {path}: {why}. Name a new file, or remove this one.")


def _unsuitable(file: int) -> str | None:
    """Why an open file cannot become a recording. One in which nothing was recorded can."""
    if not stat.S_ISREG(os.fstat(file).st_mode):
        return "it is no regular file"
    if os.read(file, len(HEADER) + 1) not in (b"", HEADER):
        return "it is not empty, and a recording cannot be continued, as its key is gone"
    return None


def _append(file: int, line: bytes) -> None:
    """All of `line` or nothing: a file on a full disk still ends with a whole line."""
    end, written = os.fstat(file).st_size, 0
    try:
        while written < len(line):
            written += os.write(file, line[written:])
    except OSError:
        os.ftruncate(file, end)
        raise
