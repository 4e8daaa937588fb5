"""Which patch is meant by `router=`: one that is at hand, one in a file, or one that is looked for now."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..errors import RouterError
from .checkpoint.write import PATCH_FILE
from .defaults import AUTO
from .discovery.calibration import calibration_tokens
from .discovery.discover import discover
from .families import moe_layers
from .patch import Patch

log = logging.getLogger("mlx_hybridcache")


def choose_patch(
    model: Any, tokenizer: Any, wanted: Patch | str | Path, directory: Path | None = None
) -> Patch:
    """The patch that `wanted` names: itself, a file's, or with "auto" the one in the model's `directory`.

    Without a patch there, "auto" looks for equivalent experts now, with the bundled texts: a forward of
    some thousand tokens. It may find none.

    Raises `RouterError` for a file that is no patch, for a model without experts or with blocks that
    are not known, and for "auto" without a patch or a tokenizer.
    """
    if isinstance(wanted, Patch):
        return wanted
    if wanted != AUTO:
        return Patch.load(Path(wanted).expanduser())
    if directory is not None and (directory / PATCH_FILE).is_file():
        log.info("Router patch: %s, which lies with the model.", directory / PATCH_FILE)
        return Patch.load(directory / PATCH_FILE)
    layers = len(moe_layers(model))
    if tokenizer is None:
        raise RouterError(
            "router='auto' needs a tokenizer to calibrate with; give one, or a patch."
        )
    log.info("Router patch: comparing the experts of %d layers; this takes a while.", layers)
    found = discover(model, calibration_tokens(tokenizer))
    log.info(
        "Router patch: %d of %d experts in %d groups (%.1f %%; %.1f %% on a null model), %.0f s. "
        "`mlx-hybridcache canonicalize --patch FILE` finds it once and keeps it.",
        found.patch.members,
        found.patch.experts,
        found.patch.groups,
        100 * found.coverage,
        100 * found.null_coverage,
        found.seconds,
    )
    return found.patch
