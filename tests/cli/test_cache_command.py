"""`mlx-hybridcache cache`: a directory that a real run left is shown, checked, thinned and shipped."""

import io
import json
import os
import pty
import shutil
import stat
import subprocess
import sys
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import bundled
import numpy as np
import oracle
import pytest
import test_segment
import tiny

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.cli.main import main
from mlx_hybridcache.disk.archive import ArchiveError, Manifest, check
from mlx_hybridcache.disk.directory import Directory
from mlx_hybridcache.disk.segment import prefix_key, read_header, write

SYSTEM = bundled.text(900)
QUESTIONS = ("Who are you?", "Sing a song.", "What is a list?")
CHATS = [bundled.chat(("system", SYSTEM), ("user", question)) for question in QUESTIONS]
TEXT = list(bundled.text_tokens(2700))
BRANCHED = [*TEXT[:1500], *TEXT[:40]]
ROWS_ONLY = tiny.random_tokens(300, seed=5)
BUDGET = {"memory_budget": "256MB", "disk_budget": "256MB"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two chats with one system prompt, two texts that part ways at 1,500, and a model of rows alone."""
    root = tmp_path_factory.mktemp("made") / "cache"
    with HybridPromptCache(*bundled.load(), cache_dir=root, **BUDGET) as cache:
        for prompt in (*CHATS[:2], TEXT, BRANCHED):
            cache.prefill(prompt).release()
        stored = sorted(len(tokens) for tokens in cache.checkpoints())
        assert cache.flush(60)
    with oracle.new_cache(tiny.build("llama"), cache_dir=root) as cache:
        cache.prefill(ROWS_ONLY).release()
        assert cache.flush(60)
        stats = cache.disk_stats()
    return SimpleNamespace(root=root, positions=stored, stats=stats)


@pytest.fixture
def root(made, tmp_path):
    """A copy of its own."""
    return shutil.copytree(made.root, tmp_path / "cache")


@pytest.fixture
def cache(root, capsys):
    """Run one command on that copy: exit status, output and errors."""

    def run(*words, at=root):
        status = main(["cache", *map(str, words), "--cache-dir", str(at)])
        shown = capsys.readouterr()
        return SimpleNamespace(status=status, out=shown.out, err=shown.err)

    return run


def found_json(run, *words, **where):
    shown = run(*words, "--json", **where)
    assert (shown.status, shown.err) == (0, "")
    return json.loads(shown.out)


def of_model(run, model="qwen3_next", **where):
    every = found_json(run, "ls", **where)["namespaces"]
    return next((one for one in every if one["model"] == model), None)


def checkpoints(run, **where):
    """Position -> checkpoint, of the bundled model."""
    one = of_model(run, **where)
    places = [place for line in one["runs"] for place in line["checkpoints"]] if one else []
    return {place["position"]: place for place in places}


def id_at(run, position, **where):
    return checkpoints(run, **where)[position]["id"]


def files(root):
    return sorted(root.rglob("*.safetensors"))


def content(root):
    """Everything in a directory but the index, which a look may open."""
    return {
        path.relative_to(root): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith("index.sqlite")
    }


def shared_by_chats():
    first, second = (np.array(chat[: min(map(len, CHATS[:2]))]) for chat in CHATS[:2])
    return int(np.argmax(first != second))


# ls and stats


def test_ls_joins_a_chain_to_one_line(cache):
    """Texts of 2,700 and 1,540 tokens: what they share, and what each adds, are a line each."""
    one = of_model(cache)
    lines = {(line["start"], line["end"]): line for line in one["runs"]}
    shared, end = lines[0, 1500], len(TEXT) - 1
    assert {(0, 1500), (1500, end), (1500, 1539)} < set(lines)
    assert len(lines) == 6
    assert [x["position"] for x in shared["checkpoints"]][:2] == [512, 1024]
    assert lines[1500, end]["parent"] == shared["id"] == shared["checkpoints"][-1]["id"]
    assert (shared["depth"], lines[1500, end]["depth"]) == (0, 1)
    shown = cache("ls").out.splitlines()
    assert len(shown) == 6 + 1 + len(of_model(cache, "llama")["runs"]) + 1
    (line,) = [line for line in shown if "[0, 1,500)" in line]
    assert f"● {len(shared['checkpoints'])} checkpoints" in line
    assert shared["id"] in line
    assert "disk" in line


def test_ls_finds_what_the_process_that_wrote_it_had(made, cache):
    """Each checkpoint in memory when it closed, at its position; bytes add up to those of the files."""
    listed = [x["position"] for line in of_model(cache)["runs"] for x in line["checkpoints"]]
    assert sorted(listed) == made.positions
    lines = [line for one in found_json(cache, "ls")["namespaces"] for line in one["runs"]]
    assert sum(line["bytes"] for line in lines) == sum(x.stat().st_size for x in files(made.root))


def test_ls_shows_each_checkpoint_if_asked(made, cache):
    """`--all`: as many ids as checkpoints."""
    shown = cache("ls", "--all").out
    assert all(place["id"] in shown for place in checkpoints(cache).values())
    assert sum("├── ●" in line or "└── ●" in line for line in shown.splitlines()) == len(
        made.positions
    )


def test_an_id_is_the_key_of_the_tokens_before_it(root, cache):
    """At 1,500: the digest of the namespace and 1,500 tokens, its first twelve digits."""
    key = prefix_key(of_model(cache)["namespace"], np.array(TEXT[:1500], np.int32))
    assert id_at(cache, 1500) == key[:12]


def test_a_line_is_as_old_as_the_newest_file_below_it(root, cache):
    """All files 3 h old but those of one branch, 150 s: that branch and what leads to it say 2 min."""
    for path in files(root):
        age = 150 if read_header(path).end == 1539 else 3 * 3600
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    ages = {(x["start"], x["end"]): x["age_seconds"] // 60 for x in of_model(cache)["runs"]}
    assert 2 <= ages[1500, 1539] == ages[0, 1500] < 30
    assert ages[1500, len(TEXT) - 1] >= 180
    assert "3 h" in cache("ls").out


def test_stats_count_what_the_library_counts(made, cache, root):
    """Files, checkpoints and bytes of both models are those of `disk_stats`; nobody is writing."""
    found = found_json(cache, "stats")
    total, stats = found["total"], made.stats
    assert found["is_being_written"] is False
    assert (total["files"], total["checkpoints"]) == (stats.files, stats.checkpoints)
    assert total["bytes"] == total["rows_bytes"] + total["states_bytes"] == stats.held_bytes
    assert total["conversations"] == 5
    assert {one["model"]: one["conversations"] for one in found["namespaces"]} == {
        "qwen3_next": 4,
        "llama": 1,
    }
    shown = cache("stats").out
    assert "No process is writing there." in shown
    assert f"{total['tokens']:,}" in shown


def test_looking_changes_nothing(root, cache):
    """Not a file, not its time, not even the index's."""
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(root)}
    before |= {(root / "index.sqlite"): ((root / "index.sqlite").read_bytes(), None)}
    for words in (("ls",), ("stats",), ("verify",), ("ls", "--all")):
        assert cache(*words).status == 0
    assert all(path.read_bytes() == held for path, (held, _) in before.items())
    assert all(path.stat().st_mtime_ns == at for path, (_, at) in before.items() if at)
    assert files(root) == [path for path in before if path.suffix == ".safetensors"]


