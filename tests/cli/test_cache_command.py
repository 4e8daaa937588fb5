"""`mlx-hybridcache cache`: a directory that a real run left is shown, checked, thinned and kept."""

import os
import pty
import subprocess
import sys

import bundled
import numpy as np
import pytest
from directories.cache_directories import (
    BUDGET,
    TEXT,
    checkpoints,
    content,
    files,
    found_json,
    id_at,
    of_model,
    shared_by_chats,
)

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.cli.main import main
from mlx_hybridcache.disk.directory import Directory
from mlx_hybridcache.disk.segment import prefix_key, read_header

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
