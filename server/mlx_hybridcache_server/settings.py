"""What the command line says: mlx_lm.server's flags under their own names, llama.cpp's, and ours."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlx_hybridcache.cli.flags import size, tokens
from mlx_hybridcache.cli.versions import versions
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.errors import SettingError
from mlx_hybridcache.router.defaults import AUTO

API_KEY_VARIABLE = "MLX_HYBRIDCACHE_API_KEY"

LARGEST_BODY = "64MiB"

QUANTIZED_KV_START = 5000
"""mlx-lm's own default. Not imported from there: `--help` needs no MLX."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One server's settings. Sizes are bytes, lengths tokens; None means no limit or no default."""

    model: str = str(BUNDLED_MODEL)
    aliases: tuple[str, ...] = ()
    adapter_path: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    draft_model: str | None = None
    num_draft_tokens: int = 3
    trust_remote_code: bool = False
    log_level: str = "INFO"
    chat_template: str = ""
    use_default_chat_template: bool = False
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    decode_concurrency: int = 32
    prompt_concurrency: int = 8
    prefill_step_size: int = 2048
    prompt_cache_size: int | None = None
    memory_budget: int | None = None
    memory_reserve: int | None = None
    cache_dir: str | None = None
    disk_budget: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = QUANTIZED_KV_START
    api_key: str | None = None
    max_prompt_tokens: int | None = None
    context_length: int | None = None
    max_thinking_tokens: int | None = None
    max_body_bytes: int = 64 * 2**20
    max_queue: int = 512
    request_timeout: float | None = None
    keepalive_seconds: float = 5.0
    exact: bool = False
    show_prompts: bool = False
    record_trace: str | None = None
    allow_model_switching: bool = False
    checkpoint_every: int = 2048
    checkpoint_min_step: int = 512
    max_checkpoints: int | None = None
    swa_full: bool = False
    canonicalize_router: str | None = None

    @property
    def uses_cache(self) -> bool:
        """Whether anything is kept between requests."""
        return self.prompt_cache_size != 0 and self.memory_budget != 0

    def generation_options(self) -> dict[str, Any]:
        """The options of `mlx_lm.stream_generate` that hold for every request."""
        if self.kv_bits is None:
            return {}
        return {
            "kv_bits": self.kv_bits,
            "kv_group_size": self.kv_group_size,
            "quantized_kv_start": self.quantized_kv_start,
        }


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The parser of both entry points. Names and defaults of mlx_lm.server's flags are its own."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--model MODEL] [--port PORT] [...], --help lists every flag",
        description="Serve a model over HTTP as OpenAI does, re-using every prefix that was read.",
    )
    parser.add_argument("--version", action="version", version=versions())
    _add_mlx_lm_flags(parser)
    _add_own_flags(parser)
    return parser


def _add_mlx_lm_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("as in mlx_lm.server").add_argument
    add("--model", help="directory, or owner/name (default: the small bundled model)")
    add("--adapter-path", help="trained adapter weights and their config")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=_number(int, 0, 65535), default=8080, help="port (%(default)s)")
    add(
        "--allowed-origins",
        type=_origins,
        help="origins, separated by commas, whose pages may call beside this machine's; * for all",
    )
    add("--draft-model", help="model for speculative decoding; requests are served uncached")
    add("--num-draft-tokens", type=_number(int, 0), default=3, help="(%(default)s)")
    add("--trust-remote-code", action="store_true", help="run code from the model's directory")
    add(
        "--log-level",
        default="INFO",
        choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
        help="DEBUG shows prompts (%(default)s)",
    )
    add("--chat-template", default="", help="a chat template for the tokenizer")
    add("--use-default-chat-template", action="store_true", help="where the tokenizer has none")
    add("--temp", type=_number(float, 0), default=0.0, help="default temperature (%(default)s)")
    add("--top-p", type=_number(float, 0, 1), default=1.0, help="default top-p (%(default)s)")
    add("--top-k", type=_number(int, 0), default=0, help="default top-k (%(default)s: off)")
    add("--min-p", type=_number(float, 0, 1), default=0.0, help="default min-p (%(default)s: off)")
    add(
        "--max-tokens",
        type=tokens(),
        help="of a reply whose request does not say (default: as many as fit)",
    )
    add(
        "--chat-template-args",
        type=_template_args,
        default="{}",
        help="JSON arguments for the chat template, as '{\"enable_thinking\":false}'",
    )
    add(
        "--decode-concurrency",
        type=_number(int, 1),
        default=32,
        help="requests that run at once; the others wait (%(default)s)",
    )
    add(
        "--prompt-concurrency",
        type=_number(int, 1),
        default=8,
        help="of these, how many read their prompts at once (%(default)s)",
    )
    add(
        "--prefill-step-size",
        type=tokens(),
        default=2048,
        help="tokens that one forward reads (%(default)s)",
    )
    add(
        "--prompt-cache-size",
        type=_number(int, 0),
        help="most conversations kept; 0 turns the cache off (default: as many as fit)",
    )
    add("--prompt-cache-bytes", type=size, help="for the cache and running requests, as 16GB")
    add("--kv-bits", type=_number(int, 1), help="quantize keys and values; served uncached")
    add("--kv-group-size", type=_number(int, 1), default=64, help="(%(default)s)")
    add(
        "--quantized-kv-start",
        type=tokens(0),
        default=QUANTIZED_KV_START,
        help="(%(default)s)",
    )
    add("--pipeline", action="store_true", help="for several machines, which are not supported yet")


def _add_own_flags(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("our own").add_argument
    own("--api-key", help=f"key that clients must send (or in ${API_KEY_VARIABLE})")
    own(
        "--alias",
        action="append",
        type=_alias,
        default=[],
        metavar="NAME",
        help="a name for the model of --model, in requests and replies; may be given several times",
    )
    own(
        "--allowed-hosts",
        type=_names,
        help="names, separated by commas, under which the server is asked for beside its own; * for all",
    )
    own("--max-prompt-tokens", type=tokens(), help="longer prompts are refused")
    own(
        "--context-length",
        type=tokens(0),
        help="tokens of a prompt and its reply; 0: no limit (default: the model's)",
    )
    own(
        "--max-thinking-tokens",
        type=tokens(0),
        help="of reasoning, which is then ended, and the reply goes on",
    )
    own("--max-body-bytes", type=size, default=LARGEST_BODY, help="of a request (%(default)s)")
    own("--max-queue", type=_number(int, 0), default=512, help="requests that wait (%(default)s)")
    own("--request-timeout", type=_number(float, 0.001), help="seconds until one is given up")
    own(
        "--keepalive-seconds",
        type=_number(float, 0.001),
        default=5.0,
        help="a stream that says nothing for so long sends a comment (%(default)s)",
    )
    own("--exact", action="store_true", help="equal bits hot and cold on every device")
    own("--memory-reserve", type=size, help="of the system's memory to leave free, as 1GB")
    own("--cache-dir", help="directory that keeps the cache across restarts")
    own("--cache-disk-bytes", type=size, help="for that directory, as 100GB")
    own(
        "--canonicalize-router",
        metavar="FILE|auto",
        help="one router row for experts that are one: a patch, or what lies with the model or is found",
    )
    own("--show-prompts", action="store_true", help="let /v1/cache/recent and the page show text")
    own("--record-trace", metavar="FILE", help="record requests, hashed, for bench policies")
    own("--allow-model-switching", action="store_true", help="load what a request names")
    known = parser.add_argument_group("as in llama.cpp").add_argument
    known("--ctx-checkpoints", type=_number(int, 1), help="most checkpoints on one path")
    known("--checkpoint-every-n-tokens", type=tokens(), default=2048, help="(%(default)s)")
    known("--checkpoint-min-step", type=tokens(), default=512, help="(%(default)s)")
    known("--cache-ram", type=_mebibytes, help="MiB, or a size as 16GB; like --prompt-cache-bytes")
    known("--swa-full", action="store_true", help="keep every row of sliding windows")
    known("--slot-prompt-similarity", type=float, help="accepted; a prefix tree needs none")


def read_settings(parser: argparse.ArgumentParser, argv: list[str] | None) -> Settings:
    """The settings that `argv` names. Raises `SettingError` for what cannot be honoured."""
    args = parser.parse_args(argv)
    budget = args.prompt_cache_bytes
    if args.cache_ram is not None:
        if budget is not None and budget != args.cache_ram:
            raise SettingError(
                "--prompt-cache-bytes and --cache-ram name different sizes; give one of them."
            )
        budget = args.cache_ram
    if args.adapter_path is not None and args.model is None:
        raise SettingError("--adapter-path needs the --model that it was trained for.")
    if args.cache_disk_bytes is not None and args.cache_dir is None:
        raise SettingError("--cache-disk-bytes needs the --cache-dir that it bounds.")
    _check_router(args.canonicalize_router)
    own_names = {
        "api_key": args.api_key or os.environ.get(API_KEY_VARIABLE) or None,
        "model": args.model or str(BUNDLED_MODEL),
        "aliases": tuple(args.alias),
        "allowed_hosts": tuple(args.allowed_hosts or ()),
        "allowed_origins": tuple(args.allowed_origins or ()),
        "memory_budget": budget,
        "disk_budget": args.cache_disk_bytes,
        "checkpoint_every": args.checkpoint_every_n_tokens,
        "max_checkpoints": args.ctx_checkpoints,
    }
    same_names = set(Settings.__dataclass_fields__) & set(vars(args)) - set(own_names)
    return Settings(**own_names, **{name: getattr(args, name) for name in same_names})


def _check_router(router: str | None) -> None:
    if router is None:
        return
    if router != AUTO and not Path(router).expanduser().is_file():
        raise SettingError(
            f"--canonicalize-router {router}: there is no such file. Name a router patch, or auto."
        )


def _origins(text: str) -> list[str]:
    """As browsers write them: in small letters, without a slash at the end."""
    origins = [origin.strip().rstrip("/").lower() for origin in text.split(",")]
    for origin in origins:
        try:
            urlsplit(origin)
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{origin!r} is no origin, such as https://example.org: {error}."
            ) from error
    return origins


def _alias(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is no name, such as qwen3-next.")
    return text


def _names(text: str) -> list[str]:
    names = [name.strip().strip("[]") for name in text.split(",")]
    for name in names:
        if not re.fullmatch(r"[\w.:-]+|\*", name):
            raise argparse.ArgumentTypeError(
                f"{name!r} is no host's name, such as box.example or 192.168.1.5: "
                "leave out http:// and the port."
            )
    return names


def _number(kind: Callable[[str], Any], low: float, high: float | None = None) -> Any:
    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError as error:
            whole = "whole " * (kind is int)
            raise argparse.ArgumentTypeError(f"{text!r} is no {whole}number.") from error
        if not low <= value < float("inf") or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}.")
        return value

    return number


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