def test_ls_needs_no_index(root, cache):
    """Without it the headers say the same."""
    before = of_model(cache)
    for path in root.glob("index.sqlite*"):
        path.unlink()
    after = of_model(cache)
    assert [x["id"] for x in after["runs"]] == [x["id"] for x in before["runs"]]


@pytest.mark.parametrize("words", [["ls"], ["stats"], ["verify"], ["clear", "--yes"]])
def test_what_is_no_cache_directory_is_left_alone(cache, tmp_path, words):
    """A folder of somebody's, and one that is not there: exit status 2, said in one line."""
    (other := tmp_path / "other").mkdir()
    (other / "thesis.txt").write_text("all of it")
    for at, why in ((other, "is no cache directory"), (tmp_path / "none", "is no directory")):
        shown = cache(*words, at=at)
        assert (shown.status, shown.out) == (2, "")
        assert why in shown.err
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "none").exists()


# verify


def test_verify_reads_every_byte(root, cache):
    """Whole: status 0. A bit flipped in one file's data and one in another's header: both are named."""
    assert cache("verify").status == 0
    damaged = [path for path in files(root) if path.stat().st_size > 9000][:2]
    for path, at in zip(damaged, (-5, 100), strict=True):
        held = bytearray(path.read_bytes())
        held[at] ^= 1
        path.write_bytes(held)
    shown = cache("verify")
    assert shown.status == 1
    assert all(path.name in shown.out for path in damaged)
    assert f"{len(files(root)) - 2} files whole" in shown.out
    assert "2 damaged" in shown.out


