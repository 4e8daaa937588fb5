"""Router canonicalization: find experts that are one, give them one router row, select without ties.

tokens = calibration_tokens(tokenizer)               # or from a file of your own
found = discover(model, tokens)                      # groups of experts, and a null model's beside
apply(model, found.patch)                            # in memory, tie-safe
write_checkpoint(source, output, found.patch, found) # or as a directory for any mlx-lm

with listen(moe_layers(model), print):               # what every router does, a `Routing` a forward
    model(mx.array([tokens[0]]))
"""

from typing import TYPE_CHECKING

from ..backend import loader
from .defaults import AUTO

if TYPE_CHECKING:
    from .checkpoint.write import (
        CARD_FILE,
        PATCH_FILE,
        REPORT_FILE,
        Written,
        check_output,
        write_checkpoint,
    )
    from .choose import choose_patch
    from .discovery.calibration import calibration_tokens
    from .discovery.discover import Discovery, LayerFindings, discover, random_groups
    from .families import FAMILIES, Family, MoeLayer, moe_layers
    from .in_memory import applied, apply, largest_difference, make_patch
    from .patch import Group, LayerPatch, Patch, RouterTensor
    from .select import Routing, listen

__all__ = [
    "AUTO",
    "CARD_FILE",
    "FAMILIES",
    "PATCH_FILE",
    "REPORT_FILE",
    "Discovery",
    "Family",
    "Group",
    "LayerFindings",
    "LayerPatch",
    "MoeLayer",
    "Patch",
    "RouterTensor",
    "Routing",
    "Written",
    "applied",
    "apply",
    "calibration_tokens",
    "check_output",
    "choose_patch",
    "discover",
    "largest_difference",
    "listen",
    "make_patch",
    "moe_layers",
    "random_groups",
    "write_checkpoint",
]

_LOADED_WHEN_ASKED_FOR = {
    "CARD_FILE": "checkpoint.write",
    "Discovery": "discovery.discover",
    "FAMILIES": "families",
    "Family": "families",
    "Group": "patch",
    "LayerFindings": "discovery.discover",
    "LayerPatch": "patch",
    "MoeLayer": "families",
    "PATCH_FILE": "checkpoint.write",
    "Patch": "patch",
    "REPORT_FILE": "checkpoint.write",
    "RouterTensor": "patch",
    "Routing": "select",
    "Written": "checkpoint.write",
    "applied": "in_memory",
    "apply": "in_memory",
    "calibration_tokens": "discovery.calibration",
    "check_output": "checkpoint.write",
    "choose_patch": "choose",
    "discover": "discovery.discover",
    "largest_difference": "in_memory",
    "listen": "select",
    "make_patch": "in_memory",
    "moe_layers": "families",
    "random_groups": "discovery.discover",
    "write_checkpoint": "checkpoint.write",
}
"""With its module: serving needs less of it than looking for a patch."""

__getattr__ = loader(__name__, _LOADED_WHEN_ASKED_FOR)
