"""What a model wrote as a call in a format that only mlx-lm reads: here, or in a process of its own.

mlx-lm's parsers take time that is quadratic, or worse, in texts that are none of their calls: 2,000
times the letter a take minicpm5 a second, four times as many 16. While a regular expression runs no
other thread does, so long texts are read in a process, which the system ends after its time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from contextlib import suppress
from importlib import util
from pathlib import Path
from typing import Any

from ..log import CLIENTS
from . import reader_process as call_reader
from .reader_process import Calls, Parser, called

log = logging.getLogger(CLIENTS)

SHORT = 256
"""Characters that take any parser a few milliseconds at most."""

CPU_SECONDS: float = 5
"""For one text. Calls as they should be take milliseconds, with a megabyte of arguments."""

WALL_SECONDS = 60
"""In case that the machine is so busy that a process does not get its time."""


async def read(parse: Parser, text: str, tools: list[dict[str, Any]] | None) -> Calls | None:
    """The calls in `text`, or None when it is none, or none that could be read in time."""
    if len(text) <= SHORT:
        return called(parse, text, tools)
    try:
        answer = await _asked(parse, json.dumps({"text": text, "tools": tools}).encode())
    except OSError as error:
        log.warning("A call could not be read, and stays text: %s.", error)
        return None
    if answer is None:
        log.warning(
            "A call of %d characters could not be read within %g s; it stays text.",
            len(text),
            CPU_SECONDS,
        )
        return None
    found: Calls | None = json.loads(answer)
    return found


async def _asked(parse: Parser, question: bytes) -> bytes | None:
    """What a process answers; None when it did not come to an answer."""
    package = util.find_spec(parse.__module__.partition(".")[0])
    places = list(package.submodule_search_locations or ()) if package is not None else []
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # this folder has names that others have as well
        "-c",
        f"import sys; sys.path.insert(0, sys.argv[1]); from {call_reader.__name__} import main; main()",
        str(Path(__file__).parents[1]),
        str(CPU_SECONDS),
        parse.__module__,
        parse.__name__,
        *places,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        close_fds=False,  # so that nothing of a large process is copied; ours are not inherited
    )
    try:
        async with asyncio.timeout(WALL_SECONDS):
            answer, _ = await process.communicate(question)
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return answer if process.returncode == 0 else None
