"""Which file leads to which: put together from their headers, and put right file by file.

A key covers all tokens before it, so a file is believed only behind those that hold them. Whoever
looks at a directory keeps its chains on a thread of his own; what comes of a change (`TreeUpdate`) never changes
itself, is as long as the change, and is ready to be grafted onto the trees.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ..tokens import Tokens, as_tokens
from .index import Entry
from .segment import PrefixDigest, Segment

T = TypeVar("T")

PrefixId = tuple[str, str]
"""A position that something may go on from, whatever leads to it: a namespace, and the key of its tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """Position `end`, inside or at the end of `segment`'s run, and what leads to where that begins."""

    segment: Segment
    end: int
    above: Link | None
    digest: PrefixDigest

    @property
    def prefix(self) -> PrefixId:
        """The same for every link to this position."""
        return self.segment.namespace, self.digest.key

    def run(self) -> Tokens:
        """The tokens of its own segment up to here."""
        return self.segment.tokens[: self.end - self.segment.start]

    def chain(self) -> list[Link]:
        """This one behind all that lead here."""
        links, link = [self], self.above
        while link is not None:
            links.append(link)
            link = link.above
        return links[::-1]

    def tokens(self) -> Tokens:
        """All tokens that lead here."""
        return as_tokens(np.concatenate([link.run() for link in self.chain()]))