def test_verify_deletes_what_is_damaged_if_asked(root, cache):
    """A state cut short and one with a flipped bit go, and nothing else; then all are whole."""
    states = list(root.rglob("*.state.safetensors"))[:2]
    states[0].write_bytes(states[0].read_bytes()[:-1])
    held = bytearray(states[1].read_bytes())
    held[-1] ^= 0x80
    states[1].write_bytes(held)
    left = [path for path in files(root) if path not in states]
    assert cache("verify", "--delete").status == 1
    assert files(root) == left
    assert cache("verify").status == 0
    assert found_json(cache, "stats")["total"]["files"] == len(left)


def test_verify_says_what_cannot_be_reached(root, cache):
    """Without the first rows of the texts, all behind them is whole and of no use."""
    key = prefix_key(of_model(cache)["namespace"], np.array(TEXT[:512], np.int32))
    first = root / "segments" / key[:2] / f"{key}.rows.safetensors"
    first.unlink()
    lost = [path for path in files(root) if read_header(path).start >= 512 and path != first]
    of_texts = [path for path in lost if "cannot be reached" in cache("verify").out]
    shown = cache("verify")
    assert shown.status == 0
    named = {line.split()[0] for line in shown.out.splitlines() if "cannot be reached." in line}
    assert {f"{key}.state.safetensors"} < named <= {path.name for path in files(root)}
    assert f"{len(named)} cannot be reached" in shown.out
    assert of_texts
    assert found_json(cache, "stats")["total"]["unreachable"] == len(named)


# prune, clear, pins


