"""The flags: mlx_lm.server's under their own names, ours, and llama.cpp's; what each value must be."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from mlx_hybridcache.cli.flags import size, tokens

API_KEY_VARIABLE = "MLX_HYBRIDCACHE_API_KEY"

LARGEST_BODY = "64MiB"

Flag = tuple[str, dict[str, Any]]
"""Its name, and what `add_argument` is told of it."""


def _name(text: str) -> str:
    """What is not empty. A start script whose variable is not set gives a flag nothing."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give it a value, or leave it out.")
    return text


def _origins(text: str) -> tuple[str, ...]:
    """As browsers write them: in small letters, without a slash at the end."""
    origins = [origin.strip().rstrip("/").lower() for origin in text.split(",")]
    for origin in origins:
        try:
            urlsplit(origin)
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{origin!r} is no origin, such as https://example.org: {error}."
            ) from error
    return tuple(origins)


def _alias(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is no name, such as qwen3-next.")
    return text


def _names(text: str) -> tuple[str, ...]:
    names = [name.strip().strip("[]") for name in text.split(",")]
    for name in names:
        if not re.fullmatch(r"[\w.:-]+|\*", name):
            raise argparse.ArgumentTypeError(
                f"{name!r} is no host's name, such as box.example or 192.168.1.5: "
                "leave out http:// and the port."
            )
    return tuple(names)


def _number(kind: Callable[[str], Any], low: float, high: float | None = None) -> Any:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError as error:
            whole = "whole " * (kind is int)
            raise argparse.ArgumentTypeError(f"{text!r} is no {whole}number.") from error
        if not low <= value < float("inf") or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}.")
        return value

    return read


def _mebibytes(text: str) -> int | None:
    """llama.cpp's own reading: a bare number is MiB, and -1 sets no limit of its own."""
    if text == "-1":
        return None
    is_bare = text.isascii() and text.isdigit()
    return int(text) * 2**20 if is_bare else size(text)


