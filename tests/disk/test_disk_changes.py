"""What a change of a cache directory costs: as much as the change, and hardly anything of it on the worker."""

import logging
import sys
import threading
from contextlib import contextmanager

import numpy as np
import oracle
import pytest
import tiny
from directories.faults import Said, segments, served
from long import forms
from test_catalogue import STEP, Filed

from mlx_hybridcache.disk import index as index_module
from mlx_hybridcache.disk import thread
from mlx_hybridcache.disk.catalogue import Catalogue
from mlx_hybridcache.disk.chains import Chains
from mlx_hybridcache.disk.directory import Directory
from mlx_hybridcache.disk.index import Entry, Index
from mlx_hybridcache.disk.parts import FileState
from mlx_hybridcache.disk.segment import PrefixDigest
from mlx_hybridcache.disk.tier import tier, write_behind
from mlx_hybridcache.disk.tier.write_behind import Waiting
from mlx_hybridcache.store.tree import Node, PrefixTree
from mlx_hybridcache.tokens import Namespace, as_tokens

MODEL = "qwen3_next"
PATIENCE_SECONDS = 30


def files_of(*prompts, namespace="ab", state=True):
    """The files of these prompts, as one process after another would write them, with recencies."""
    filed = Filed()
    written = [one for tokens in prompts for one in filed.write(tokens, namespace, state)]
    return [Entry(one, used, False, one.file_nbytes) for used, one in enumerate(written, 1)]


def path_of_files(count, seed=0):
    """A prompt whose files of rows number `count`, each with a checkpoint at its end."""
    tokens = as_tokens(np.random.default_rng(seed).integers(0, 1000, size=count * STEP))
    return files_of(*(tokens[: STEP * (at + 1)] for at in range(count)))


def restorable(catalogue):
    """Every prefix that files restore: where states stand, or any of a model of rows alone."""
    found = set()
    for node in catalogue.store.nodes():
        tokens = tuple(int(token) for part in node.path() for token in part.tokens)
        if isinstance(node.checkpoint, FileState):
            found.add(("ab", tokens))
        elif node.path()[0].rows[0].segment.namespace == "cd":
            found |= {("cd", tokens[:end]) for end in range(node.start, node.end + 1)}
    return found


@contextmanager
def visits(monkeypatch):
    """How many nodes are stepped to, downwards or one after another."""
    count = [0]
    child, descendants = Node.child, Node.descendants

    def counted_child(self, token):
        count[0] += 1
        return child(self, token)

    def counted_descendants(self):
        for node in descendants(self):
            count[0] += 1
            yield node

    with monkeypatch.context() as patch:
        patch.setattr(Node, "child", counted_child)
        patch.setattr(Node, "descendants", counted_descendants)
        yield count


# The index tells what changed


@pytest.mark.parametrize("count", forms(150, 1000))
def test_the_index_reads_as_many_rows_as_changed(tmp_path, count):
    """Twice as many files are noted; then one is used twice, one pinned, one dropped and one added: five rows."""
    entries = path_of_files(count)
    writer = Index(tmp_path / "index.sqlite")
    writer.put(entries[:-1])
    number = writer.number()
    names = [entry.segment.name for entry in entries]
    writer.touch(names[:1], 7)
    writer.touch(names[:1], 9)
    writer.pin(names[1:2], True)
    writer.drop(names[2:3])
    writer.put(entries[-1:])
    reader, rows = Index.read_only(tmp_path / "index.sqlite"), []
    reader._db.row_factory = lambda cursor, row: rows.append(row) or row
    changes = reader.since(number)
    assert len(rows) == 1 + 5  # the first one says that nothing is missing
    assert changes.gone == names[2:3]
    assert {(e.segment.name, e.used, e.pinned) for e in changes.entries} == {
        (names[0], 9, False),
        (names[1], 2, True),
        (names[-1], len(names), False),
    }
    assert changes.number == number + 5 == writer.number()
    assert reader.since(changes.number).entries == []
    reader.close()
    writer.close()


def test_an_index_does_not_tell_what_it_no_longer_remembers(tmp_path, monkeypatch):
    """Of ten changes five are remembered; of another index nothing is; an older release's tells none."""
    monkeypatch.setattr(index_module, "_LOG", index_module._LOG.replace("- 10000", "- 5"))
    path = tmp_path / "index.sqlite"
    index, entries = Index(path), path_of_files(5)
    first = index.number()
    index.put(entries)
    assert index.since(first) is None
    assert index.since(first + 5) is None
    assert len(index.since(first + 6).entries) == 4
    last = index.number()
    index.close()
    path.unlink()
    index = Index(path)
    assert index.since(last) is None
    for trigger in ("added", "noted", "dropped", "remembered"):
        index._db.execute(f"DROP TRIGGER {trigger}")
    index._db.execute("DROP TABLE changes")
    assert index.number() is None
    index.close()
    index = Index(path)  # the next writer of this release begins to
    assert not index.was_new
    assert index.number() is not None
    index.close()


