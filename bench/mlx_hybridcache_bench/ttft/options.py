"""What the command line of `bench ttft` means: a plan, and who is measured."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from mlx_hybridcache import PromptError

from ..serving.crowd import AT_ONCE
from ..serving.scenarios import LONGER
from ..serving.servers import OURS, THEIRS, ServerError
from .contenders import LLAMA, Contender, compared, flags_of
from .plan import MIXED_REQUESTS, NAMES, USUAL, BenchPlan, sizes_of
from .remote import at_url

SIZES, QUICK_SIZES = ("12K", "30K", "60K", "120K"), ("1050",)
REPEATS = 3
QUICK_WARM_UP = 400
TIMEOUT_SECONDS = 1_200.0
START_SECONDS = 900.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench ttft`."""
    _add_who(parser)
    _add_how(parser)
    _add_out(parser)


def _add_who(parser: argparse.ArgumentParser) -> None:
    who = parser.add_argument_group("what is measured")
    who.add_argument(
        "--compare",
        metavar="NAMES",
        help=f"start these and {OURS}, and ask them in turns: {THEIRS},{LLAMA} ({THEIRS})",
    )
    who.add_argument("--alone", action="store_true", help=f"leave {OURS} out of --compare")
    who.add_argument(
        "--url",
        action="append",
        default=[],
        metavar="[NAME=]URL",
        help="a server that runs already, such as LM Studio or Ollama; may be repeated",
    )
    who.add_argument("--model", help="directory, or owner/name (default: the bundled model)")
    who.add_argument("--gguf", type=Path, metavar="FILE", help="the same model for llama-server")
    who.add_argument("--served-model", metavar="NAME", help="what requests to --url name as model")
    who.add_argument(
        "--api-key-env", metavar="VARIABLE", help="where the key for --url is, as bearer token"
    )
    who.add_argument("--extra", metavar="JSON", help="fields for every request, as an object")
    who.add_argument(
        "--flags",
        action="append",
        default=[],
        metavar="NAME=FLAGS",
        help='for a started server: "llama-server=--ctx-checkpoints 128"; may be repeated',
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("how")
    how.add_argument("--quick", action="store_true", help="small prompts, for a try")
    how.add_argument("--sizes", nargs="+", metavar="TOKENS", help=f"{' '.join(SIZES)}; quick 1050")
    how.add_argument("--repeats", type=int, help=f"runs of each scenario ({REPEATS})")
    how.add_argument("--scenarios", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    how.add_argument(
        "--requests",
        type=int,
        default=MIXED_REQUESTS,
        help=f"of each of the mixed clients ({MIXED_REQUESTS})",
    )
    how.add_argument("--clients", type=int, default=AT_ONCE, help=f"at once ({AT_ONCE})")
    how.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"until a request counts as hung ({TIMEOUT_SECONDS:.0f})",
    )
    how.add_argument(
        "--no-cold-checks",
        action="store_true",
        help="do not ask a newly started server for cold replies to compare with",
    )


def _add_out(parser: argparse.ArgumentParser) -> None:
    told = parser.add_argument_group("what comes out")
    told.add_argument("--out", type=Path, metavar="DIR", help="a folder for all files (ttft-DATE)")
    told.add_argument("--markdown", action="store_true", help="print Markdown for an issue instead")
    told.add_argument(
        "--add",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="results.json of an earlier run here, to join the report; alone, nothing is measured",
    )


def plan_of(args: argparse.Namespace) -> BenchPlan:
    """What is to be asked. Raises `PromptError`."""
    try:
        sizes = sizes_of(args.sizes or (QUICK_SIZES if args.quick else SIZES))
    except ValueError as error:
        raise PromptError(f"--sizes takes numbers of tokens, as 12000 or 12K: {error}") from error
    if min(sizes) <= LONGER:
        raise PromptError(f"A size must exceed {LONGER} tokens, by which raw text is shortened.")
    if (
        min(args.clients, args.requests) < 1
        or (args.repeats is not None and args.repeats < 1)
        or args.timeout <= 0
    ):
        raise PromptError("--clients, --requests, --repeats and --timeout take numbers above 0.")
    return BenchPlan(
        sizes=sizes,
        repeats=args.repeats or REPEATS,
        names=tuple(args.scenarios or USUAL),
        clients=args.clients,
        timeout_seconds=args.timeout,
        start_seconds=START_SECONDS,
        warm_up_tokens=QUICK_WARM_UP if args.quick else sizes[0],
        cold_checks=not args.no_cold_checks,
        mixed_requests=args.requests,
    )


def contenders_of(args: argparse.Namespace, plan: BenchPlan) -> list[Contender]:
    """Everything is looked up before anything is started: mistakes cost no waiting."""
    fields = fields_of(args.extra)
    api_key = None
    if args.api_key_env:
        api_key = os.environ.get(args.api_key_env)
        if not api_key:
            raise ServerError(f"There is no key in ${args.api_key_env}.")
    names = [each.strip() for each in (args.compare or "").split(",") if each.strip()]
    if not (names or args.url or args.add):
        names = [THEIRS]
    if names and OURS not in names and not args.alone:
        names.append(OURS)
    remote = [
        at_url(each, model=args.served_model, fields=fields, api_key=api_key) for each in args.url
    ]
    started = compared(
        names,
        model=args.model,
        gguf=args.gguf,
        flags=flags_of(args.flags),
        fields=fields,
        context_tokens=plan.context_tokens,
    )
    return [*remote, *started]


def fields_of(extra: str | None) -> dict[str, Any]:
    """`--extra` as an object. Raises `ServerError`."""
    try:
        fields = json.loads(extra or "{}")
    except ValueError as error:
        raise ServerError(f"--extra is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ServerError(f'--extra takes an object, as {{"top_k": 1}}, not {extra}.')
    return fields
