"""A patched checkpoint: a copy of a model directory in which only rows of router tensors differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .discovery import Discovery
from .patch import Patch

PATCH_FILE = "router_patch.json"
REPORT_FILE = "router_report.json"
CARD_FILE = "ROUTER.md"


@dataclass(frozen=True, slots=True)
class Written:
    """What was written."""

    output: Path
    tensors: int  # router tensors that differ
    rows: int  # router rows that differ: an expert whose row was replaced counts once
    files: int
    size_bytes: int


def write_checkpoint(
    source: Path, output: Path, patch: Patch, discovery: Discovery | None = None
) -> Written:
    """Write `source`, a model directory, to `output` with the patch's rows copied.

    Every other tensor and every other file is the same byte for byte; the patch, a report and a card
    lie beside them. It is written to a directory beside `output` that takes its name at the end.

    Raises `RouterError` when `output` exists, when `source` does not hold the router that the patch
    was made for, and when the disk is full; nothing is left behind then.
    """
    raise NotImplementedError