def looked_at(directory, names):
    """What a look at a directory does to files: its outcome, and the audit events named."""
    events = []
    _watching.append((threading.get_ident(), names, events))
    try:
        return directory.news(), events
    finally:
        _watching.clear()


_watching = []


def _hook(event, arguments):
    for ident, names, events in _watching:
        if event in names and ident == threading.get_ident():
            events.append((event, arguments[0]))


sys.addaudithook(_hook)


def test_a_reader_lists_no_folder_for_what_the_index_tells(tmp_path):
    """200 files, one more is written and one deleted: two pieces of news, and no folder is listed."""
    writer, reader = Directory(tmp_path), Directory(tmp_path)
    writer.open()
    entries = path_of_files(101)
    data = {e.segment.name: [memoryview(bytes(e.segment.data_nbytes))] for e in entries}
    for entry in entries[:-1]:
        writer.write(entry, data[entry.segment.name])
    assert len(reader.open()) == len(entries) - 1
    assert not reader.is_writer
    assert reader.news() is None
    writer.write(entries[-1], data[entries[-1].segment.name])
    writer.delete(entries[0].segment)
    news, listed = looked_at(reader, {"os.scandir", "os.listdir"})
    assert (news.entries, news.gone, news.is_whole) == (
        entries[-1:],
        [entries[0].segment.name],
        False,
    )
    assert listed == []
    writer.close()
    news, listed = looked_at(reader, {"os.scandir"})
    assert news.is_whole  # it is the writer now
    assert len(news.entries) == len(entries) - 1
    assert listed
    reader.close()


# Chains


def test_linking_reads_every_token_once():
    """50 files in a row, then one more: 400 tokens are hashed, then 8."""
    entries = path_of_files(51)
    chains = Chains()
    difference = chains.change(entries[:-2])
    assert chains.hashed_tokens == 50 * STEP
    assert len(difference.come) == 50
    difference = chains.change(entries[-2:])
    assert chains.hashed_tokens == 51 * STEP
    assert [come.link.end for come in difference.come] == [51 * STEP]


def test_what_changed_gives_the_same_trees_as_a_look_at_all():
    """70 random steps: prompts that branch anywhere come, files go, are noted, and come back."""
    chance = np.random.default_rng(1)
    base = chance.integers(0, 4, size=60)
    there, chains, filed = {}, Chains(), Filed()
    for at in range(70):
        came, went = [], []
        if chance.random() < 0.6:
            tokens = as_tokens([*base[: chance.integers(60)], *chance.integers(0, 4, size=20)])
            namespace, state = ("ab", True) if chance.random() < 0.7 else ("cd", False)
            known = Filed(needs_checkpoints=state)
            known.catalogue.load(list(there.values()))
            came = noted(known.write(tokens, namespace, state), at + 1)
        elif there:
            names = chance.choice(sorted(there), size=min(3, len(there)), replace=False)
            if chance.random() < 0.5:
                went = [str(name) for name in names]
            else:
                came = noted([there[str(name)].segment for name in names], at + 1)
        for name in went:
            del there[name]
        there |= {entry.segment.name: entry for entry in came}
        filed.catalogue.take(chains.change(came, went))
        if filed.catalogue.is_behind:  # files that went held some of the same as others
            filed.catalogue.is_behind = False
            chains = Chains()
            filed.catalogue.take(chains.change(there.values()))
        fresh = Filed()
        fresh.catalogue.load(list(there.values()))
        assert restorable(filed.catalogue) == restorable(fresh.catalogue)
        used = sum(one.file_nbytes for one in filed.catalogue.segments())
        assert filed.catalogue.store.budget.used_bytes == used
    assert len(there) > 50


def noted(files, used):
    return [Entry(one, used, False, one.file_nbytes) for one in files]


def test_a_conversation_that_went_takes_no_others_with_it():
    """One of two that part ways inside a file, deleted as its writer lets it go: no look at all is due."""
    base = list(range(20))
    prompts = as_tokens(base), as_tokens([*base[:12], *range(50, 58)])
    entries, chains, filed = files_of(*prompts), Chains(), Filed()
    filed.catalogue.take(chains.change(entries))
    branch = [entry.segment.name for entry in entries if entry.segment.start >= 12][-3:]
    filed.catalogue.take(chains.change([], branch))
    assert not filed.catalogue.is_behind
    assert filed.kept() == {entry.segment.name for entry in entries} - set(branch)


