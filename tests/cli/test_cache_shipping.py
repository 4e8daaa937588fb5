"""`mlx-hybridcache cache export` and `import`: a prefix goes to another directory, and nothing else does."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile

import bundled
import oracle
import pytest
import tiny
from directories import segment_files
from directories.cache_directories import (
    BUDGET,
    CHATS,
    ROWS_ONLY,
    TEXT,
    checkpoints,
    content,
    files,
    found_json,
    id_at,
    of_model,
    run_of,
    shared_by_chats,
)

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.disk.archive import check
from mlx_hybridcache.disk.segment import read_header, write


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
        for member in others:
            path = tmp_path / "segments" / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar.extractfile(member).read())
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
    crowd = [segment_files.rows(0, end) for end in range(1, 3000)]
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
    with segment_files.umask(0):
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


if __name__ == "__main__":
    print(json.dumps(answer_and_compare(sys.argv[1])))