def link_at(position: int, segment: Segment, above: Link | None) -> Link:
    """A position in rows to whose beginning `above` leads."""
    digest = above.digest if above is not None else PrefixDigest(segment.namespace)
    run = segment.tokens[: position - segment.start]
    return Link(segment, position, above, digest.read(run))


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows `[lead.end, link.end)`, at whose end something stands, branches, or nothing goes on.

    `parts` are links to where each file's part of them ends; without any, the rows are there already.
    `stands` is the checkpoint at the end, or with `restores` the last file, as rows do so by themselves.
    `passed` is the latest use here or below, `is_branch_point` that several runs go on from here.
    """

    lead: Link | None
    link: Link
    parts: tuple[Link, ...]
    stands: Entry | None
    restores: bool
    is_branch_point: bool
    passed: int

    def segments(self) -> Iterator[Segment]:
        """All files that it has a part of."""
        yield from (part.segment for part in self.parts)
        if self.stands is not None:
            yield self.stands.segment


@dataclass(frozen=True, slots=True)
class TreeUpdate:
    """What a change of the directory comes to, in the order in which it is to be done.

    `gone` files lead nowhere any more, and nor do those `behind` them; what is linked otherwise is in
    `come` again.
    `noted` are known files whose recency or pin changed. Nothing leads to `orphans`.
    """

    gone: tuple[Segment, ...] = ()
    behind: frozenset[str] = frozenset()
    come: tuple[Stretch, ...] = ()
    noted: tuple[tuple[Entry, Link], ...] = ()
    orphans: tuple[Segment, ...] = ()

    def pieces(self, most: int) -> Iterator[TreeUpdate]:
        """The same in steps of at most so many."""
        yield from (TreeUpdate(gone=each, behind=self.behind) for each in _batched(self.gone, most))
        yield from (TreeUpdate(come=each) for each in _batched(self.come, most))
        yield from (TreeUpdate(noted=each) for each in _batched(self.noted, most))
        yield from (TreeUpdate(orphans=each) for each in _batched(self.orphans, most))


def _batched(items: tuple[T, ...], most: int) -> Iterator[tuple[T, ...]]:
    return (items[at : at + most] for at in range(0, len(items), most))


class Chains:
    """All files of a directory that are known, and where each is linked.

    `hashed_tokens` is what it took so far.
    """

    def __init__(self) -> None:
        self.hashed_tokens = 0
        self._entries: dict[str, Entry] = {}
        self._links: dict[str, Link] = {}  # rows at their end; states where they stand
        self._known: dict[PrefixId, Link] = {}
        self._unlinked: dict[str, Entry] = {}
        self._states: Counter[str] = Counter()  # by namespace

    def change(self, entries: Iterable[Entry], gone: Iterable[str] = ()) -> TreeUpdate:
        """These came or are others now, and those went.

        Takes as long as what changed; where something went, or begins inside of another's run, it
        looks once at each file's name too.
        """
        leaving = {name: old for name in gone if (old := self._forget(name)) is not None}
        noted, new = [], []
        for entry in entries:
            name = entry.segment.name
            old = self._entries.get(name)
            if old is not None and old.segment != entry.segment:
                leaving[name], old = old, self._forget(name)
            if old is None or name not in self._entries:
                self._states[entry.segment.namespace] += entry.segment.kind == "state"
                self._unlinked[name] = entry
                new.append(name)
            elif old != entry and name in self._links:
                noted.append((entry, self._links[name]))
            self._entries[name] = entry
        lost = tuple(old.segment for name, old in leaving.items() if name in self._links)
        behind: set[str] = set()
        if leaving:
            behind = self._unlink(set(leaving))
            new += [name for name in behind if name in self._unlinked]
        return TreeUpdate(lost, frozenset(behind), self._stretches(self._link(new)), tuple(noted))

    def orphans(self) -> tuple[Segment, ...]:
        """What nothing leads to."""
        return tuple(entry.segment for entry in self._unlinked.values())

    def _forget(self, name: str) -> Entry | None:
        entry = self._entries.pop(name, None)
        self._unlinked.pop(name, None)
        if entry is not None and entry.segment.kind == "state":
            self._states[entry.segment.namespace] -= 1
        return entry

    def _unlink(self, dead: set[str]) -> set[str]:
        """Let go of these links and of those behind them; returns all of their files."""
        in_order = sorted(
            self._links.items(), key=lambda item: (item[1].segment.start, _is_state(*item))
        )
        for name, link in in_order:
            above = link if _is_state(name, link) else link.above
            if above is not None and above.segment.name in dead:
                dead.add(name)
        for name in dead:
            self._links.pop(name, None)
        self._known = {
            prefix: link for prefix, link in self._known.items() if link.segment.name not in dead
        }
        for name, link in self._links.items():
            if not _is_state(name, link):
                self._known.setdefault(link.prefix, link)
        self._unlinked |= {name: self._entries[name] for name in dead if name in self._entries}
        return dead

    def _link(self, new: Collection[str]) -> list[str]:
        """Link what can be linked; returns the files that were. `new` are those that never were tried."""
        waiting = sorted(
            self._unlinked.items(), key=lambda item: (item[1].segment.kind, item[1].segment.start)
        )  # rows before what goes on from them, and before states
        inside = self._inside(waiting)
        if fresh := [inside[name] for name in new if name in inside]:
            cuts = _Cuts(fresh)
            for name, link in self._links.items():
                if not _is_state(name, link):
                    self._cut(link, cuts)
        cuts, linked = _Cuts(inside.values()), []
        for name, entry in waiting:
            segment = entry.segment
            prefix, at = _begins(entry)
            above = self._known.get(prefix) if at else None
            if at and (above is None or above.end != at):
                continue
            if segment.kind == "rows":
                link = link_at(segment.end, segment, above)
                self.hashed_tokens += len(segment.tokens)
                if link.digest.key != segment.key:
                    continue
                self._known.setdefault(link.prefix, link)
                self._cut(link, cuts)
            else:
                assert above is not None
                link = above
            self._links[name] = link
            del self._unlinked[name]
            linked.append(name)
        return linked

    def _inside(self, waiting: Sequence[tuple[str, Entry]]) -> dict[str, tuple[PrefixId, int]]:
        """Where those begin that may do so inside of another's run, as no known one ends there."""
        ends = {
            (entry.segment.namespace, entry.segment.key) for _, entry in waiting if _has_rows(entry)
        }
        begins = {name: _begins(entry) for name, entry in waiting}
        return {
            name: (prefix, at)
            for name, (prefix, at) in begins.items()
            if at and prefix not in ends and prefix not in self._known
        }

    def _cut(self, link: Link, cuts: _Cuts) -> None:
        """Know the positions inside a run at which something else begins or stands."""
        segment, above = link.segment, link.above
        digest = above.digest if above is not None else PrefixDigest(segment.namespace)
        at = segment.start
        for position in cuts.inside(segment):
            digest = digest.read(segment.tokens[at - segment.start : position - segment.start])
            self.hashed_tokens += position - at
            at = position
            if (segment.namespace, digest.key) in cuts.prefixes:
                cut = Link(segment, position, above, digest)
                self._known.setdefault(cut.prefix, cut)

    def _stretches(self, linked: Sequence[str]) -> tuple[Stretch, ...]:
        """What was linked just now, parents first, depth first."""
        comes = _Coming(self._entries, self._links, self._known, linked)
        found: list[Stretch] = []
        waiting = comes.tops()
        while waiting:
            lead, left = waiting.pop()
            parts: list[Link] = []
            restores, stands, onward = False, None, [(lead, left)]
            while stands is None and len(onward) == 1:
                ((_, left),) = onward
                link = left.pop()
                parts.append(link)
                restores = not self._states[link.segment.namespace] and not left
                stands, onward = comes.at(link, left)
                if restores:
                    stands = self._entries[link.segment.name]
            used = [self._entries[part.segment.name].used for part in parts]
            used += [stands.used] if stands is not None else []
            is_branch_point = len(onward) > 1
            found.append(
                Stretch(lead, link, tuple(parts), stands, restores, is_branch_point, max(used))
            )
            waiting += reversed(onward)
        for prefix, entry in comes.states.items():  # their rows were there before
            link = self._known[prefix]
            found.append(Stretch(link, link, (), entry, False, False, entry.used))
        return _with_passed(found)


