"""The command `mlx-hybridcache verify`: hot against cold at every restore point, on this device."""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..demo import BUNDLED_MODEL
from ..errors import GroupError, SettingError
from .console import wide_console
from .flags import Parser, add_quantizing_flags, add_store_flags, read_text, tokens
from .versions import versions

if TYPE_CHECKING:
    from rich.table import Table

    from ..caches.quantizing.precision import Precision
    from ..verify import Proof

LEAST_TOKENS = 64

LOST = 3
"""The status of a rank that ends because another one is lost."""

OnPoint = Callable[[int, int], None]


def main(argv: Sequence[str], prog: str) -> int:
    """0: hot equals cold within what is allowed; 1: it does not."""
    options = _parser(prog).parse_args(argv)

    from rich.progress import Progress

    console = wide_console()
    precision = _precision(options)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("restore points", total=None)

        def on_point(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        if options.pipeline and not options.distributed:
            raise SettingError(
                "--pipeline says how ranks share a model; it goes with --distributed."
            )
        if options.distributed:
            proof = _on_ranks(options, precision, on_point)
        else:
            proof = _on_one_machine(options, precision, on_point)
    if proof is None:  # rank 0 says it
        return 0
    console.print(_table(proof, options.model))
    for line in [*_machine(), *_quantized(proof, precision, options.exact)]:
        console.print(line, highlight=False)
    for line in _sentences(proof):
        console.print(line, highlight=False)
    return 0 if proof.holds else 1


def _on_one_machine(
    options: argparse.Namespace, precision: Precision | None, on_point: OnPoint
) -> Proof:
    from .. import models
    from ..verify import verify

    model, tokenizer = models.load(options.model)
    return verify(
        model,
        _prompts(tokenizer, options),
        step=options.prefill_step_size,
        exact=options.exact,
        tolerance=options.tolerance,
        precision=precision,
        store_kv=options.store_kv,
        store_state=options.store_state,
        on_point=on_point,
    )


def _on_ranks(
    options: argparse.Namespace, precision: Precision | None, on_point: OnPoint
) -> Proof | None:
    """Every rank runs this; rank 0 has the proof."""
    from .. import Group
    from ..group.load import load
    from ..verify import verify_on_ranks

    if precision is not None or options.store_kv or options.store_state:
        raise SettingError(
            "--kv-bits, --store-kv and --store-state cannot be used with several ranks yet. Leave them out."
        )
    group = Group.form()
    model, tokenizer = load(group, options.model, pipeline=options.pipeline)
    try:
        return verify_on_ranks(
            group,
            model,
            tokenizer,
            _prompts(tokenizer, options),
            step=options.prefill_step_size,
            exact=options.exact,
            tolerance=options.tolerance,
            on_point=on_point,
        )
    except GroupError as error:
        print(f"mlx-hybridcache verify: {error}", file=sys.stderr, flush=True)
        os._exit(LOST)  # the worker may be in a call that never returns


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add("--model", default=str(BUNDLED_MODEL), help="directory, or owner/name")
    add("--file", type=Path, help="the text to read (default: Python's reference)")
    add("--tokens", type=tokens(LEAST_TOKENS), default=1400, help="length of the prompts (1400)")
    add("--prefill-step-size", type=tokens(), default=512, help="tokens (512)")
    add("--distributed", action="store_true", help="on all ranks that mlx.launch started with this")
    add("--pipeline", action="store_true", help="with it: each rank has some of the layers")
    add("--exact", action="store_true", help="prove exact mode: no tolerance")
    add("--tolerance", type=float, help="largest allowed logit difference")
    add_store_flags(parser)
    add_quantizing_flags(
        parser, None, "where that begins (a third of --tokens; the server's is 5000)"
    )
    return parser


def _precision(options: argparse.Namespace) -> Precision | None:
    """What keys and values are quantized to. It begins among the restore points, so that some lie on either side."""
    from ..caches.quantizing.precision import Precision

    start = options.quantized_kv_start
    if start is None:
        start = options.tokens // 3
    if options.kv_bits is not None and start >= options.tokens:
        raise SettingError(
            f"--quantized-kv-start {start:,} is never reached: the prompts have {options.tokens:,} tokens. "
            "Give more --tokens."
        )
    return Precision.of(options.kv_bits, options.kv_group_size, start)


def _prompts(tokenizer: Any, options: argparse.Namespace) -> list[list[int]]:
    """Two of the wanted length, whose first two thirds are the same."""
    from ..demo.workloads import LONGEST_TOKEN, default_text

    text = read_text("--file", options.file) if options.file else default_text()
    wanted = 2 * options.tokens
    head = text[: wanted * LONGEST_TOKEN]
    ids = list(tokenizer.encode(head, add_special_tokens=False))[:wanted]
    if len(ids) < LEAST_TOKENS:
        raise SettingError(
            f"--file {options.file} has {len(ids)} tokens; {LEAST_TOKENS} are needed."
        )
    long, other = ids[: options.tokens], ids[options.tokens :] or ids[:32]
    return [long, long[: 2 * len(long) // 3] + other[: len(long) // 3]]


def _table(proof: Proof, model: str) -> Table:
    from rich.table import Table

    table = Table(title=f"Hot against cold at every restore point, {model}")
    for name in ("position", "restored", "prompt", "max |logit|", "KL (nats)", "first other token"):
        table.add_column(name, justify="right")
    for point in proof.points:
        found = point.found
        table.add_row(
            f"{point.position:,}",
            f"{point.restored:,}",
            f"{point.prompt_tokens:,}",
            f"{found.max_abs:.3g}",
            f"{found.kl:.3g}",
            "none" if found.first_differing_token is None else str(found.first_differing_token),
        )
    return table


def _machine() -> list[str]:
    import mlx.core as mx

    return [
        f"{versions()}, Python {platform.python_version()}",
        f"{platform.platform()}, {mx.default_device()}",
    ]


def _quantized(proof: Proof, precision: Precision | None, exact: bool) -> list[str]:
    """What was quantized, where that was asked for."""
    if precision is None:
        return []
    if not proof.quantized_layers:
        why = "no layer of this model has attention that looks at quantized rows, or rows of whole groups"
        return [f"--kv-bits has no effect: {why}. Full precision was compared."]
    layers = f"{proof.quantized_layers} layer{'s' * (proof.quantized_layers > 1)}"
    said = f"keys and values of {layers} have {precision.bits} bits from position {precision.start:,} on"
    return [said if exact else f"{said}; cold runs are by mlx-lm's own quantized cache"]


def _sentences(proof: Proof) -> list[str]:
    return [
        f"probe: cold runs sliced differently differ by at most {proof.probe:.3g}",
        f"allowed {proof.allowed:.3g}, worst restore {proof.worst:.3g}: "
        + ("it holds" if proof.holds else "IT DOES NOT HOLD"),
        *_cost(proof),
        *_gone(proof),
    ]


def _gone(proof: Proof) -> list[str]:
    if not proof.gone:
        return []
    return [
        f"{proof.gone} points had to go for want of memory before they were compared: give fewer --tokens"
    ]


def _cost(proof: Proof) -> list[str]:
    """What a smaller store comes to, where any difference is allowed."""
    if proof.allowed != math.inf or not proof.points:
        return []
    kls = [point.found.kl for point in proof.points]
    others = sum(point.found.first_differing_token is not None for point in proof.points)
    mean, most = sum(kls) / len(kls), max(kls)
    told = f"KL {mean:.2g} nats on average, {most:.2g} at most"
    return [f"the smaller store: {told}; {others} of {len(kls)} replies begin otherwise"]
