"""What the command line says. Each default stands here, once."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_hybridcache.caches.quantizing.precision import Precision
from mlx_hybridcache.cli.flags import Parser
from mlx_hybridcache.cli.versions import versions
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.errors import SettingError
from mlx_hybridcache.router.defaults import AUTO
from mlx_hybridcache.sizes import parse_bytes

from .configured import completed
from .flags import FLAGS, LARGEST_BODY

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
    pipeline: bool = False
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
    max_body_bytes: int = parse_bytes(LARGEST_BODY)
    max_queue: int = 512
    request_timeout: float | None = None
    keepalive_seconds: float = 5.0
    stable_prefix: str | None = None
    canonical_tools: bool = False
    idle_unload: float | None = None
    exact: bool = False
    draft_from_cache: bool = False
    draft_mtp: bool = False
    show_prompts: bool = False
    record_trace: str | None = None
    allow_model_switching: bool = False
    checkpoint_every: int = 2048
    checkpoint_min_step: int = 512
    max_checkpoints: int | None = None
    swa_full: bool = False
    store_kv: int | None = None
    store_state: str | None = None
    canonicalize_router: str | None = None

    @property
    def uses_cache(self) -> bool:
        """Whether anything is kept between requests."""
        return self.prompt_cache_size != 0 and self.memory_budget != 0

    def generation_options(self) -> dict[str, Any]:
        """The options of `mlx_lm.stream_generate` that hold for every request.

        The cache is made with the same ones, but mlx-lm drafts on caches of its own.
        """
        if self.kv_bits is None or self.draft_model is None:
            return {}
        return {
            "kv_bits": self.kv_bits,
            "kv_group_size": self.kv_group_size,
            "quantized_kv_start": self.quantized_kv_start,
        }


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The parser of both entry points. Names and defaults of mlx_lm.server's flags are its own."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s [--model MODEL] [--port PORT] [...], --help lists every flag",
        description="Serve a model over HTTP as OpenAI does, re-using every prefix that was read.",
    )
    parser.add_argument("--version", action="version", version=versions())
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, about in flags:
            group.add_argument(name, **about)
    # `model` and `aliases` say whether they were named at all.
    parser.set_defaults(**{**asdict(Settings()), "model": None, "aliases": None})
    return parser


def read_settings(parser: argparse.ArgumentParser, argv: list[str] | None) -> Settings:
    """The settings that `argv` names, the environment, and a file, in this order.

    Raises `SettingError` for what cannot be honoured.
    """
    args = parser.parse_args(completed(parser, sys.argv[1:] if argv is None else argv))
    if args.cache_ram is not None:
        if args.memory_budget not in (None, args.cache_ram):
            raise SettingError(
                "--prompt-cache-bytes and --cache-ram name different sizes; give one of them."
            )
        args.memory_budget = args.cache_ram
    if args.adapter_path is not None and args.model is None:
        raise SettingError("--adapter-path needs the --model that it was trained for.")
    if args.disk_budget is not None and args.cache_dir is None:
        raise SettingError("--cache-disk-bytes needs the --cache-dir that it bounds.")
    if args.idle_unload is not None and args.cache_dir is None:
        raise SettingError(
            "--idle-unload needs a --cache-dir: without one all that is cached would be lost with "
            "the model, and each prompt read again."
        )
    _check_router(args.canonicalize_router)
    # Whoever mistypes one of these need not wait for the model to hear of it.
    rows = Precision.of(args.kv_bits, args.kv_group_size, args.quantized_kv_start)
    if rows is not None and (args.store_kv is not None or args.store_state is not None):
        raise SettingError(
            "--kv-bits makes rows small while requests run too; leave --store-kv and --store-state out."
        )
    args.model = args.model or str(BUNDLED_MODEL)
    args.aliases = tuple(args.aliases or ())
    args.api_key = args.api_key or None
    return Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})


def _check_router(router: str | None) -> None:
    if router is None:
        return
    if router != AUTO and not Path(router).expanduser().is_file():
        raise SettingError(
            f"--canonicalize-router {router}: there is no such file. Name a router patch, or auto."
        )