class _Coming:
    """What was linked just now, by where it begins: rows, each with where parts of it end, and states."""

    def __init__(
        self,
        entries: Mapping[str, Entry],
        links: Mapping[str, Link],
        known: Mapping[PrefixId, Link],
        linked: Sequence[str],
    ):
        rows = {name: links[name] for name in linked if _has_rows(entries[name])}
        self.states = {links[name].prefix: entries[name] for name in linked if name not in rows}
        self._rows = rows
        self._going_on: dict[PrefixId, list[Link]] = defaultdict(list)
        for link in rows.values():
            if link.above is not None:
                self._going_on[link.above.prefix].append(link)
        self._ends = {name: [link] for name, link in rows.items()}
        for prefix in self.states.keys() | self._going_on.keys():
            cut = known[prefix]
            if cut.segment.name in rows and cut.end < cut.segment.end:
                self._ends[cut.segment.name].append(cut)
        for ends in self._ends.values():
            ends.sort(key=lambda link: link.end, reverse=True)

    def tops(self) -> list[tuple[Link | None, list[Link]]]:
        """Rows that begin behind nothing that comes, the first last; each with where its parts end, the last first."""
        tops = [
            link
            for link in self._rows.values()
            if link.above is None or link.above.segment.name not in self._rows
        ]
        return [(link.above, self._ends[link.segment.name]) for link in reversed(tops)]

    def at(
        self, link: Link, left: list[Link]
    ) -> tuple[Entry | None, list[tuple[Link | None, list[Link]]]]:
        """What stands there, and what goes on, `left` of the same file included.

        Both are taken out: another file may end at the same place.
        """
        onward: list[tuple[Link | None, list[Link]]] = [
            (link, self._ends[each.segment.name]) for each in self._going_on.pop(link.prefix, ())
        ]
        onward += [(link, left)] if left else []
        return self.states.pop(link.prefix, None), onward


class _Cuts:
    """Positions where something begins inside of another's run, or stands."""

    def __init__(self, found: Iterable[tuple[PrefixId, int]]):
        self.prefixes: set[PrefixId] = set()
        self._positions: dict[str, list[int]] = defaultdict(list)
        for prefix, at in found:
            self.prefixes.add(prefix)
            self._positions[prefix[0]].append(at)
        for namespace, positions in self._positions.items():
            self._positions[namespace] = sorted(set(positions))

    def inside(self, segment: Segment) -> Sequence[int]:
        """Those strictly inside a run."""
        positions = self._positions.get(segment.namespace, ())
        first = bisect.bisect_right(positions, segment.start)
        return positions[first : bisect.bisect_left(positions, segment.end, first)]


def _with_passed(found: Sequence[Stretch]) -> tuple[Stretch, ...]:
    """Each with the latest use below it, which are behind it."""
    latest: dict[Link, int] = {}
    done: list[Stretch] = []
    for stretch in reversed(found):
        passed = max(stretch.passed, latest.get(stretch.link, 0))
        done.append(replace(stretch, passed=passed))
        if stretch.lead is not None and stretch.parts:
            latest[stretch.lead] = max(passed, latest.get(stretch.lead, 0))
    return tuple(reversed(done))


def _begins(entry: Entry) -> tuple[PrefixId, int]:
    """Where rows begin or a state stands."""
    segment = entry.segment
    if segment.kind == "rows":
        return (segment.namespace, segment.parent), segment.start
    return (segment.namespace, segment.key), segment.end


def _has_rows(entry: Entry) -> bool:
    return entry.segment.kind == "rows"


def _is_state(name: str, link: Link) -> bool:
    return name != link.segment.name
