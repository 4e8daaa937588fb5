"""The table of mlx-lm's mixture-of-experts blocks, and the layers of a model that it describes.

A row says where a block keeps its router and its experts, and whose code selects. All of these
select in the same way, however they score: with one `argpartition` along the experts, of which they
take the last or the first k. What a row cannot describe is refused by name: it is not known there what
a changed router would do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..errors import RouterError

ROW_TENSORS = ("weight", "scales", "biases", "bias")
"""Parameters of a router with a row for each expert; a quantized router has the middle two."""


@dataclass(frozen=True, slots=True)
class Family:
    """How one kind of block is built. Paths are attribute names from the block on, with dots."""

    blocks: tuple[str, ...]  # `module.Class` in mlx_lm.models
    scores: str  # what the experts are selected by: "softmax", "sigmoid" or the "logits" themselves
    router: str = "gate"  # holds the rows
    experts: str = "switch_mlp"  # runs experts: (T, D), (T, n) indices -> (T, n, D)
    top_k: str = "top_k"
    selector: str = ""  # whose `__call__` selects: the block's own, or its gate's
    helpers: tuple[str, ...] = ()  # functions of its module that it leaves the selecting to
    corrections: tuple[str, ...] = ()  # vectors, one number for each expert, added before selecting
    groups: str = ""  # into how many routing groups the experts are divided
    before: str = ""  # a projection in front of the experts


FAMILIES: tuple[Family, ...] = (
    Family(
        (
            "qwen3_next.Qwen3NextSparseMoeBlock",  # Qwen3.5-MoE's too
            "qwen3_moe.Qwen3MoeSparseMoeBlock",
            "qwen2_moe.Qwen2MoeSparseMoeBlock",
            "olmoe.OlmoeSparseMoeBlock",
            "mellum.MellumSparseMoeBlock",
        ),
        "softmax",
    ),
    Family(("mixtral.MixtralSparseMoeBlock",), "logits", top_k="num_experts_per_tok"),
    Family(("phixtral.MOE",), "logits", top_k="num_experts_per_tok"),
    Family(("jamba.JambaSparseMoeBlock",), "logits", router="router", top_k="num_experts_per_tok"),
    Family(
        ("gpt_oss.MLPBlock",),
        "logits",
        router="router",
        experts="experts",
        top_k="num_experts_per_tok",
        helpers=("mlx_topk",),
    ),
    Family(
        ("granitemoe.GraniteMoeMoE", "granitemoehybrid.GraniteMoeHybridMoE"),
        "logits",
        router="router.layer",
        top_k="router.top_k",
        selector="router",
    ),
    Family(("hunyuan.MoeBlock",), "softmax", router="gate.wg"),
    Family(("ernie4_5_moe.Ernie4_5_MoeMLP",), "softmax", top_k="k"),
    Family(("deepseek.DeepseekMoE",), "softmax", top_k="gate.top_k", selector="gate"),
    Family(
        ("deepseek_v2.DeepseekV2MoE",),
        "softmax",
        top_k="gate.top_k",
        selector="gate",
        groups="gate.n_group",
    ),
    Family(
        (
            "deepseek_v3.DeepseekV3MoE",  # Kimi K2's and Kimi VL's too
            "deepseek_v32.DeepseekV32MoE",  # GLM-5's too
            "glm4_moe.MoE",  # Solar Open's too
            "glm4_moe_lite.Glm4MoeLiteMoE",
            "exaone_moe.MoE",
            "mimo_v2_flash.MoE",
        ),
        "sigmoid",
        top_k="gate.top_k",
        selector="gate",
        helpers=("group_expert_select",),
        corrections=("gate.e_score_correction_bias",),
        groups="gate.n_group",
    ),
    Family(
        ("dots1.Dots1MoE",),
        "sigmoid",
        experts="experts",
        top_k="gate.top_k",
        selector="gate",
        helpers=("group_expert_select",),
        corrections=("gate.e_score_correction_bias",),
        groups="gate.n_group",
    ),
    Family(
        ("nemotron_h.NemotronHMoE",),
        "sigmoid",
        top_k="gate.top_k",
        selector="gate",
        helpers=("group_expert_select",),
        corrections=("gate.e_score_correction_bias",),
        groups="gate.n_group",
        before="fc1_latent_proj",
    ),
    Family(
        ("bailing_moe.BailingMoeSparseMoeBlock", "bailing_moe_linear.SparseMoeBlock"),
        "softmax",
        router="gate.gate_proj",
        top_k="gate.top_k",
        selector="gate",
        helpers=("group_expert_select",),
        corrections=("gate.expert_bias",),
        groups="gate.n_group",
    ),
    Family(
        ("bailing_hybrid.SparseMoeBlock",),
        "sigmoid",
        router="gate.gate_proj",
        top_k="gate.top_k",
        selector="gate",
        corrections=("gate.expert_bias",),
        groups="gate.n_group",
    ),
    Family(
        ("bailing_moe_v3.BailingSparseMoE",),
        "sigmoid",
        top_k="gate.top_k",
        selector="gate",
        helpers=("_group_expert_select",),
        corrections=("gate.expert_bias",),
        groups="gate.n_group",
    ),
    Family(
        ("laguna.MoE",),
        "sigmoid",
        router="gate.proj",
        top_k="gate.top_k",
        selector="gate",
        corrections=("gate.e_score_correction_bias",),
    ),
    Family(
        ("mistral4.Mistral4MoE",),
        "softmax",
        top_k="num_experts_per_tok",
        helpers=("mistral4_expert_select",),
        groups="args.n_group",
    ),
    Family(
        ("minimax.MiniMaxSparseMoeBlock", "minimax_m3_vl.SparseMoeBlock"),
        "sigmoid",
        top_k="num_experts_per_tok",
        corrections=("e_score_correction_bias",),
    ),
    Family(("lfm2_moe.Lfm2MoeSparseMoeBlock",), "sigmoid", corrections=("expert_bias",)),
    Family(
        ("Klear.KlearSparseMoeBlock",),
        "sigmoid",
        experts="experts",
        corrections=("expert_bias",),
    ),
    Family(
        ("afmoe.AfmoeMoE",),
        "sigmoid",
        router="router.gate",
        experts="experts",
        top_k="num_experts_per_tok",
        corrections=("expert_bias",),
        groups="n_group",
    ),
    Family(
        ("kimi_linear.KimiSparseMoE",),
        "sigmoid",
        top_k="args.num_experts_per_token",
        helpers=("_group_expert_select",),
        corrections=("e_score_correction_bias",),
        groups="args.num_expert_group",
    ),
    Family(
        ("step3p5.Step3p5MoE",),
        "sigmoid",
        router="gate.gate",
        top_k="gate.top_k",
        selector="gate",
        helpers=("moe_gate_select",),
        corrections=("gate.router_bias",),
    ),
)

_BY_CLASS = {f"mlx_lm.models.{name}": family for family in FAMILIES for name in family.blocks}


@dataclass(frozen=True, eq=False)
class MoeLayer:
    """One mixture-of-experts block of a model, as its family describes it."""

    index: int  # among the model's MoE layers, in the order in which a forward meets them
    name: str  # of the block, as its parameters' names begin: "model.layers.3.mlp"
    block: Any
    family: Family

    @cached_property
    def router(self) -> Any:
        """The module that holds the rows: a linear layer, quantized or not, or a gate with a matrix."""
        return _at(self.block, self.family.router)

    @property
    def experts(self) -> Any:
        """The module that runs experts: (T, D) and indices (T, n) -> (T, n, D)."""
        return _at(self.block, self.family.experts)

    @property
    def selector(self) -> Any:
        """The module whose code selects."""
        return _at(self.block, self.family.selector)

    @cached_property
    def count(self) -> int:
        """How many experts there are."""
        return int(self.router.weight.shape[0])

    @property
    def top_k(self) -> int:
        """How many of them each token takes."""
        return int(_at(self.block, self.family.top_k))

    @property
    def routing_groups(self) -> int:
        """Into how many groups the experts are divided before they are selected; mostly 1."""
        return int(_at(self.block, self.family.groups) or 1) if self.family.groups else 1

    def tensors(self) -> dict[str, mx.array]:
        """Parameter name -> router tensor; each has a row, or a number, for every expert."""
        router = f"{self.name}.{self.family.router}"
        found = {f"{router}.{row}": self.router.get(row) for row in ROW_TENSORS}
        for path in self.family.corrections:
            found[f"{self.name}.{path}"] = _at(self.block, path)
        return {name: array for name, array in found.items() if isinstance(array, mx.array)}


def moe_layers(model: Any) -> list[MoeLayer]:
    """The MoE layers of `model`, in order.

    Raises `RouterError` for a model without experts, and for one that has a block, or experts
    outside of any block, that the table does not describe: it names the class.
    """
    found: list[tuple[str, Any, Family]] = []
    banks: list[tuple[str, Any]] = []
    modules = sorted(model.named_modules(), key=lambda item: _natural(item[0]))
    for name, module in modules:
        family = next(
            (_BY_CLASS[key] for kind in type(module).__mro__ if (key := _key(kind)) in _BY_CLASS),
            None,
        )
        if family is not None:
            found.append((name, module, family))
        elif isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            banks.append((name, module))
        elif isinstance(module.get("experts"), list):
            banks.append((f"{name}.experts", module))
    inside = tuple(f"{name}." for name, _, _ in found)
    for name, module in banks:
        if not name.startswith(inside):
            raise RouterError(_unknown(model, name, module))
    if not found:
        kind = getattr(model, "model_type", None) or type(model).__name__
        raise RouterError(
            f"{kind} has no mixture-of-experts layer: nothing is routed, so there is nothing to "
            "canonicalize. Leave the option out."
        )
    layers = [MoeLayer(i, *each) for i, each in enumerate(found)]
    for layer in layers:
        _check(layer)
    return layers


def _check(layer: MoeLayer) -> None:
    """A row that mlx-lm has moved away from is found out here, not in the middle of a forward."""
    try:
        sizes = {int(array.shape[0]) for array in layer.tensors().values()}
        fits = sizes == {layer.count} and 0 < layer.top_k <= layer.count
        _ = (layer.experts, layer.selector, layer.routing_groups)
    except (AttributeError, KeyError, TypeError):
        fits = False
    if not fits:
        raise RouterError(
            f"{layer.name} ({_key(type(layer.block))}) is not built as this version knows it; "
            "its router is left alone. Report the mlx-lm version."
        )


def _unknown(model: Any, name: str, module: Any) -> str:
    """Names the block that holds the experts at `name`: two levels up, where a layer's block is."""
    parents = dict(model.named_modules())
    path = name.split(".")
    block = next(
        (
            parents[parent]
            for depth in range(len(path) - 1, 0, -1)
            if (parent := ".".join(path[:depth])) in parents
            and not _key(type(parents[parent])).startswith("mlx_lm.models.switch_layers")
        ),
        module,
    )
    return (
        f"{name} belongs to a {_key(type(block))}, a mixture-of-experts block that this version does "
        "not know, so its router cannot be canonicalized. Leave the option out."
    )


def _at(module: Any, path: str) -> Any:
    for part in path.split(".") if path else ():
        module = getattr(module, part)
    return module


def _key(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Layer 10 comes after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