def test_prune_keeps_to_the_size(root, cache):
    """To half of it: no more stays, no half-deleted conversation, and the index agrees."""
    before = sum(path.stat().st_size for path in files(root))
    shown = cache("prune", "--to", before // 2, "--yes")
    left = sum(path.stat().st_size for path in files(root))
    assert shown.status == 0
    assert 0 < left <= before // 2
    total = found_json(cache, "stats")["total"]
    assert (total["bytes"], total["unreachable"]) == (left, 0)
    assert total["conversations"] > 0
    assert cache("verify").status == 0
    assert cache("prune", "--to", "1GB").out.endswith(" stay.\n")
    assert sum(path.stat().st_size for path in files(root)) == left


def test_prune_leaves_what_is_pinned(root, cache):
    """To nothing, with the system prompt pinned: it stays, that is said, and unpinned it goes."""
    at = shared_by_chats()
    name = id_at(cache, at)
    assert cache("pin", name[:8]).status == 0
    assert checkpoints(cache)[at]["pinned"]
    shown = cache("prune", "--to", 0, "--yes")
    assert shown.status == 1
    assert "pins keep it" in shown.out
    assert list(checkpoints(cache)) == [at]
    assert cache("unpin", name).status == 0
    assert not checkpoints(cache)[at]["pinned"]
    assert cache("prune", "--to", "0", "--yes").status == 0
    assert files(root) == []


def test_clear_deletes_everything(root, cache):
    """Pins included; the directory is one still, and holds nothing."""
    cache("pin", id_at(cache, 1500))
    shown = cache("clear", "--yes")
    assert (shown.status, files(root)) == (0, [])
    assert "holds nothing" in cache("ls").out


def test_clear_asks_at_a_terminal_and_only_there(root, cache):
    """Piped: status 2 and nothing deleted. At a terminal "n" keeps it, "y" deletes."""
    before = files(root)
    shown = cache("clear")
    assert (shown.status, shown.out, files(root)) == (2, "", before)
    assert "--yes" in shown.err
    command = [
        sys.executable,
        "-m",
        "mlx_hybridcache.cli",
        "cache",
        "clear",
        "--cache-dir",
        root,
    ]
    for answer, left in ((b"n\n", before), (b"y\n", [])):
        ours, theirs = pty.openpty()
        os.write(ours, answer)
        asked = subprocess.run(
            command, stdin=theirs, capture_output=True, text=True, timeout=120, check=True
        )
        os.close(ours)
        os.close(theirs)
        assert "[y/N]" in asked.stdout
        assert files(root) == left


def test_prune_asks_before_it_deletes(root, cache, monkeypatch):
    """Without a terminal nothing goes; at one "n" keeps all and "y" deletes what was named."""
    before = files(root)
    shown = cache("prune", "--to", "1MB")
    assert (shown.status, shown.out, files(root)) == (2, "", before)
    assert f"of {len(before)} (" in shown.err
    assert shown.err.rstrip().endswith("without a terminal to ask at, add --yes.")
    questions = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer in ("n", "y"):
        monkeypatch.setattr("builtins.input", lambda said, a=answer: questions.append(said) or a)
        shown = cache("prune", "--to", "1MB")
        assert shown.status == 0
        assert (files(root) == before) is (answer == "n")
    gone = len(before) - len(files(root))
    assert questions[0].startswith(f"Delete {gone} files of {len(before)} (")
    assert f"Deleted {gone} files;" in shown.out


def test_export_does_not_write_over_a_file(cache, tmp_path):
    """A file of that name stays as it is, unless it is said twice."""
    to = tmp_path / "notes.tar"
    to.write_text("mine")
    shown = cache("export", id_at(cache, 1500), "--to", to)
    assert (shown.status, shown.out, to.read_text()) == (2, "", "mine")
    assert "exists already. Name another file, or add --force" in shown.err
    assert cache("export", id_at(cache, 1500), "--to", to, "--force").status == 0
    assert to.stat().st_size > 1000


def test_what_changes_the_directory_waits_for_no_server(root, cache, tmp_path):
    """While a library writes there: looking works, changing is refused with status 2 at once."""
    cache("export", id_at(cache, 1500), "--to", tmp_path / "a.tar")
    before = content(root)
    with HybridPromptCache(*bundled.load(), cache_dir=root, **BUDGET):
        assert found_json(cache, "stats")["is_being_written"] is True
        assert "A process is writing there." in cache("stats").out
        assert cache("verify").status == 0
        for words in (
            ("prune", "--to", 0),
            ("clear", "--yes"),
            ("verify", "--delete"),
            ("import", tmp_path / "a.tar"),
            ("pin", id_at(cache, 1500)),
        ):
            shown = cache(*words)
            assert (shown.status, shown.out) == (2, "")
            assert "Stop the server" in shown.err
        assert cache("export", id_at(cache, 1500), "--to", tmp_path / "b.tar").status == 0
    assert content(root) == before
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


# export and import


@pytest.fixture
def archive(cache, tmp_path):
    """The texts' first 1,500 tokens: the rows of the first text reach beyond."""
    to = tmp_path / "texts.tar"
    assert cache("export", id_at(cache, 1500), "--to", to).status == 0
    return to


def run_of(tokens):
    return np.array(tokens, np.int32).tobytes()


def test_an_exported_system_prompt_answers_in_another_directory(cache, tmp_path):
    """A new process restores it from disk for a question nobody asked; its logits are the cold ones."""
    at, to, other = shared_by_chats(), tmp_path / "system.tar", tmp_path / "other"
    assert cache("export", id_at(cache, at), "--to", to).status == 0
    shown = cache("import", to, at=other)
    assert shown.status == 0
    assert "pinned" in shown.out
    ran = subprocess.run(
        [sys.executable, __file__, other],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report == {"tier": "disk", "restored": at, "difference": 0.0, "tokens": "equal"}


def answer_and_compare(root):
    """What `test_an_exported_system_prompt...` runs in a process of its own."""
    with HybridPromptCache(*bundled.load(), cache_dir=root, **BUDGET) as cache:
        hot = list(cache.stream_generate(CHATS[2], 6))
        report = cache.last_report
        cold = list(cache.stream_generate(CHATS[2], 6, use_cache=False))
    off = [oracle.agree(one.logprobs, other.logprobs) for one, other in zip(hot, cold, strict=True)]
    same = [one.token for one in hot] == [one.token for one in cold]
    return {
        "tier": report.tier,
        "restored": report.restored_tokens,
        "difference": 0.0 if all(off) else 1.0,
        "tokens": "equal" if same else "other",
    }


@pytest.mark.parametrize("at", [1500, 1539])
def test_nothing_behind_the_prefix_travels(root, cache, tmp_path, at):
    """The first text's tokens behind 1,500 lie in a file that both texts need; they are cut off.

    So they are where the prefix ends there, and where it is the second text, which goes on otherwise.
    """
    to = tmp_path / "a.tar"
    cache("export", id_at(cache, at), "--to", to)
    kept, sent = b"".join(path.read_bytes() for path in files(root)), to.read_bytes()
    assert run_of(TEXT[1490:1500]) in sent
    assert run_of(TEXT[1490:1510]) in kept
    assert sent.count(run_of(TEXT[:6])) == 1 + (at == 1539)  # how the second text goes on
    assert run_of(TEXT[1500:1502]) not in sent
    segments = check(to).segments
    assert max(segment.end for segment in segments) == at
    assert sum(segment.end - segment.start for segment in segments) == at
    names = {path.name for path in files(root)}
    new = [segment for segment in segments if segment.name.partition("/")[2] not in names]
    assert [(segment.kind, segment.end) for segment in new] == [("rows", 1500)]


def test_rows_that_were_cut_are_the_rows_of_a_shorter_prompt(archive, cache, tmp_path):
    """Restored from the archive, 1,500 tokens go on as they do when they were read without a cache."""
    other = tmp_path / "other"
    cache("import", archive, at=other)
    model, tokenizer = bundled.load()
    prompt = [*TEXT[:1500], *TEXT[200:260]]
    with HybridPromptCache(model, tokenizer, cache_dir=other, **BUDGET) as hot:
        (first,) = hot.stream_generate(prompt, 1)
        assert (hot.last_report.tier, hot.last_report.restored_tokens) == ("disk", 1500)
        (cold,) = hot.stream_generate(prompt, 1, use_cache=False)
    assert oracle.agree(first.logprobs, cold.logprobs)


def test_an_archive_is_a_private_tar(archive, cache, tmp_path):
    """Mode 0600, `manifest.json` first, every member a segment of the size it says."""
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    with tarfile.open(archive) as tar:
        first, *others = tar.getmembers()
        manifest = json.load(tar.extractfile(first))
        assert first.name == "manifest.json"
        tar.extractall(tmp_path / "segments", filter="data")
    assert (manifest["format"], manifest["position"]) == ("mlx_hybridcache prefix", 1500)
    assert manifest["model"] == "qwen3_next"
    assert [(x.name, x.size) for x in others] == [
        (member["name"], member["bytes"]) for member in manifest["members"]
    ]
    for member in others:
        assert read_header(tmp_path / "segments" / member.name).name == member.name
    assert list(archive.parent.glob("*.partial")) == []


def test_checkpoints_on_the_way_travel_unless_only_the_end_is_wanted(cache, archive, tmp_path):
    """512 and 1,024 and more before 1,500; `--only-end` has one."""
    states = [x.end for x in check(archive).segments if x.kind == "state"]
    assert {512, 1024, 1500} <= set(states)
    assert states == sorted(p for p in checkpoints(cache) if p in states)
    only = tmp_path / "only.tar"
    assert cache("export", id_at(cache, 1500), "--to", only, "--only-end").status == 0
    assert [x.end for x in check(only).segments if x.kind == "state"] == [1500]
    assert cache("import", only, at=tmp_path / "other").status == 0
    assert list(checkpoints(cache, at=tmp_path / "other")) == [1500]


def test_an_id_must_name_one_checkpoint(cache, root, tmp_path):
    """Unknown, no digits at all, and one beginning that two share: refused, the candidates named."""
    for name, why in (("0" * 32, "No checkpoint"), ("../../etc", "is no id"), ("ab", "is no id")):
        shown = cache("export", name, "--to", tmp_path / "a.tar")
        assert shown.status == 2
        assert why in shown.err
    crowd = [test_segment.rows(0, end) for end in range(1, 3000)]
    by_beginning = {}
    for segment in crowd:
        by_beginning.setdefault(segment.key[:4], []).append(segment)
    alike = next(pair for pair in by_beginning.values() if len(pair) > 1)
    for segment in alike:
        data = [bytes(segment.data_nbytes)]
        write(tmp_path / "crowd", segment, data)
    shown = cache("export", alike[0].key[:4], "--to", tmp_path / "a.tar", at=tmp_path / "crowd")
    assert shown.status == 2
    assert all(segment.key in shown.err for segment in alike)
    assert not (tmp_path / "a.tar").exists()


def test_a_damaged_file_is_not_exported(root, cache, tmp_path):
    """A bit flipped in rows that would travel whole, then in those that are cut: status 2, no file."""
    name = id_at(cache, 1500)
    for rows in (lambda x: x.end == 512, lambda x: x.start < 1500 < x.end):
        copy = shutil.copytree(root, tmp_path / "copy")
        for path in files(copy):
            if path.name.endswith("rows.safetensors") and rows(read_header(path)):
                held = bytearray(path.read_bytes())
                held[-1] ^= 1
                path.write_bytes(held)
        shown = cache("export", name, "--to", tmp_path / "a.tar", at=copy)
        assert shown.status == 2
        assert "damaged" in shown.err
        assert not (tmp_path / "a.tar").exists()
        shutil.rmtree(copy)
    assert list(tmp_path.glob("*.partial")) == []


def test_what_is_there_already_is_not_written_again(cache, root, archive):
    """Into the directory it came from: no new file, but a pin; a second time the same."""
    before = content(root)
    for _ in range(2):
        shown = cache("import", archive)
        assert shown.status == 0
        assert "0 B new" in shown.out
    assert content(root) == before
    assert [at for at, place in checkpoints(cache).items() if place["pinned"]] == [1500]


def test_only_what_lacks_is_written(cache, archive, tmp_path):
    """Where the rows and states up to 1,024 lie, those behind come; all of them lead to 1,500."""
    other, short = tmp_path / "other", tmp_path / "short.tar"
    cache("export", id_at(cache, 1024), "--to", short)
    cache("import", short, "--no-pin", at=other)
    before = content(other)
    assert cache("import", archive, at=other).status == 0
    assert before.items() <= content(other).items()
    assert len(files(other)) == len(check(archive).segments)
    assert found_json(cache, "stats", at=other)["total"]["unreachable"] == 0
    places = checkpoints(cache, at=other)
    assert {at for at, place in places.items() if place["pinned"]} == {1500}


def test_no_pin_leaves_it_to_the_policy(cache, archive, tmp_path):
    """Imported so, nothing is pinned, and a prune takes it."""
    other = tmp_path / "other"
    assert "pinned" not in cache("import", archive, "--no-pin", at=other).out
    assert found_json(cache, "stats", at=other)["total"]["pinned"] == 0
    assert cache("prune", "--to", 0, "--yes", at=other).status == 0


def test_an_import_makes_a_private_directory(cache, archive, tmp_path):
    """Mode 0700 and files 0600 under a umask that hides nothing; not in a folder with other things."""
    other = tmp_path / "deep" / "other"
    with test_segment.umask(0):
        assert cache("import", archive, at=other).status == 0
    assert {stat.S_IMODE(path.stat().st_mode) for path in files(other)} == {0o600}
    assert stat.S_IMODE(other.stat().st_mode) == 0o700
    shown = cache("import", archive, at=tmp_path)
    assert shown.status == 2
    assert "is no cache directory" in shown.err


def test_rows_alone_travel_too(cache, tmp_path):
    """A model without states: 299 tokens, imported and pinned, restore 299 of 300 in a new process."""
    to, other = tmp_path / "rows.tar", tmp_path / "other"
    line = of_model(cache, "llama")["runs"][-1]
    assert cache("export", line["id"], "--to", to).status == 0
    assert {segment.kind for segment in check(to).segments} == {"rows"}
    assert cache("import", to, at=other).status == 0
    assert found_json(cache, "stats", at=other)["total"]["pinned"] == 1
    with oracle.new_cache(tiny.build("llama"), cache_dir=other) as hot:
        report = hot.prefill(ROWS_ONLY).report
    assert (report.tier, report.restored_tokens) == ("disk", line["end"])


# Archives that are not what they should be


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Nine tokens in two files of rows and two states: an archive of some 6 KB."""
    root = tmp_path_factory.mktemp("small") / "cache"
    for segment in (
        test_segment.rows(0, 4),
        test_segment.rows(4, 9),
        test_segment.state(4),
        test_segment.state(9),
    ):
        test_segment.stored(root, replace(segment, model="tiny"))
    to = root.parent / "small.tar"
    main(["cache", "export", test_segment.state(9).key, "--to", str(to), "--cache-dir", str(root)])
    assert len(check(to).segments) == 4
    return to.read_bytes()


def test_an_archive_that_was_cut_short_is_refused(small, tmp_path, archive, root, cache):
    """At every length of a small one, and at 40 of a real one, where nothing changes in the directory."""
    path = tmp_path / "cut.tar"
    path.write_bytes(small)
    for length in reversed(range(len(small))):
        os.truncate(path, length)
        with pytest.raises(ArchiveError):
            check(path)
    whole, before = archive.read_bytes(), content(root)
    for length in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:length])
        shown = cache("import", path)
        assert (shown.status, shown.out) == (2, "")
        assert "cannot be imported" in shown.err
    assert content(root) == before


def test_every_byte_of_an_archive_counts(small, tmp_path):
    """A bit of each fifth byte flipped in turn, and every bit of the first block: none is believed."""
    path = tmp_path / "flipped.tar"
    path.write_bytes(small)
    bits = {(at, at % 8) for at in range(0, len(small), 5)}
    bits |= {(at, bit) for at in range(512) for bit in range(8)}
    with path.open("r+b", buffering=0) as file:
        for at, bit in sorted(bits):
            os.pwrite(file.fileno(), bytes([small[at] ^ 1 << bit]), at)
            with pytest.raises(ArchiveError):
                check(path)
            os.pwrite(file.fileno(), small[at : at + 1], at)
    assert len(check(path).segments) == 4


def test_a_flipped_bit_in_an_archive_changes_no_directory(archive, tmp_path, root, cache):
    """Twenty places in a real one; into a directory that holds something, and into none."""
    whole, before, path = archive.read_bytes(), content(root), tmp_path / "flipped.tar"
    for at in range(100, len(whole), len(whole) // 20):
        held = bytearray(whole)
        held[at] ^= 4
        path.write_bytes(held)
        assert cache("import", path).status == 2
        assert cache("import", path, at=tmp_path / "none").status == 2
    assert content(root) == before
    assert not (tmp_path / "none").exists()


def unpacked(archive):
    """Members of a small archive as (TarInfo, bytes)."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar.getmembers()]


def packed(members, form=tarfile.GNU_FORMAT):
    """The bytes of an archive of these, ended as ours are."""
    made = b"".join(
        info.tobuf(form, "utf-8", "surrogateescape") + held + bytes(-len(held) % 512)
        for info, held in members
    )
    return made + bytes(1024)


def member(name, held=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(held)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, held


def described(manifest, **changes):
    """The manifest's member, with some of its fields changed."""
    fields = {**json.loads(manifest), **changes}
    return member("manifest.json", json.dumps(fields, indent=1).encode())


def hostile(small):
    """Name -> an archive that nobody should believe."""
    (_, manifest), *segments = unpacked(small)
    fields = json.loads(manifest)
    (first, rows), *others = segments
    named = [{**x} for x in fields["members"]]

    def renamed(name):
        return packed(
            [
                described(manifest, members=[{**named[0], "name": name}, *named[1:]]),
                member(name, rows),
                *others,
            ]
        )

    def first_is(info, held=b""):
        return packed([member("manifest.json", manifest), (info, held), *others])

    link = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
    yield "a name above", renamed("../../" + first.name)
    yield "an absolute name", renamed("/tmp/" + first.name)
    yield "a name of its own", renamed("evil.sh")
    yield "another segment's name", renamed("00/" + "0" * 32 + ".rows.safetensors")
    yield "a symlink", first_is(*member(first.name, **link))
    yield "a symlink of the right size", first_is(*member(first.name, rows, **link))
    yield "a hard link", first_is(*member(first.name, rows, type=tarfile.LNKTYPE, linkname="x"))
    yield "a device", first_is(*member(first.name, rows, type=tarfile.CHRTYPE))
    yield "a directory", first_is(*member(first.name, type=tarfile.DIRTYPE))
    yield "a sparse file", first_is(*member(first.name, rows, type=tarfile.GNUTYPE_SPARSE))
    yield "a long name", first_is(*member("x" * 300, rows))
    yield "pax headers", first_is(*member(first.name, rows, type=tarfile.XHDTYPE))
    for name, size in (("giant", 1 << 60), ("negative", -1), ("one more", len(rows) + 1)):
        info, _ = member(first.name)
        info.size = size
        yield f"a {name} size", first_is(info, rows)
        listed = [{**named[0], "bytes": size}, *named[1:]]
        told = described(manifest, members=listed)
        yield f"a {name} size in the manifest", packed([told, *segments])
        yield f"a {name} size in both", packed([told, (info, rows), *others])
        info, _ = member("manifest.json")
        info.size = size
        yield f"a {name} size of the manifest", packed([(info, manifest), *segments])
    for name, value in (
        ("format", "something else"),
        ("version", 2),
        ("namespace", "00" * 16),
        ("model", "another"),
        ("model", {}),
        ("key", "0" * 32),
        ("position", 8),
        ("position", "9"),
        ("position", 9.0),
        ("position", 1 << 80),
        ("members", []),
        ("members", "all"),
        ("members", named[:-1]),
        ("members", named[1:]),
        ("members", named * 2),
        ("more", 1),
    ):
        yield f"{name}={value!r:.20}", packed([described(manifest, **{name: value}), *segments])
    for name, text in (
        ("no JSON", b"{"),
        ("a list", b"[]"),
        ("deep JSON", b"[" * 100_000),
        ("no text", b"\xff\xfe"),
        ("other spelling", json.dumps(fields).encode()),
    ):
        yield name, packed([member("manifest.json", text), *segments])
    yield "no manifest", packed(segments)
    yield "the manifest last", packed([*segments, member("manifest.json", manifest)])
    yield "no end", packed(unpacked(small))[:-1024]
    yield "something behind the end", small + b"x"
    yield "more zeros", small + bytes(512)
    told = described(manifest, members=[*named[1:3], named[0], named[3]])
    yield "out of order", packed([told, segments[1], segments[2], segments[0], segments[3]])
    told = described(manifest, members=[named[0], named[2]])
    yield "the end is missing", packed([told, segments[0], segments[2]])
    told = described(manifest, members=named[:3])
    yield "the state of the end is missing", packed([told, *segments[:3]])
    told = described(manifest, members=[named[0], *named[2:]])
    yield "rows are missing", packed([told, segments[0], *segments[2:]])


def test_a_hostile_archive_is_refused(small, tmp_path, root, cache):
    """Links, devices, names, sizes, manifests: status 2 in one line, the directory as it was."""
    before, path = content(root), tmp_path / "hostile.tar"
    for name, held in hostile(small):
        path.write_bytes(held)
        shown = cache("import", path)
        assert (shown.status, shown.out) == (2, ""), name
        assert shown.err.count("\n") == 1, name
        assert str(path) in shown.err, name
    path.write_bytes(packed(unpacked(small)))
    assert cache("import", path).status == 0
    assert before.items() < content(root).items()


def test_a_prefix_whose_keys_are_not_those_of_its_tokens_is_refused(tmp_path):
    """Rows of other tokens under the same keys, in whole files."""
    first, second = test_segment.rows(0, 4), test_segment.rows(4, 9)
    other = replace(first, tokens=first.tokens + 1)
    held = [
        (segment.name, test_segment.stored(tmp_path, segment).read_bytes())
        for segment in (other, second)
    ]
    sizes = tuple((name, len(data)) for name, data in held)
    manifest = Manifest(test_segment.SPACE, "tiny", second.key, 9, sizes)
    path = tmp_path / "a.tar"
    members = [("manifest.json", manifest.encoded()), *held]
    path.write_bytes(packed([member(name, data) for name, data in members]))
    with pytest.raises(ArchiveError, match="keys are not those"):
        check(path)


def test_what_is_no_file_is_refused(cache, tmp_path):
    """A pipe that nobody writes to, a directory, nothing: no waiting."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none"):
        assert cache("import", path).status == 2


def test_no_bar_is_drawn_where_there_is_no_terminal(root):
    """`verify` in a pipe says its one line and nothing on the standard error."""
    ran = subprocess.run(
        [sys.executable, "-m", "mlx_hybridcache.cli", "cache", "verify", "--cache-dir", root],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ran.stderr == ""
    assert ran.stdout.count("\n") == 1


def test_a_command_that_is_none_says_which_there_are(capsys):
    """Usage on the standard error, status 2, as argparse does it."""
    with pytest.raises(SystemExit, match="2"):
        main(["cache", "polish"])
    assert "export" in capsys.readouterr().err


def test_a_server_that_takes_over_meanwhile_is_noticed(root, cache):
    """The lock is free when a command starts and taken when it would write: refused all the same."""
    other = Directory(root)
    other.open()
    try:
        assert cache("prune", "--to", 0).status == 2
    finally:
        other.close()
    assert cache("prune", "--to", "1GB").status == 0


if __name__ == "__main__":
    print(json.dumps(answer_and_compare(sys.argv[1])))
