"""What a calibration found, for programs (JSON) and for people (the card), and what it would cost elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from statistics import fmean
from typing import Any

from ...sizes import format_bytes
from ..discovery.agreement import DIRECTIONS, PROBES
from ..discovery.discover import CHUNK, Discovery
from ..discovery.experts import EXPERTS_AT_ONCE
from ..patch import Patch


@dataclass(frozen=True)
class Shape:
    """The MoE layers of a model."""

    layers: int
    experts: int
    hidden: int
    expert_hidden: int
    top_k: int

    @property
    def expert_parameters(self) -> int:
        """Numbers in the weights of one expert."""
        return 3 * self.hidden * self.expert_hidden


PLANNED = Shape(layers=48, experts=512, hidden=2048, expert_hidden=512, top_k=10)
"""The shape that every report plans for: Qwen3-Next-80B-A3B's."""


def patch_report(
    patch: Patch,
    discovery: Discovery | None,
    *,
    tensors: int | None = None,
    rows: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The JSON report: counts of the patch, what discovery saw, and `extra`.

    `tensors` and `rows` are those that a written checkpoint changed.
    """
    told: dict[str, Any] = {
        "mlx_hybridcache": version("mlx-hybridcache"),
        "patch": patch.digest,
        "method": patch.method,
        "moe_layers": len(patch.layers),
        "experts": patch.experts,
        "groups": patch.groups,
        "experts_in_groups": patch.members,
        "coverage": patch.coverage,
        "router_tensors_modified": tensors,
        "router_rows_modified": rows,
    }
    if discovery is not None:
        told["calibration"] = discovery.as_json()
        told["planned"] = planned(discovery)
    return told | dict(extra or {})


def planned(discovery: Discovery, shape: Shape = PLANNED) -> dict[str, Any]:
    """What the same calibration would take on this machine for a model of another shape.

    Checked once, on two busy cores: from layers of 32 experts with 24,576 numbers each, one of 512 with
    196,608 was planned at 31 s and 110 MB; it took 26 s and 82 MB.
    """
    return {
        **asdict(shape),
        "seconds": _seconds(discovery, shape),
        "peak_bytes": _peak_bytes(discovery.tokens, shape),
        "pairs_per_layer": shape.experts * (shape.experts - 1) // 2,
        "measured_seconds_per_layer": fmean(layer.seconds for layer in discovery.layers),
        "measured_peak_bytes": max(layer.peak_bytes for layer in discovery.layers),
    }


def _seconds(discovery: Discovery, shape: Shape) -> float:
    """Each measured part grows with what it counts: the forward with the parameters that a token meets,
    comparing and the null model with runs of experts and their size. Fingerprints are compared in
    pairs, which is quadratic in experts, but a product of small matrices.
    """
    shown = discovery.layers
    parameters = fmean(layer.expert_parameters for layer in shown)
    active = fmean(layer.expert_parameters * layer.top_k for layer in shown)
    forward = fmean(layer.forward_seconds for layer in shown)
    compare = fmean(layer.compare_seconds + layer.null_seconds for layer in shown)
    more_experts = shape.experts / fmean(layer.experts for layer in shown)
    return shape.layers * (
        forward * (shape.expert_parameters * shape.top_k / active)
        + compare * (more_experts * (shape.expert_parameters / parameters))
    )


def _peak_bytes(tokens: int, shape: Shape) -> int:
    """What one layer holds beside the weights."""
    experts, hidden, expert_hidden = shape.experts, shape.hidden, shape.expert_hidden
    hidden_states = 4 * tokens * hidden * 4
    logits = 2 * tokens * experts * 4
    experts_of_a_slice = min(tokens, CHUNK) * shape.top_k * (3 * expert_hidden + hidden) * 4
    fingerprints = experts * PROBES * DIRECTIONS * 8 + 3 * experts * experts * 8
    null_experts = 2 * EXPERTS_AT_ONCE * shape.expert_parameters * 4
    return hidden_states + logits + experts_of_a_slice + fingerprints + null_experts


def card(told: Mapping[str, Any], source: str) -> str:
    """The card: a page for whoever finds the directory, from the report's figures."""
    calibration = told.get("calibration")
    lines = [
        "# Router canonicalization",
        "",
        f"A copy of `{source}` in which only rows of router tensors differ: experts that were found to",
        "compute the same function have the same row, so that rounding no longer decides between them.",
        "Every other tensor and every other file is the same byte for byte. It loads like the original.",
        "",
        "| | |",
        "|---|---|",
        f"| MoE layers analysed | {told['moe_layers']:,} |",
        f"| groups | {told['groups']:,} |",
        f"| experts in groups | {told['experts_in_groups']:,} of {told['experts']:,} ({told['coverage']:.1%}) |",
        f"| router rows changed | {told['router_rows_modified']:,} in {told['router_tensors_modified']:,} tensors |",
    ]
    if "largest_logit_difference" in told:
        lines.append(
            "| largest logit difference inside a group afterwards | "
            f"{told['largest_logit_difference']:.3g} |"
        )
    if calibration is not None:
        lines += _calibration_lines(calibration, told["planned"])
    else:
        lines += [f"| method | {told['method']} |"]
    lines += [
        "",
        "## What to know before using it",
        "",
        "Equal rows make exact ties, and plain mlx-lm breaks those by position: the choice is one for",
        "all times on one device, but a group may take more of a token's experts than before. Serve it with",
        "`mlx-hybridcache serve --model THIS --canonicalize-router auto`, which finds `router_patch.json`",
        "here and selects by groups, with the caps that calibration fixed.",
        "",
        f"Made with mlx-hybridcache {told['mlx_hybridcache']}; `router_report.json` has every layer's figures.",
        "",
    ]
    return "\n".join(lines)


def _calibration_lines(calibration: Mapping[str, Any], planned: Mapping[str, Any]) -> list[str]:
    kind = {
        "outputs": "what experts compute: relative error at the 95th percentile at most",
        "scores": "cosine of router scores, which says nothing about what experts compute: at least",
    }[calibration["method"]]
    rows = {
        "compared": f"{kind} {calibration['threshold']:g}",
        "coverage of the same procedure on random experts": f"{calibration['null_coverage']:.1%}",
        "experts left alone for want of tokens": f"{calibration['unseen']:,}",
        "calibration": f"{calibration['tokens']:,} tokens, {calibration['held_out_tokens']:,} of them "
        f"held out; {calibration['seconds']:.1f} s",
        f"the same for {planned['layers']} layers of {planned['experts']} experts, planned": f"{planned['seconds'] / 60:,.0f} minutes on this machine, {format_bytes(planned['peak_bytes'])} beside the weights",
    }
    text = [f"| {what} | {value} |" for what, value in rows.items()]
    if 0 < calibration["coverage"] <= calibration["null_coverage"]:
        text += [
            "",
            "**The same procedure finds as much in experts that are random and independent.** These groups",
            "are no evidence that any two experts are alike.",
        ]
    return text
