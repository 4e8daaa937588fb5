"""A patched checkpoint: a copy of a model directory in which only rows of router tensors differ."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RouterError, refusal
from ...sizes import format_bytes
from ..discovery.discover import Discovery
from ..patch import LayerPatch, Patch, RouterTensor, copied_rows, differing_rows, rows_digest
from .headers import Stored, stored_tensors
from .report import card, patch_report

PATCH_FILE = "router_patch.json"
REPORT_FILE = "router_report.json"
CARD_FILE = "ROUTER.md"

OWN_FILES = (PATCH_FILE, REPORT_FILE, CARD_FILE)

LEFT_OUT = (".git", ".cache")
"""Folders at the top of a model directory that belong to how it was downloaded, not to the model."""


@dataclass(frozen=True, slots=True)
class Written:
    """What was written."""

    output: Path
    tensors: int  # router tensors that differ from the source's
    rows: int  # experts whose row differs from the source's
    files: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Change:
    """New bytes for one stored tensor."""

    stored: Stored
    layer: str
    before: bytes
    after: bytes
    experts: int


def write_checkpoint(
    source: Path,
    output: Path,
    patch: Patch,
    discovery: Discovery | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
    card_extra: str = "",
) -> Written:
    """Write `source`, a model directory, to `output` with the patch's rows copied.

    Every other tensor and every other file is the same byte for byte. The patch, a JSON report with
    `extra` in it, and a card that `card_extra` ends, lie beside them. All is written to a directory
    beside `output` that takes its name at the end.

    Raises `RouterError` when `output` exists, when `source` does not hold the router that the patch
    was made for, and when the disk is full; nothing is left behind then.
    """
    check_output(output)
    changes = list(_changes(source, patch))
    files = sorted(_files(source))
    needed = _needed(source, files, output)
    rows = {
        (change.layer, row)
        for change in changes
        for row in differing_rows(change.before, change.after, change.experts)
    }
    tensors = sum(change.before != change.after for change in changes)
    written = Written(output, tensors, len(rows), len(files) + len(OWN_FILES), needed)
    told = patch_report(patch, discovery, tensors=written.tensors, rows=written.rows, extra=extra)
    with _becoming(output, needed) as directory:
        for file in files:
            _copy(source / file, directory / file)
        for change in changes:
            _overwrite(directory / change.stored.file.relative_to(source), change)
        patch.save(directory / PATCH_FILE)
        _write(directory / REPORT_FILE, json.dumps(told, indent=1) + "\n")
        _write(directory / CARD_FILE, card(told, source.name) + card_extra)
    return written


def check_output(output: Path) -> None:
    """Raise `RouterError` unless `output` can become a new directory."""
    if output.exists() or output.is_symlink():
        raise RouterError(
            f"--output {output} exists already. Name a directory that does not: nothing is overwritten."
        )
    if not output.parent.is_dir():
        raise RouterError(f"--output {output}: there is no directory {output.parent} to put it in.")


def _needed(source: Path, files: Sequence[Path], output: Path) -> int:
    """Bytes; raises `RouterError` where they do not fit."""
    needed = sum((source / file).stat().st_size for file in files)
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise _no_room(output, needed, free)
    return needed


def _changes(source: Path, patch: Patch) -> Iterator[_Change]:
    """Each router tensor of the patch with the bytes it is to have, found by name or by its bytes."""
    stored = stored_tensors(source)
    by_name = {one.name: one for one in stored}
    for layer in patch.layers:
        for tensor in layer.tensors:
            one = by_name.get(tensor.name)
            if one is None or not _is(one, tensor):
                one = _same_bytes(stored, tensor, source, layer)
            before = one.read()
            after = copied_rows(before, layer.experts, layer.groups)
            yield _Change(one, layer.name, before, after, layer.experts)


def _is(stored: Stored, tensor: RouterTensor) -> bool:
    return stored.shape == tensor.shape and rows_digest(stored.read()) in (
        tensor.before,
        tensor.after,
    )


def _same_bytes(
    stored: list[Stored], tensor: RouterTensor, source: Path, layer: LayerPatch
) -> Stored:
    """A checkpoint that mlx-lm did not write has names of its own: the bytes tell which is meant."""
    found = [one for one in stored if _is(one, tensor)]
    if len(found) != 1:
        raise RouterError(
            f"{source} does not hold the router of {layer.name} that the patch was made for: "
            f"{'no tensor has' if not found else 'several tensors have'} the bytes of {tensor.name}. "
            "Make a patch for this model, or convert it with mlx_lm.convert first."
        )
    return found[0]


def _files(source: Path) -> Iterator[Path]:
    """Every file of the model, relative to its directory; links are followed."""
    seen: set[Path] = set()
    for folder, folders, names in os.walk(source, followlinks=True):
        here, real = Path(folder).relative_to(source), Path(folder).resolve()
        if real in seen:  # a link back to where we came from
            folders.clear()
            continue
        seen.add(real)
        if here == Path():
            folders[:] = [name for name in folders if name not in LEFT_OUT]
        for name in names:
            if here != Path() or name not in OWN_FILES:
                yield here / name


@contextmanager
def _becoming(output: Path, needed: int) -> Iterator[Path]:
    """A directory beside `output` that is renamed to it when all went well, and else is gone."""
    directory = output.with_name(f".{output.name}.{secrets.token_hex(4)}.partial")
    try:
        directory.mkdir()
        yield directory
        check_output(output)
        directory.rename(output)
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(output, needed, shutil.disk_usage(output.parent).free) from error
        raise RouterError(f"--output {output} could not be written: {refusal(error)}") from error
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    _flush(target)


def _overwrite(file: Path, change: _Change) -> None:
    if change.after == change.before:
        return
    with file.open("r+b") as opened:
        opened.seek(change.stored.start)
        opened.write(change.after)
    _flush(file)


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    _flush(file)


def _flush(file: Path) -> None:
    """A full disk may only show here."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _no_room(output: Path, needed: int, free: int) -> RouterError:
    return RouterError(
        f"There is no room for {output}: {format_bytes(needed)} are needed, {format_bytes(free)} are "
        "free. Nothing was left behind. Free some, or name another disk."
    )