def _template_args(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object.")
    if taken := found and _taken(found):
        raise argparse.ArgumentTypeError(f"the chat template's {', '.join(taken)} cannot be set.")
    return found


def _taken(found: dict[str, Any]) -> list[str]:
    """Those that the tokenizer's own method has. Only it knows them, and it takes a second to import."""
    from .adapter import TAKEN

    return sorted(TAKEN & found.keys())


def _flag(name: str, kind: Callable[[str], Any], about: str, **more: Any) -> Flag:
    """`kind` reads what is given; bool is a switch. `dest` is the field of `Settings`, where it is another."""
    if kind is bool:
        return name, {"action": "store_true", "help": about}
    if "dest" in more:
        more.setdefault("metavar", name.strip("-").upper().replace("-", "_"))
    return name, {"type": kind, "help": about, **more}


FLAGS: dict[str, tuple[Flag, ...]] = {
    "as in mlx_lm.server": (
        _flag("--model", _name, "directory, or owner/name (default: the small bundled model)"),
        _flag("--adapter-path", _name, "trained adapter weights and their config"),
        _flag("--host", str, "address to listen on (%(default)s)"),
        _flag("--port", _number(int, 0, 65535), "port (%(default)s)"),
        _flag(
            "--allowed-origins",
            _origins,
            "origins, separated by commas, whose pages may call beside this machine's; * for all",
        ),
        _flag(
            "--draft-model",
            _name,
            "model that drafts replies for this one to verify: same tokenizer, its own prompts cached too",
        ),
        _flag("--num-draft-tokens", _number(int, 0), "drafted at a time, at most (%(default)s)"),
        _flag("--trust-remote-code", bool, "run code from the model's directory"),
        _flag(
            "--log-level",
            str,
            "DEBUG shows prompts (%(default)s)",
            choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
        ),
        _flag("--chat-template", str, "a chat template for the tokenizer"),
        _flag("--use-default-chat-template", bool, "where the tokenizer has none"),
        _flag("--temp", _number(float, 0), "default temperature (%(default)s)"),
        _flag("--top-p", _number(float, 0, 1), "default top-p (%(default)s)"),
        _flag("--top-k", _number(int, 0), "default top-k (%(default)s: off)"),
        _flag("--min-p", _number(float, 0, 1), "default min-p (%(default)s: off)"),
        _flag(
            "--max-tokens",
            tokens(),
            "of a reply whose request does not say (default: as many as fit)",
        ),
        _flag(
            "--chat-template-args",
            _template_args,
            "JSON arguments for the chat template, as '{\"enable_thinking\":false}'",
        ),
        _flag(
            "--decode-concurrency",
            _number(int, 1),
            "requests that run at once; the others wait (%(default)s)",
        ),
        _flag(
            "--prompt-concurrency",
            _number(int, 1),
            "of these, how many read their prompts at once (%(default)s)",
        ),
        _flag("--prefill-step-size", tokens(), "tokens that one forward reads (%(default)s)"),
        _flag(
            "--prompt-cache-size",
            _number(int, 0),
            "most conversations kept; 0 turns the cache off (default: as many as fit)",
        ),
        _flag(
            "--prompt-cache-bytes",
            size,
            "for the cache and running requests, as 16GB",
            dest="memory_budget",
        ),
        _flag("--kv-bits", _number(int, 1), "quantize keys and values to so many bits"),
        _flag("--kv-group-size", _number(int, 1), "elements with one scale (%(default)s)"),
        _flag("--quantized-kv-start", tokens(0), "prompts up to here are not (%(default)s)"),
        _flag(
            "--pipeline",
            bool,
            "on several machines each has some of the layers, else a part of each",
        ),
    ),
    "our own": (
        _flag(
            "--config",
            _name,
            "a TOML file of flags without their dashes; variables MLX_HYBRIDCACHE_FLAG come before "
            "it, and flags before both",
            metavar="FILE",
        ),
        _flag("--api-key", _name, f"key that clients must send (or in ${API_KEY_VARIABLE})"),
        _flag(
            "--alias",
            _alias,
            "a name for the model of --model, in requests and replies; may be given several times",
            action="append",
            metavar="NAME",
            dest="aliases",
        ),
        _flag(
            "--allowed-hosts",
            _names,
            "names, separated by commas, under which the server is asked for beside its own; * for all",
        ),
        _flag(
            "--store-kv",
            int,
            "bits of stored keys and values; replies may differ (default: as computed)",
            choices=[8, 4],
        ),
        _flag(
            "--store-state",
            str,
            "stored recurrent states; replies may differ (default: as computed)",
            choices=["int8"],
        ),
        _flag("--max-prompt-tokens", tokens(), "longer prompts are refused"),
        _flag(
            "--context-length",
            tokens(0),
            "tokens of a prompt and its reply; 0: no limit (default: the model's)",
        ),
        _flag(
            "--max-thinking-tokens",
            tokens(0),
            "of reasoning, which is then ended, and the reply goes on",
        ),
        _flag("--max-body-bytes", size, f"of a request ({LARGEST_BODY})"),
        _flag("--max-queue", _number(int, 0), "requests that wait (%(default)s)"),
        _flag("--request-timeout", _number(float, 0.001), "seconds until one is given up"),
        _flag(
            "--keepalive-seconds",
            _number(float, 0.001),
            "a stream that says nothing for so long sends a comment (%(default)s)",
        ),
        _flag(
            "--stable-prefix",
            str,
            "mark: a checkpoint before the first line that changes, as a date; move: such lines of the "
            "system prompt stand at the prompt's end (default: mark for Messages, else off)",
            choices=["off", "mark", "move"],
            nargs="?",
            const="mark",
        ),
        _flag(
            "--canonical-tools", bool, "tools and their keys in one order, however they are sent"
        ),
        _flag(
            "--idle-unload",
            _number(float, 0),
            "seconds without a request after which the model is let go, with its cache in --cache-dir, "
            "until the next one; a request's keep_alive says otherwise",
            metavar="SECONDS",
        ),
        _flag("--exact", bool, "equal bits hot and cold on every device"),
        _flag("--draft-from-cache", bool, "verify what followed before, several tokens at a time"),
        _flag("--draft-mtp", bool, "verify what the mtp.* weights beside the model's own draft"),
        _flag("--memory-reserve", size, "of the system's memory to leave free, as 1GB"),
        _flag("--cache-dir", _name, "directory that keeps the cache across restarts"),
        _flag("--cache-disk-bytes", size, "for that directory, as 100GB", dest="disk_budget"),
        _flag(
            "--canonicalize-router",
            _name,
            "one router row for experts that are one: a patch, or what lies with the model or is found",
            metavar="FILE|auto",
        ),
        _flag("--show-prompts", bool, "let /v1/cache/recent and the page show text"),
        _flag(
            "--record-trace", _name, "record requests, hashed, for bench policies", metavar="FILE"
        ),
        _flag("--allow-model-switching", bool, "load what a request names"),
    ),
    "as in llama.cpp": (
        _flag(
            "--ctx-checkpoints",
            _number(int, 1),
            "most checkpoints on one path",
            dest="max_checkpoints",
        ),
        _flag("--checkpoint-every-n-tokens", tokens(), "(%(default)s)", dest="checkpoint_every"),
        _flag("--checkpoint-min-step", tokens(), "(%(default)s)"),
        _flag("--cache-ram", _mebibytes, "MiB, or a size as 16GB; like --prompt-cache-bytes"),
        _flag("--swa-full", bool, "keep every row of sliding windows"),
        _flag("--slot-prompt-similarity", float, "accepted; a prefix tree needs none"),
    ),
}