def test_what_was_let_go_of_here_comes_back_with_what_goes_on_from_it():
    """A reader with a smaller budget dropped files 3 and 4 of 4, which are still there; then comes the fifth."""
    entries, chains, filed = path_of_files(5), Chains(), Filed()
    filed.catalogue.take(chains.change(entries[:-2]))
    (third,) = (node for node in filed.catalogue.store.nodes() if node.end == 3 * STEP)
    filed.catalogue.store.forget(third, rows=True)
    assert len(filed.kept()) == 4
    assert filed.catalogue.take(chains.change(entries[-2:])) == []
    tokens = np.concatenate([e.segment.tokens for e in entries if e.segment.kind == "rows"])
    assert filed.catalogue.find("ab", as_tokens([*tokens, 1])).position == 5 * STEP


def test_recency_and_pins_that_were_noted_are_taken_over():
    """A checkpoint used at 99 and pinned elsewhere, then no longer: so it is here."""
    entries, chains, filed = path_of_files(5), Chains(), Filed()
    filed.catalogue.take(chains.change(entries))
    state = next(entry for entry in entries if entry.segment.kind == "state")
    for pinned in (True, False):
        noted = Entry(state.segment, 99, pinned, state.file_nbytes)
        difference = chains.change([noted])
        assert (difference.come, difference.gone) == ((), ())
        filed.catalogue.take(difference)
        (node,) = (x for x in filed.catalogue.store.nodes() if x.end == state.segment.end)
        assert (node.last_used, node.pinned, filed.catalogue.store.clock) == (99, pinned, 99)


# The trees


def test_a_start_visits_as_many_nodes_as_there_are_files(monkeypatch):
    """A path of 50 files and one of 200: four times the steps, not sixteen."""
    steps = []
    for count in (50, 200):
        entries = path_of_files(count)
        with visits(monkeypatch) as visited:
            assert Filed().catalogue.load(entries) == []
        steps.append(visited[0])
    assert steps[1] <= 4 * steps[0] + 10
    assert steps[1] <= 4 * 200


def test_one_file_more_visits_its_own_path_only(monkeypatch):
    """Beside 5 conversations or 50, one of 20 files grows by one."""
    steps = []
    for others in (5, 50):
        entries = [e for seed in range(others) for e in path_of_files(4, seed + 1)]
        own, chains, filed = path_of_files(21), Chains(), Filed()
        filed.catalogue.take(chains.change([*entries, *own[:-2]]))
        difference = chains.change(own[-2:])
        with visits(monkeypatch) as visited:
            filed.catalogue.take(difference)
        assert {e.segment.name for e in own} <= filed.kept()
        steps.append(visited[0])
    assert steps[0] == steps[1] <= 30


@pytest.mark.parametrize("kind", ["rows", "state"])
def test_to_forget_a_file_visits_its_own_path_and_what_is_below(monkeypatch, kind):
    """The last file of a conversation of 10 beside 5 others or 50: the same steps, 10 and some."""
    steps = []
    for others in (5, 50):
        entries = [e for seed in range(others) for e in path_of_files(10, seed)]
        filed = Filed()
        filed.catalogue.load(entries)
        last = [entry.segment for entry in entries if entry.segment.kind == kind][-1]
        with visits(monkeypatch) as visited:
            filed.catalogue.forget(last)
        assert last.name not in filed.kept()
        steps.append(visited[0])
    assert steps[0] == steps[1] <= 30


def test_what_a_checkpoint_lacks_is_told_without_reading_what_is_there(monkeypatch):
    """A path of 100 files grows by one: the keys of 8 tokens are reckoned, not of 808."""
    tokens = as_tokens(np.random.default_rng(0).integers(0, 1000, size=101 * STEP))
    filed, read = Filed(), []
    filed.write(tokens[: 100 * STEP])
    before = PrefixDigest.read
    monkeypatch.setattr(
        PrefixDigest, "read", lambda self, some: read.append(len(some)) or before(self, some)
    )
    lacking = filed.catalogue.lacking("ab", tokens, state=True, step=STEP)
    assert [(one.kind, one.end) for one in lacking] == [("rows", 808), ("state", 808)]
    assert sum(read) <= 3 * STEP


# A second process


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(thread, "TICK_SECONDS", 0.05)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="mlx_hybridcache")
    return Said(caplog)


def opened(root):
    return oracle.new_cache(tiny.build(MODEL), cache_dir=root)


def wait_until(holds):
    for _ in range(PATIENCE_SECONDS * 20):
        if holds():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it never came")


