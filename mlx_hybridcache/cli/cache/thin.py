"""Checking a cache directory and letting things go: `verify`, `prune` and `clear`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ...disk.contents import (
    Collection,
    by_namespace,
    damaged,
    loaded,
    look,
    must_be_free,
    must_be_one,
    path_of,
    writing,
)
from ...disk.directory import Directory
from ...disk.index import Entry
from ...disk.segment import Segment
from ...errors import BudgetError, SettingError
from ...sizes import format_bytes, parse_bytes
from ..console import bytes_bar, count


def verify(options: argparse.Namespace) -> int:
    """Check every file."""
    root: Path = options.cache_dir
    must_be_one(root)
    if options.delete:
        must_be_free(root)
    with bytes_bar("verify") as bar:
        whole, wrong, newer = damaged(root, bar.expect, bar.advance)
    for path, why in sorted(wrong.items()):
        print(why if path.name in why else f"{path.name}: {why}")
    lost = [segment for one in by_namespace(whole) for segment in one.unreachable]
    for segment in lost:
        print(f"{path_of(root, segment).name} is whole, but cannot be reached.")
    nbytes = sum(entry.file_nbytes for entry in whole)
    print(
        f"{count(len(whole), 'file')} whole ({format_bytes(nbytes)}), {len(wrong)} damaged."
        + f" {len(lost)} cannot be reached: files before them are missing, or others hold the same."
        * bool(lost)
    )
    if newer:
        print(f"{count(len(newer), 'file')} of a newer version left alone, and not checked.")
    if options.delete and wrong:
        with writing(root) as (directory, _):
            for path in wrong:
                path.unlink(missing_ok=True)  # its header may be damaged, so it has only a name
            directory.entries()  # so that the index forgets them
        print(f"Deleted the {count(len(wrong), 'damaged file')}.")
    return 1 if wrong else 0


def prune(options: argparse.Namespace) -> int:
    """Let the least useful go until the rest fits."""
    root, most = options.cache_dir, _bytes("--to", options.to)
    must_be_one(root)
    if not options.yes and not _may_prune(root, most):
        return 0
    with writing(root) as (directory, entries):
        before = by_namespace(entries)
        gone = _least_useful(entries, most, sum(one.pinned_bytes() for one in before))
        left = _delete(directory, entries, gone)
    after = {one.namespace: one for one in by_namespace(left)}
    for was in before:
        one = after.get(was.namespace, Collection(was.namespace, []))
        had, has = (x.catalogue.store.stats().conversations for x in (was, one))
        print(
            f"{was.model or 'a model'} {was.namespace[:8]}: "
            f"{count(has, 'conversation')} of {had} and "
            f"{count(one.catalogue.checkpoints, 'checkpoint')} of {was.catalogue.checkpoints} stay."
        )
    held = sum(entry.file_nbytes for entry in left)
    print(f"Deleted {count(len(gone), 'file')}; {format_bytes(held)} stay.")
    if held > most:
        print(f"That is more than {format_bytes(most)}: pins keep it. `unpin` lets go of one.")
    return 1 if held > most else 0


def _may_prune(root: Path, most: int) -> bool:
    must_be_free(root)
    found = look(root)
    entries = [entry for one in found for entry in one.entries]
    names = {
        segment.name
        for segment in _least_useful(entries, most, sum(one.pinned_bytes() for one in found))
    }
    nbytes = sum(entry.file_nbytes for entry in entries if entry.segment.name in names)
    what = f"{count(len(names), 'file')} of {len(entries):,} ({format_bytes(nbytes)}) in {root}"
    return not names or _is_agreed("prune", what)


def _is_agreed(command: str, what: str) -> bool:
    """Ask at the terminal. Raises `SettingError` where there is none."""
    if not sys.stdin.isatty():
        raise SettingError(f"{command} deletes {what}; without a terminal to ask at, add --yes.")
    if input(f"Delete {what}? [y/N] ").strip().lower() in ("y", "yes"):
        return True
    print("Nothing was deleted.")
    return False


def _bytes(flag: str, text: str) -> int:
    try:
        return parse_bytes(text)
    except SettingError as error:
        raise SettingError(f"{flag} {error}") from error


def _least_useful(entries: Sequence[Entry], most: int, pinned: int) -> list[Segment]:
    """What goes so that at most `most` bytes stay, or the `pinned` ones, by the policy of servers."""
    catalogue, gone = loaded(entries)
    catalogue.on_unneeded(gone.append)
    catalogue.store.budget.limit(max(most, pinned))
    with suppress(BudgetError):  # a file that a pin needs in part stays whole
        catalogue.make_room(0)
    return gone


def clear(options: argparse.Namespace) -> int:
    """Delete everything."""
    root: Path = options.cache_dir
    must_be_one(root)
    if not options.yes:
        must_be_free(root)
        nbytes = sum(entry.file_nbytes for one in look(root) for entry in one.entries)
        if not _is_agreed("clear", f"all {format_bytes(nbytes)} in {root}"):
            return 0
    with writing(root) as (directory, entries):
        _delete(directory, entries, [entry.segment for entry in entries])
    print(f"Deleted {count(len(entries), 'file')}.")
    return 0


def _delete(directory: Directory, entries: Sequence[Entry], gone: Sequence[Segment]) -> list[Entry]:
    """Returns the entries that are left."""
    for segment in gone:
        directory.delete(segment)
    names = {segment.name for segment in gone}
    return [entry for entry in entries if entry.segment.name not in names]
