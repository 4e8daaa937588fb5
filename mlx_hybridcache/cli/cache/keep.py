"""Keeping what is in a cache directory, and shipping it: `pin`, `unpin`, `export` and `import`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...disk import archive
from ...disk.contents import (
    SHORT,
    by_namespace,
    find_checkpoint,
    look,
    must_be_free,
    must_be_one,
    writing,
)
from ...errors import SettingError
from ...sizes import format_bytes
from ..console import bytes_bar, count
from ..flags import check_can_be_written


def pin(options: argparse.Namespace) -> int:
    """Keep a prefix whatever comes."""
    return _set_pin(options, is_pinned=True)


def unpin(options: argparse.Namespace) -> int:
    """Let a prefix go like everything else."""
    return _set_pin(options, is_pinned=False)


def _set_pin(options: argparse.Namespace, *, is_pinned: bool) -> int:
    root: Path = options.cache_dir
    must_be_one(root)
    with writing(root) as (directory, entries):
        one, node = find_checkpoint(by_namespace(entries), options.id)
        directory.pin([segment.name for segment in one.segments(node)], is_pinned=is_pinned)
    print(f"{'Pinned' if is_pinned else 'Unpinned'} [0, {node.end:,}) of {one.model or 'a model'}.")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write a prefix into a file."""
    root: Path = options.cache_dir
    check_can_be_written("--to", options.to)
    if options.to.exists() and not options.force:
        raise SettingError(
            f"--to {options.to} exists already. Name another file, or add --force to write over it."
        )
    one, node = find_checkpoint(look(root), options.id)
    with bytes_bar("export") as bar:
        sent = archive.export(
            root,
            one,
            node,
            options.to,
            only_end=options.only_end,
            on_size=bar.expect,
            on_bytes=bar.advance,
        )
    print(
        f"{options.to}: [0, {sent.position:,}) of {sent.model or 'a model'} "
        f"in {count(len(sent.members), 'file')}, {format_bytes(sent.nbytes)}."
    )
    return 0


def import_(options: argparse.Namespace) -> int:
    """Put the prefix of a file into the directory."""
    root: Path = options.cache_dir
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        must_be_one(root)
        must_be_free(root)
    with bytes_bar("import") as bar:
        prefix, written = archive.bring_in(
            options.file,
            root,
            is_pinned=not options.no_pin,
            on_size=bar.expect,
            on_bytes=bar.advance,
        )
    sent = prefix.manifest
    print(
        f"{root}: [0, {sent.position:,}) of {sent.model or 'a model'}, "
        f"{format_bytes(written)} new{', pinned' * (not options.no_pin)}; its id is {sent.key[:SHORT]}."
    )
    return 0