def test_a_second_process_takes_over_what_changed_a_piece_at_a_time(tmp_path, quick, monkeypatch):
    """Two at most: a reader is told what another one wrote; it is put together off its worker, and every
    file is found in the end.
    """
    monkeypatch.setattr(tier, "PIECE", 2)
    changing, taking = [], []
    change, take = Chains.change, Catalogue.take

    def recorded_change(self, entries, gone=()):
        changing.append((threading.get_ident(), len(entries)))
        return change(self, entries, gone)

    def recorded_take(self, difference):
        parts = (difference.gone, difference.come, difference.noted, difference.orphans)
        taking.append((threading.get_ident(), sum(map(len, parts))))
        return take(self, difference)

    prompts = [oracle.prompt(300, seed=seed) for seed in range(3)]
    with opened(tmp_path) as writer, opened(tmp_path) as reader:
        assert not reader.disk_stats().is_writer
        monkeypatch.setattr(Chains, "change", recorded_change)
        monkeypatch.setattr(Catalogue, "take", recorded_take)
        for prompt in prompts:
            oracle.read(writer, prompt)
        assert writer.flush(PATIENCE_SECONDS)
        files = len(segments(tmp_path))
        wait_until(lambda: reader.disk_stats().files == files)
        worker = reader.worker._thread.ident
        assert {ident for ident, _ in changing} == {reader.engine.tiers.disk.thread.ident}
        assert {ident for ident, _ in taking} == {worker}
        assert max(count for _, count in taking) <= 2
        assert sum(count for _, count in changing) <= 2 * files  # nothing is read again and again
        for prompt in prompts:
            assert served(reader, prompt) == ("disk", len(prompt) - 1)
        writer.clear()
        wait_until(lambda: reader.disk_stats().files == 0)


def test_a_reader_that_could_not_read_a_file_finds_it_again(tmp_path, quick, said):
    """Its state is moved away for one request and put back; then the writer writes something else."""
    first, second = oracle.prompt(300, seed=1), oracle.prompt(280, seed=2)
    with opened(tmp_path) as writer:
        oracle.read(writer, first)
        assert writer.flush(PATIENCE_SECONDS)
        with opened(tmp_path) as reader:
            state = segments(tmp_path, "state")[-1]
            state.rename(tmp_path / "elsewhere")
            assert served(reader, first)[1] < 299
            (tmp_path / "elsewhere").rename(state)
            assert reader.disk_stats().rejected == 1
            assert said.take() == []  # as when the writer lets go of it
            reader.worker.call(reader.engine.tiers.memory.clear)
            oracle.read(writer, second)
            assert writer.flush(PATIENCE_SECONDS)
            wait_until(lambda: reader.lookup(second).tier == "disk")
            assert served(reader, first) == ("disk", 299)


def test_what_is_due_is_looked_at_a_few_at_a_time(tmp_path, monkeypatch):
    """40 checkpoints that are all there already: no turn looks at more than `LOOKS`, and all are done."""
    monkeypatch.setattr(write_behind, "LOOKS", 3)
    looks, turns = [0], []
    with opened(tmp_path) as cache:
        for seed in range(4):
            oracle.read(cache, oracle.prompt(300, seed=seed))
        assert cache.flush(PATIENCE_SECONDS)
        disk = cache.engine.tiers.disk
        lacking, write = disk.catalogue.lacking, disk.write_behind.write

        def counted(*args, **how):
            looks[0] += 1
            return lacking(*args, **how)

        def turn():
            looks[0] = 0
            write()
            turns.append(looks[0])

        monkeypatch.setattr(disk.catalogue, "lacking", counted)
        monkeypatch.setattr(disk.write_behind, "write", turn)
        cache.worker.call(lambda: disk.write_behind._unwritten.update(disk.store.restoring()))
        due = cache.worker.call(lambda: len(disk.write_behind._unwritten))
        assert due > 12
        assert cache.flush(PATIENCE_SECONDS)
        assert max(turns) <= 3
        assert sum(turns) == due


def test_the_most_useful_is_written_first():
    """Ends before what lies inside, what was used last before what was not, the deepest first."""
    tree, nodes = PrefixTree(), []
    for first, (used, is_end) in enumerate([(1, False), (5, False), (2, True), (5, False)]):
        node = tree.extend(as_tokens([first, *range(first)]), ())
        node.last_used, node.is_end = used, is_end
        nodes.append(node)
    waiting = Waiting(lambda node: node.parent is not None, most=3)
    waiting.update((node, Namespace("ab")) for node in nodes)
    tree.remove(nodes[1])
    order = [waiting.pop() for _ in range(4)]
    assert [each and each[0] for each in order] == [nodes[2], nodes[3], None, nodes[0]]
    assert not waiting
    assert waiting.pop() is None
