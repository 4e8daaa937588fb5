"""`python -m mlx_hybridcache_bench.afternoon DIR`: pictures of the page behind an afternoon's mixed traffic.

Six clients of the kinds that local servers have hold a hundred conversations with a server of its
own, all at once: chats with their titles, a coding agent, questions about documents, an editor that
completes, an assistant whose system prompt names the time, and records of which fields are wanted.
Then a headless Chromium takes the page in light, in dark and on a phone.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
from mlx_lm.tokenizer_utils import load as load_tokenizer
from PIL import Image

from mlx_hybridcache import HybridCacheError
from mlx_hybridcache.demo import BUNDLED_MODEL

from .kit.chromium import launched, missing
from .serving.client import CHAT, COMPLETIONS, Message
from .serving.scenarios import Material
from .serving.servers import OURS, Launch, ServerProcess

TIMEOUT_SECONDS = 300.0
CLIENTS = 6
"""At once."""

INSTANT = {"chat_template_kwargs": {"enable_thinking": False}}
WIDTH, HEIGHT = 1180, 900
SHOTS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": WIDTH, "height": HEIGHT}, "color_scheme": "light"},
    "dark": {"viewport": {"width": WIDTH, "height": HEIGHT}, "color_scheme": "dark"},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "color_scheme": "light",
        "is_mobile": True,
        "has_touch": True,
    },
}
TALLEST = {"light": 1480, "dark": 1480, "phone": 1980}
"""Pixels of each picture; what stands further down looks like what is above it."""

QUESTIONS = (
    "How do I sort a list of dictionaries by two keys?",
    "Explain the difference between a process and a thread.",
    "Write a short thank-you note to a colleague who is leaving.",
    "What should I cook with leeks, potatoes and an egg?",
    "Why is the sky blue in the day and red in the evening?",
    "Suggest three names for a small bakery by the sea.",
    "How does a heat pump work in winter?",
    "Translate this sentence into French: the train is late again.",
    "What is a good first telescope for a ten-year-old?",
    "Summarise the plot of Moby-Dick in two sentences.",
)
FOLLOWING = "Can you say that in one sentence?", "Why is that?", "Give me an example.", "And then?"
ASKED = "What is it about?", "Which rule does it state?", "Give an example.", "Who has to read it?"

Post = Callable[..., Message]
Conversation = Callable[[Post], object]


def conversations(material: Material) -> list[Conversation]:
    """A hundred, of six kinds and in an order that mixes them, the same ones each time."""
    kinds = (
        *((_chat, 30), (_agent, 8), (_document, 20)),
        *((_completion, 20), (_assistant, 12), (_record, 10)),
    )
    found = [make(material, number) for make, count in kinds for number in range(count)]
    random.Random(18).shuffle(found)
    return found


def _chat(material: Material, number: int) -> Conversation:
    """One to four turns, and behind the first a title, as chat windows ask for one."""

    def hold(post: Post) -> None:
        messages = [_message("system", "You are a helpful assistant.")]
        question = f"{QUESTIONS[number % len(QUESTIONS)]}" + (f" ({number})" if number > 9 else "")
        for turn in range(1 + number % 4):
            messages.append(_message("user", question if turn == 0 else FOLLOWING[turn]))
            messages.append(post(CHAT, messages=messages, max_tokens=12, **INSTANT))
            if turn == 0 and number % 3 == 0:
                task = f"### Task:\nGenerate a concise title for this chat.\n### Chat:\n{question}"
                post(CHAT, messages=[_message("user", task)], max_tokens=4, **INSTANT)

    return hold


def _agent(material: Material, number: int) -> Conversation:
    """A long system prompt with tools, and a loop of calls and results; it thinks."""
    system = f"You are a coding agent working in a terminal.\n{material.text(700)}"
    tools = [_tool("read_file", "path"), _tool("run", "command"), _tool("search", "pattern")]

    def hold(post: Post) -> None:
        task = f"Task {number + 1}: {material.text(30, 5_000 + 100 * number)}"
        messages = [_message("system", system), _message("user", task)]
        for step in range(2 + number % 3):
            post(CHAT, messages=messages, tools=tools, max_tokens=8)
            call = {"name": "read_file", "arguments": json.dumps({"path": f"src/{step}.py"})}
            told = {"id": f"call_{step}", "type": "function", "function": call}
            found = material.text(90, 7_000 + 400 * number + 90 * step)
            messages.append({"role": "assistant", "content": "", "tool_calls": [told]})
            messages.append({"role": "tool", "tool_call_id": told["id"], "content": found})

    return hold


def _document(material: Material, number: int) -> Conversation:
    """Four questions about each of five documents."""
    text = material.text(420, 1_000 * (number // 4) + 900)

    def hold(post: Post) -> None:
        asked = f"Use this document:\n\n{text}\n\n{ASKED[number % 4]}"
        post(CHAT, messages=[_message("user", asked)], max_tokens=8, **INSTANT)

    return hold


def _completion(material: Material, number: int) -> Conversation:
    """Raw text of four files, of which more has been written each time."""
    text = material.text(150 + 45 * (number // 4), 9_000 + 600 * (number % 4))
    return lambda post: post(COMPLETIONS, prompt=text, max_tokens=8)


def _assistant(material: Material, number: int) -> Conversation:
    """A system prompt in which the time stands first, so that nothing behind it is known."""
    system = f"The time is {9 + number}:15. You are a home assistant.\n{material.text(160, 400)}"
    messages = [_message("system", system), _message("user", "Is a window open?")]
    return lambda post: post(CHAT, messages=messages, max_tokens=6, **INSTANT)


def _record(material: Material, number: int) -> Conversation:
    """A short record behind instructions that stay, under the salt of a tenant."""
    rules = f"Extract name, date and amount as JSON.\n{material.text(120, 300)}"
    record = f"Invoice {number}: {material.text(40, 11_000 + 60 * number)}"
    messages = [_message("system", rules), _message("user", record)]
    return lambda post: post(
        CHAT, messages=messages, max_tokens=6, cache_salt="tenant-7", **INSTANT
    )


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _tool(name: str, argument: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def hold(url: str, every: Sequence[Conversation]) -> int:
    """As many at once as there are clients; how many requests were answered. None may fail."""
    answered: list[str] = []
    with httpx2.Client(base_url=url, timeout=TIMEOUT_SECONDS, trust_env=False) as http:

        def post(path: str, **body: Any) -> Message:
            reply = http.post(path, json={"temperature": 0, **body})
            reply.raise_for_status()
            answered.append(reply.json()["id"])
            message = reply.json()["choices"][0].get("message") or {}
            return _message("assistant", message.get("content") or "")

        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda conversation: conversation(post), every))
    return len(answered)


def take(url: str, folder: Path, names: Sequence[str] = tuple(SHOTS)) -> Iterator[Path]:
    """The page in each of its looks, as a person finds it who has just opened it."""
    with launched() as browser:
        for name in names:
            context = browser.new_context(**SHOTS[name])
            page = context.new_page()
            page.goto(url)
            page.wait_for_selector("#main:not([hidden]) #tree li")
            page.wait_for_timeout(1_500)
            height = page.evaluate("document.documentElement.scrollHeight")
            wide = SHOTS[name]["viewport"]["width"]
            clip = {"x": 0, "y": 0, "width": wide, "height": min(height, TALLEST[name])}
            path = folder / f"page-{name}.png"
            page.screenshot(path=str(path), full_page=True, clip=clip)
            # 256 colours are all that the page has, and a third of the bytes; the rare ones must stay.
            with Image.open(path) as taken:
                few = taken.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
            few.save(path, optimize=True)
            context.close()
            yield path


def main(argv: Sequence[str] | None = None) -> int:
    """Start, hold, take, stop."""
    parser = argparse.ArgumentParser(prog="afternoon", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="(default: the bundled model)")
    parser.add_argument("--hide-prompts", action="store_true", help="without --show-prompts")
    args = parser.parse_args(argv)
    if why := missing():
        raise HybridCacheError(f"There is nothing to take pictures with: {why}.")
    args.folder.mkdir(parents=True, exist_ok=True)
    material = Material(load_tokenizer(Path(args.model)), 13_000)
    with TemporaryDirectory() as kept:
        flags = ["--cache-dir", kept, *([] if args.hide_prompts else ["--show-prompts"])]
        with ServerProcess(Launch.of(OURS, args.model, flags)) as server:
            server.wait_ready()
            began = time.monotonic()
            requests = hold(server.url, conversations(material))
            print(f"{requests} requests in {time.monotonic() - began:.0f} s")
            for path in take(server.url, args.folder):
                print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
