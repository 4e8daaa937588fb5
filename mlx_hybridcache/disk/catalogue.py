"""What the directory holds, as trees: what a prompt finds there, what a checkpoint still lacks, what goes.

The trees, their policy and their accounting are the memory tier's own (`Store`); here rows and
checkpoints are parts of files. Splitting a run costs nothing, and a file goes when nothing needs any
part of it. Used on the worker thread only, and touches no file itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np

from ..errors import BudgetError
from ..store.budget import Claim
from ..store.store import Store
from ..store.tree import common_length
from ..tokens import Namespace, Tokens, as_tokens
from .chains import Chains, Link, Stretch, TreeUpdate, link_at
from .index import Entry
from .parts import FileEnd, FileFound, FileNode, FileRows, Files, FileState, FileStore, payloads
from .segment import PrefixDigest, Segment


@dataclass(frozen=True, slots=True)
class Lacking:
    """A segment that is not there yet: rows of `[start, end)`, or the state at `end`."""

    kind: Literal["rows", "state"]
    start: int
    end: int
    key: str
    parent: str

    @property
    def name(self) -> tuple[str, str]:
        return self.key, self.kind


class Catalogue:
    """The segments of one directory, inside `budget_bytes`.

    `on_unneeded` names who deletes what nothing needs any more. `needs_checkpoints` is that of the
    model that looks things up where nothing else is said; the files of others weigh and go by the same policy.
    `is_behind`: with files that went others were let go that hold some of the same, and are still there.
    """

    def __init__(self, budget_bytes: int, *, needs_checkpoints: bool):
        self._files = Files()
        self._needs_checkpoints = needs_checkpoints
        self.is_behind = False
        self.store: FileStore = Store(budget_bytes, needs_checkpoints=True, references=self._files)

    def on_unneeded(self, delete: Callable[[Segment], None]) -> None:
        """Tell `delete` of each file that nothing needs any more."""
        self._files.delete = delete

    # Reading

    def __contains__(self, segment: Segment) -> bool:
        return segment.name in self._files.used

    def find(self, namespace: str, tokens: Tokens, needs: bool | None = None) -> FileFound:
        """Where `tokens` can be resumed from files, at most one short of their end.

        `needs` says whether only where a state was written, if not as ever.
        """
        found = self.store.find(Namespace(namespace), tokens)
        reach = min(found.match.matched, len(tokens) - 1)
        if self._needs_checkpoints if needs is None else needs:
            # Not the end of rows of which no state was written, or is left.
            stands = (
                node
                for node in reversed(found.match.path)
                if isinstance(node.checkpoint, FileState) and node.end <= reach
            )
            node = next(stands, None)
            return replace(found, position=node.end if node else 0, node=node)
        return replace(found, position=reach, node=None)

    def lacking(
        self,
        namespace: str,
        tokens: Tokens,
        *,
        state: bool,
        step: int,
        cut: int = 0,
        coming: Sequence[tuple[Segment, Tokens]] = (),
    ) -> list[Lacking]:
        """What must be written so that `tokens` can be restored at their end, in order.

        Rows end at multiples of `step`, so that a file is never large, and at `cut`. With `state`, the checkpoint
        at the end too. `coming` is being written already, in this order, each with all tokens that
        lead to it.
        """
        found = self.find(namespace, tokens)
        start, end = _reach(found.match.matched, namespace, tokens, coming), len(tokens)
        steps = range(start - start % step + step, end, step)
        ends = sorted({*steps, end, *([cut] if start < cut < end else [])}) if start < end else []
        keys = self._keys(found, namespace, tokens, [start, *ends])
        taken = [self._take_back(key, tokens[:at]) for at, key in zip(ends, keys[1:], strict=True)]
        if any(taken):
            return self.lacking(namespace, tokens, state=state, step=step, cut=cut, coming=coming)
        bounds = list(zip([start, *ends], keys, strict=True))
        rows = [
            Lacking("rows", a, b, key, parent if a else "")
            for (a, parent), (b, key) in pairwise(bounds)
        ]
        if not state or _has_state(found, end):
            return rows
        return [*rows, Lacking("state", end, end, keys[-1], keys[-1])]

    def _keys(
        self, found: FileFound, namespace: str, tokens: Tokens, ends: Sequence[int]
    ) -> list[str]:
        """The keys of `[0, end)` for ascending ends. What was found is not read again for them."""
        digest, at = PrefixDigest(namespace), min(found.match.matched, ends[0])
        if (link := self._link_at(found.nodes(), at)) is not None:
            digest = link.digest
        keys = []
        for end in ends:
            digest = digest.read(tokens[at:end])
            keys.append(digest.key)
            at = end
        return keys

    def _link_at(self, path: Sequence[FileNode], position: int) -> Link | None:
        """How files lead to a position on a path; None at the beginning."""
        for node in reversed(path):
            for rows in reversed(node.rows):
                if rows.start < position <= rows.end:
                    return link_at(position, rows.segment, self._files.leads[rows.segment.name])
        return None

    def _take_back(self, key: str, tokens: Tokens) -> bool:
        """Need all of a file again of which only the beginning was needed any more.

        What would be written in its place has its name.
        """
        segment = self._files.segments.get(f"{key[:2]}/{key}.rows.safetensors")
        try:
            return segment is not None and self.add(segment, tokens)
        except BudgetError:
            return False

    @property
    def files(self) -> int:
        """How many files are needed."""
        return len(self._files.used)

    @property
    def checkpoints(self) -> int:
        """How many of them are checkpoints."""
        return self._files.states

    def segments(self) -> list[Segment]:
        """Every segment that is needed."""
        return list(self._files.segments.values())

    # Changing

    def load(self, entries: Sequence[Entry]) -> list[Segment]:
        """Take over what a directory holds; returns what nothing leads to."""
        chains = Chains()
        return [*self.take(chains.change(entries)), *chains.orphans()]

    def take(self, update: TreeUpdate) -> list[Segment]:
        """Do what a change of the directory comes to; returns files that turn out to be of no use.

        Takes as long as the change, and for each run that comes as long as what leads to it. What is over
        the budget afterwards goes, least useful first.
        """
        self._files.went.clear()
        for segment in update.gone:
            self.forget(segment)
        self.is_behind |= not self._files.went <= update.behind
        self._files.went.clear()
        budget = self.store.budget.limit_bytes
        self.store.budget.limit(sys.maxsize)
        useless = [one for come in update.come for one in self._take(come)]
        for entry, link in update.noted:
            self._remember(self._at(link), entry)
        self.store.budget.limit(budget)
        self.keep_budget()
        return [*useless, *update.orphans]

    def _take(self, stretch: Stretch) -> list[Segment]:
        """One stretch, behind what stands at its beginning."""
        namespace = Namespace(stretch.link.segment.namespace)
        if stretch.lead is None:
            above: FileNode | None = self.store.root(namespace)
        else:
            above = self._at(stretch.lead)
        node = self._graft(stretch, above) if above is not None else None
        useless = [] if node is not None else self._add_each(stretch)
        node = node or self._at(stretch.link)
        if node is not None:
            if stretch.link.end == stretch.link.segment.end and stretch.link.segment in self:
                self._files.ends[stretch.link.segment.name] = node
            if stretch.stands is not None:
                self._remember(node, stretch.stands)
            while node.parent is not None and node.last_passed < stretch.passed:
                node.pass_by(stretch.passed)
                node = node.parent
        else:
            self.store.tidy(namespace)
        self.store.clock = max(self.store.clock, stretch.passed)
        return useless

    def _graft(self, stretch: Stretch, above: FileNode) -> FileNode | None:
        """The end of a stretch that is all new. None, and nothing done, where some of it is there."""
        stands, node, start = stretch.stands, above, above.end
        rows: list[FileRows] = []
        for part in stretch.parts:
            rows.append(FileRows(part.segment, start, part.end))
            start = part.end
        if rows:
            tokens = np.concatenate([each.tokens() for each in rows])
            if above.child(int(tokens[0])) is not None:
                return None
            for each, part in zip(rows, stretch.parts, strict=True):
                self.store.budget.hold(self._files.add(each.segment, each.nbytes, part.above))
            node = self.store.graft(above, as_tokens(tokens), tuple(rows))
        if stands is not None and stretch.restores:
            self.store.stand(node, FileEnd(stands.segment), is_branch_point=stretch.is_branch_point)
        elif stands is not None:
            if isinstance(node.checkpoint, FileState):
                return None
            is_branch_point = stretch.is_branch_point or len(node.children or ()) > 1
            self.store.budget.hold(
                self._files.add(stands.segment, stands.segment.file_nbytes, stretch.link)
            )
            self.store.stand(node, FileState(stands.segment), is_branch_point=is_branch_point)
        return node

    def _add_each(self, stretch: Stretch) -> list[Segment]:
        """Some of a stretch is there, or nothing leads to it: file by file; those of no use."""
        segments = list(stretch.segments())
        if stretch.lead is not None:  # of which some may have been let go here, though it is there
            self._add_rows(stretch.lead.chain(), restores=stretch.restores)
        self._add_rows(stretch.parts, restores=stretch.restores)
        if stretch.stands is not None and not stretch.restores:
            tokens = stretch.link.tokens()
            self.add(stretch.stands.segment, tokens, is_branch_point=stretch.is_branch_point)
        return [segment for segment in segments if segment not in self]

    def _add_rows(self, links: Sequence[Link], *, restores: bool) -> None:
        """The files of these links, each behind the one before it, where they are not needed in whole yet."""
        for link in links:
            segment = link.segment
            if self._files.used.get(segment.name) != segment.file_nbytes:
                above = [link.above.tokens()] if link.above is not None else []
                self.add(segment, np.concatenate([*above, segment.tokens]), restores=restores)

    def lacks(self, stretch: Stretch) -> bool:
        """Whether some of its files are not here."""
        return any(segment not in self for segment in stretch.segments())

    def _at(self, link: Link) -> FileNode | None:
        """The node that ends where a link does."""
        node = self._files.standing(link)
        return node or self._node(link.segment.namespace, link.tokens())

    def keep_budget(self) -> None:
        """Let go what is over the budget; pins too where they alone are, the oldest first."""
        pinned: list[FileNode] | None = None
        while True:
            try:
                return self.make_room(0)
            except BudgetError:
                if pinned is None:
                    pinned = [node for node in self.store.nodes() if node.pinned]
                    pinned.sort(key=lambda node: node.last_used, reverse=True)
                if not pinned:
                    raise
                unpinned = pinned.pop()
                unpinned.pin(is_pinned=False)

    def _remember(self, node: FileNode | None, entry: Entry) -> None:
        """Its recency and its pin, from the index."""
        stands = node.checkpoint if node is not None else None
        is_its_own = isinstance(stands, FileState) == (entry.segment.kind == "state")
        if node is not None and stands is not None and is_its_own:
            node.use(entry.used)
            node.pin(is_pinned=entry.pinned)
        self.store.clock = max(self.store.clock, entry.used)

    def add(
        self,
        segment: Segment,
        tokens: Tokens,
        *,
        restores: bool | None = None,
        is_branch_point: bool = False,
    ) -> bool:
        """A segment is in the directory: `tokens` are all that lead to its end.

        `restores` says that rows do so by themselves, as with the model that looks things up if it is
        not given; `is_branch_point` that prompts have parted ways here, as they have where the tree branches.
        False where what it holds is there, or the rows before it are not; `BudgetError` without room.
        """
        segment = self._files.segments.get(segment.name, segment)
        found = self.store.find(namespace := Namespace(segment.namespace), tokens)
        if not _adds(segment, found, len(tokens)):
            return False
        if segment not in self:
            self.make_room(segment.file_nbytes, found.match.nodes())
        lead = self._link_at(found.nodes(), segment.start)
        stands: FileState | FileEnd | None = None
        if segment.kind == "state":
            stands = FileState(segment)
            is_branch_point |= self._clear_end(segment.namespace, tokens)
        elif not self._needs_checkpoints if restores is None else restores:
            stands = FileEnd(segment)
        if not self.store.save(
            namespace,
            tokens,
            partial(self._rows, segment, lead),
            stands,
            rows_nbytes=_nothing,  # of a file all bytes count, whatever part is needed: there is room
            is_end=stands is not None,
            is_branch_point=is_branch_point,
        ):
            raise BudgetError(f"{segment.name} does not fit the disk budget beside what is kept.")
        if segment.kind == "state":
            self._files.add(segment, segment.file_nbytes, lead)
        return True

    def _rows(self, segment: Segment, lead: Link | None, start: int) -> FileRows:
        """Those of a file from `start` on, which are needed from now on."""
        rows = FileRows(segment, start, segment.end)
        self.store.budget.hold(self._files.add(segment, rows.nbytes, lead))
        return rows

    def _clear_end(self, namespace: str, tokens: Tokens) -> bool:
        """A `FileEnd` goes: this model has states after all. Whether several runs go on from here."""
        node = self._node(namespace, tokens)
        if node is None:
            return False
        node.set_checkpoint(None)
        return len(node.children or ()) > 1

    def make_room(self, nbytes: int, keep: Iterable[FileNode] = ()) -> None:
        """Let the least useful go until `nbytes` more fit. Raises `BudgetError` when they do not."""
        self.store.budget.make_room(nbytes, keep)

    def claim(self, nbytes: int, paths: Iterable[tuple[str, Tokens]]) -> Claim:
        """Room for `nbytes` that are about to be written; what leads to `paths` stays.

        Raises `BudgetError` when there is none.
        """
        if not self.store.budget.has_room(nbytes):
            keep = [
                node
                for namespace, tokens in paths
                for node in self.store.find(Namespace(namespace), tokens).nodes()
            ]
            self.make_room(nbytes, keep)
        return self.store.claim(nbytes)

    def use(self, found: FileFound) -> list[str]:
        """Refresh what was restored; returns the files whose recency that is."""
        self.store.use(found)
        used = [found.node] if found.node is not None else found.match.path[-1:]
        return [payload.segment.name for payload in payloads(used)]

    def forget(self, segment: Segment) -> None:
        """A file is damaged or gone: it goes, and what cannot be restored without it."""
        node = self._first_with(segment) if segment in self else None
        if node is not None:
            self.store.forget(node, rows=segment.kind == "rows")

    def _first_with(self, segment: Segment) -> FileNode | None:
        """The first node with a part of a file. They lie one below the other."""
        lead = self._files.leads[segment.name]
        end = Link(segment, segment.end, lead, PrefixDigest("")) if segment.kind == "rows" else lead
        assert end is not None
        node = self._files.standing(end)
        path: Sequence[FileNode] = ()
        while node is not None and node.end > segment.start - (segment.kind == "state"):
            path, node = [node, *path], node.parent
        parts = [node for node in path if _is_part(segment, node)]
        if not parts:
            path = self.store.find(Namespace(segment.namespace), end.tokens()).nodes()
            parts = [node for node in path if _is_part(segment, node)]
        return parts[0] if parts else None

    def pin(self, namespace: str, tokens: Tokens, *, is_pinned: bool) -> list[str]:
        """Keep what restores `tokens` at their end whatever comes, or no longer; returns its files."""
        node = self._node(namespace, tokens)
        if node is None or node.checkpoint is None:
            return []
        node.pin(is_pinned=is_pinned)
        return [payload.segment.name for payload in payloads([node])]

    def _node(self, namespace: str, tokens: Tokens) -> FileNode | None:
        path = self.store.find(Namespace(namespace), tokens).match.path
        return path[-1] if path and path[-1].end == len(tokens) else None


def _nothing(start: int, end: int) -> int:
    """What rows `[start, end)` weigh by themselves."""
    return 0


def _reach(
    matched: int, namespace: str, tokens: Tokens, coming: Iterable[tuple[Segment, Tokens]]
) -> int:
    """How far rows will lead along `tokens`, of which `matched` are there, once all that comes is there.

    Rows whose own beginning is not will not be taken, so nothing can be built on them.
    """
    for segment, leading in coming:
        is_led = segment.namespace == namespace and segment.start <= matched
        if segment.kind == "rows" and is_led:
            matched = max(matched, min(common_length(tokens, leading), segment.end))
    return matched


def _adds(segment: Segment, found: FileFound, end: int) -> bool:
    """Whether a segment that ends there has what is not there yet, and what leads to it is."""
    matched = found.match.matched
    if segment.kind == "rows":
        return segment.start <= matched < end
    return matched == end and not _has_state(found, end)


def _has_state(found: FileFound, end: int) -> bool:
    path = found.match.path
    return bool(path) and path[-1].end == end and isinstance(path[-1].checkpoint, FileState)


def _is_part(segment: Segment, node: FileNode) -> bool:
    return any(payload.segment.name == segment.name for payload in payloads([node]))
