"""The command line of a cache directory: `mlx-hybridcache cache ls | stats | verify | prune | ...`.

It reads headers and moves files, so it needs no model, and shows no text: prompts are private.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from ..disk.archive import bring_in, export
from ..disk.contents import (
    SHORT,
    Collection,
    Run,
    by_namespace,
    damaged,
    find,
    is_being_written,
    loaded,
    look,
    must_be_free,
    must_be_one,
    path_of,
    writing,
    written_at,
)
from ..disk.directory import Directory
from ..disk.index import Entry
from ..disk.segment import Segment
from ..errors import BudgetError, SettingError
from ..flags import check_can_be_written
from ..sizes import format_bytes, parse_bytes


def main(argv: Sequence[str], prog: str = "mlx-hybridcache cache") -> int:
    """Run one command. 0: done; 1: something is damaged, or pins are in the way; 2: it cannot be done.

    Raises `HybridCacheError` and `OSError`, whose words say why.
    """
    parser = _parser(prog)
    if not argv:
        parser.print_help()
        return 0
    options = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--cache-dir", required=True, type=_path, help="the directory of a server")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], what: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[where], help=what, description=what)
        added.set_defaults(run=run)
        return added

    ls = command("ls", _ls, "conversations as a tree: positions, sizes, ages, ids")
    ls.add_argument("--all", action="store_true", help="every checkpoint on a line of its own")
    ls.add_argument("--json", action="store_true", help="the same for programs")

    stats = command("stats", _stats, "bytes and counts, per model and in total")
    stats.add_argument("--json", action="store_true", help="the same for programs")

    verify = command("verify", _verify, "check every file from its first byte to its last")
    verify.add_argument("--delete", action="store_true", help="delete those that are damaged")

    prune = command("prune", _prune, "let the least useful go, pins excepted")
    prune.add_argument("--yes", action="store_true", help="do not ask")
    prune.add_argument("--to", required=True, metavar="SIZE", help="what may stay: bytes, or 20GB")

    clear = command("clear", _clear, "delete everything, pins included")
    clear.add_argument("--yes", action="store_true", help="do not ask")

    for name, run in (("pin", _pin), ("unpin", _unpin)):
        pin = command(name, run, f"{name} a checkpoint and what leads to it")
        pin.add_argument("id", help="the beginning of an id that `ls` shows")

    sends = command("export", _export, "write a prefix with its checkpoints into one file")
    sends.add_argument("id", help="the beginning of an id that `ls` shows")
    sends.add_argument("--to", required=True, type=_path, metavar="FILE", help="the file to write")
    sends.add_argument(
        "--only-end", action="store_true", help="leave the checkpoints before the last one out"
    )
    sends.add_argument("--force", action="store_true", help="write over a file that is there")
    gets = command("import", _import, "put an exported prefix into this directory, and pin it")
    gets.add_argument("file", type=_path, help="what `export` wrote")
    gets.add_argument("--no-pin", action="store_true", help="it may go like everything else")
    return parser


def _path(text: str) -> Path:
    return Path(text).expanduser()


# Looking


def _ls(options: argparse.Namespace) -> int:
    root: Path = options.cache_dir
    found = look(root)
    times = written_at(root, (entry.segment for one in found for entry in one.entries))
    if options.json:
        _print_json(
            {
                "cache_dir": str(root),
                "namespaces": [
                    _facts(one) | {"runs": [_run_facts(run) for run in one.runs(times)]}
                    for one in found
                ],
            }
        )
        return 0
    console = _console()
    if not found:
        console.print(f"{root} holds nothing.", highlight=False)
    for one in found:
        console.print(_tree(one, one.runs(times), is_long=options.all), highlight=False)
    return 0


def _tree(one: Collection, runs: Sequence[Run], *, is_long: bool) -> Tree:
    stats = one.catalogue.store.stats()
    about = f" {one.namespace[:8]}: {_count(stats.conversations, 'conversation')}, "
    about += f"{_count(one.catalogue.checkpoints, 'checkpoint')}, {format_bytes(one.nbytes())}"
    tree = Tree(Text(one.model or "a model", "bold") + Text(about, "not bold"))
    branches: dict[Run | None, Tree] = {None: tree}
    for run in runs:
        branches[run] = branches[run.parent].add(Text(_line(one, run)))
        for place in run.places if is_long and one.has_states else ():
            words = [f"● {place.position:,}", format_bytes(place.nbytes)]
            words += ["pinned"] * place.is_pinned
            branches[run].add(Text("  ".join([*words, place.key[:SHORT]])))
    return tree


def _line(one: Collection, run: Run) -> str:
    """`[1,024, 3,000)  ● 6 checkpoints  3.1 MiB  3 min  disk  70658b181e03`.

    The id is that of the last checkpoint; its position is told where the run goes on behind it.
    """
    last = run.places[-1] if run.places else None
    words = [f"[{run.start:,}, {run.end:,})"]
    if one.has_states and last is not None:
        words.append(f"● {_count(len(run.places), 'checkpoint')}")
    words += [format_bytes(run.nbytes), _age(run), "disk"]
    words += ["pinned"] * any(place.is_pinned for place in run.places)
    if last is not None:
        at = f" at {last.position:,}" * (last.position != run.end)
        words.append(last.key[:SHORT] + at)
    return "  ".join(words)


def _run_facts(run: Run) -> dict[str, object]:
    return {
        "id": run.key[:SHORT],
        "parent": run.parent.key[:SHORT] if run.parent is not None else "",
        "depth": run.depth,
        "start": run.start,
        "end": run.end,
        "bytes": run.nbytes,
        "age_seconds": _seconds(run),
        "tier": "disk",
        "checkpoints": [
            {
                "id": place.key[:SHORT],
                "position": place.position,
                "bytes": place.nbytes,
                "pinned": place.is_pinned,
            }
            for place in run.places
        ],
    }


def _stats(options: argparse.Namespace) -> int:
    root: Path = options.cache_dir
    found = look(root)
    counts = [_counts(one) for one in found]
    total = {name: sum(one[name] for one in counts) for name in _LABELS}
    is_written = is_being_written(root)
    if options.json:
        _print_json(
            {
                "cache_dir": str(root),
                "is_being_written": is_written,
                "namespaces": [_facts(one) for one in found],
                "total": total,
            }
        )
        return 0
    table = Table(title=Text(str(root)))
    table.add_column("")
    for one in found:
        heading = Text(f"{one.model or 'a model'}\n{one.namespace[:8]}")
        table.add_column(heading, justify="right")
    table.add_column("total", justify="right")
    for name, label in _LABELS.items():
        show = format_bytes if "bytes" in name else "{:,}".format
        table.add_row(label, *(show(counted[name]) for counted in [*counts, total]))
    console = _console()
    console.print(table)
    console.print("A process is writing there." if is_written else "No process is writing there.")
    return 0


_LABELS = {
    "bytes": "bytes",
    "rows_bytes": "of rows",
    "states_bytes": "of states",
    "files": "files",
    "tokens": "tokens",
    "checkpoints": "checkpoints",
    "conversations": "conversations",
    "pinned": "pinned",
    "unreachable": "unreachable files",
}
"""What is counted of a namespace, for programs and for people."""


def _counts(one: Collection) -> dict[str, int]:
    stats = one.catalogue.store.stats()
    counted = (
        one.nbytes(),
        one.nbytes("rows"),
        one.nbytes("state"),
        len(one.entries),
        stats.tokens,
        one.catalogue.checkpoints,
        stats.conversations,
        stats.pinned,
        len(one.unreachable),
    )
    return dict(zip(_LABELS, counted, strict=True))


def _facts(one: Collection) -> dict[str, object]:
    return {"namespace": one.namespace, "model": one.model, **_counts(one)}


# Checking and deleting


def _verify(options: argparse.Namespace) -> int:
    root: Path = options.cache_dir
    must_be_one(root)
    if options.delete:
        must_be_free(root)
    with _progress("verify") as bar:
        whole, wrong, newer = damaged(root, bar.expect, bar.advance)
    for path, why in sorted(wrong.items()):
        print(why if path.name in why else f"{path.name}: {why}")
    lost = [segment for one in by_namespace(whole) for segment in one.unreachable]
    for segment in lost:
        print(f"{path_of(root, segment).name} is whole, but cannot be reached.")
    nbytes = sum(entry.file_nbytes for entry in whole)
    print(
        f"{_count(len(whole), 'file')} whole ({format_bytes(nbytes)}), {len(wrong)} damaged."
        + f" {len(lost)} cannot be reached: files before them are missing, or others hold the same."
        * bool(lost)
    )
    if newer:
        print(f"{_count(len(newer), 'file')} of a newer version left alone, and not checked.")
    if options.delete and wrong:
        with writing(root) as (directory, _):
            for path in wrong:
                path.unlink(missing_ok=True)  # its header may be damaged, so it has only a name
            directory.entries()  # so that the index forgets them
        print(f"Deleted the {_count(len(wrong), 'damaged file')}.")
    return 1 if wrong else 0


def _prune(options: argparse.Namespace) -> int:
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
            f"{_count(has, 'conversation')} of {had} and "
            f"{_count(one.catalogue.checkpoints, 'checkpoint')} of {was.catalogue.checkpoints} stay."
        )
    held = sum(entry.file_nbytes for entry in left)
    print(f"Deleted {_count(len(gone), 'file')}; {format_bytes(held)} stay.")
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
    what = f"{_count(len(names), 'file')} of {len(entries):,} ({format_bytes(nbytes)}) in {root}"
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
    catalogue.store.budget_bytes = max(most, pinned)
    with suppress(BudgetError):  # a file that a pin needs in part stays whole
        catalogue.make_room(0)
    return gone


def _clear(options: argparse.Namespace) -> int:
    root: Path = options.cache_dir
    must_be_one(root)
    if not options.yes:
        must_be_free(root)
        nbytes = sum(entry.file_nbytes for one in look(root) for entry in one.entries)
        if not _is_agreed("clear", f"all {format_bytes(nbytes)} in {root}"):
            return 0
    with writing(root) as (directory, entries):
        _delete(directory, entries, [entry.segment for entry in entries])
    print(f"Deleted {_count(len(entries), 'file')}.")
    return 0


def _delete(directory: Directory, entries: Sequence[Entry], gone: Sequence[Segment]) -> list[Entry]:
    """Returns the entries that are left."""
    for segment in gone:
        directory.delete(segment)
    names = {segment.name for segment in gone}
    return [entry for entry in entries if entry.segment.name not in names]


# Keeping and shipping


def _pin(options: argparse.Namespace) -> int:
    return _set_pin(options, is_pinned=True)


def _unpin(options: argparse.Namespace) -> int:
    return _set_pin(options, is_pinned=False)


def _set_pin(options: argparse.Namespace, *, is_pinned: bool) -> int:
    root: Path = options.cache_dir
    must_be_one(root)
    with writing(root) as (directory, entries):
        one, node = find(by_namespace(entries), options.id)
        directory.pin([segment.name for segment in one.segments(node)], is_pinned=is_pinned)
    print(f"{'Pinned' if is_pinned else 'Unpinned'} [0, {node.end:,}) of {one.model or 'a model'}.")
    return 0


def _export(options: argparse.Namespace) -> int:
    root: Path = options.cache_dir
    check_can_be_written("--to", options.to)
    if options.to.exists() and not options.force:
        raise SettingError(
            f"--to {options.to} exists already. Name another file, or add --force to write over it."
        )
    one, node = find(look(root), options.id)
    with _progress("export") as bar:
        sent = export(
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
        f"in {_count(len(sent.members), 'file')}, {format_bytes(sent.nbytes)}."
    )
    return 0


def _import(options: argparse.Namespace) -> int:
    root: Path = options.cache_dir
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        must_be_one(root)
        must_be_free(root)
    with _progress("import") as bar:
        prefix, written = bring_in(
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


# Showing


def _print_json(found: dict[str, object]) -> None:
    print(json.dumps(found, indent=2))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _seconds(run: Run) -> int:
    return max(0, int(time.time() - run.newest))


def _age(run: Run) -> str:
    """`45 s`, `3 min`, `7 h`, `12 d`."""
    seconds = _seconds(run)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _console() -> Console:
    """The terminal, or wide enough for whoever reads it where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


class _Bar:
    """Bytes done of bytes expected."""

    def __init__(self, progress: Progress, what: str):
        self._progress = progress
        self._task = progress.add_task(what, total=None)

    def expect(self, nbytes: int) -> None:
        self._progress.update(self._task, total=nbytes)

    def advance(self, nbytes: int) -> None:
        self._progress.advance(self._task, nbytes)


@contextmanager
def _progress(what: str) -> Iterator[_Bar]:
    """A bar on the terminal; nothing where there is none."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield _Bar(progress, what)
