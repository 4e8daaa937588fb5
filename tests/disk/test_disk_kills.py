"""Kill -9 and power cuts, for real: what was promised is found, whole; what was not finished is gone.

`mlx-hybridcache bench kills` does the same as often as one likes.
"""

import time
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from long import forms
from mlx_hybridcache_bench import cli
from mlx_hybridcache_bench.kills import power, server_kills, writer_kills
from mlx_hybridcache_bench.kills.command import figures
from mlx_hybridcache_bench.kills.killed_writer import BUDGET_BYTES, Order
from mlx_hybridcache_bench.kills.server_kills import (
    REPLY,
    ServerAccount,
    Victim,
    kill_servers,
    prompts,
)
from mlx_hybridcache_bench.kills.writer_kills import (
    Account,
    kill_at_every_operation,
    kill_at_random,
    started_writers,
)
from mlx_hybridcache_bench.serving.servers import OURS, Launch

from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.disk.catalogue import Catalogue
from mlx_hybridcache.disk.segment import SEGMENTS, check_file, write

MODEL = str(BUNDLED_MODEL)


@pytest.fixture(scope="module")
def writers():
    with started_writers() as found:
        yield found


@pytest.mark.parametrize("kills", forms(20, 200))
def test_kills_at_random_moments_lose_nothing_that_was_durable(writers, tmp_path, kills):
    """One directory, many writers, each killed within a quarter of a second."""
    account = kill_at_random(writers, tmp_path, kills, seed=1)
    assert account.faults == []
    assert account.kills == kills
    assert kills < 200 or min(account.reported, account.deleted, account.unfinished) > 0
    assert kills < 200 or account.checked > 0


@pytest.mark.parametrize("checkpoints", forms(1, 3))
def test_a_kill_at_every_file_operation_leaves_all_or_nothing(writers, tmp_path, checkpoints):
    """Writers of some checkpoints, killed at their first file operation, their second, to the last."""
    account = kill_at_every_operation(writers, tmp_path, checkpoints, seed=1)
    assert account.faults == []
    assert account.finished == 1
    assert min(account.reported, account.unfinished) > 0
    assert checkpoints == 1 or account.deleted > 0  # nothing has to go for the first one


@pytest.mark.parametrize("cuts", forms(3, 20))
def test_power_cuts_lose_nothing_that_was_durable(writers, cuts):
    """A real file system is shut down without a flush under a writer, mounted again and looked at."""
    if why := power.why_not():
        pytest.skip(why)
    with power.small_disk() as disk:
        account = power.cut_power(writers, disk, cuts, seed=1)
    assert account.faults == []
    assert account.kills == cuts
    assert cuts < 20 or min(account.reported, account.checked) > 0


def test_the_account_tells_what_is_lost_damaged_left_over_and_too_much(writers, tmp_path):
    """The oracle itself, behind a writer that ended: a file deleted, one overwritten, one that holds
    something else, and one that nobody needs, larger than all may be.
    """
    account = Account()
    account.hear(writers.run(Order(str(tmp_path), 2, seconds=60, most_checkpoints=3)))
    account.check(tmp_path)
    assert (account.finished, account.faults) == (1, [])
    states = [name for name in sorted(account.promised) if ".state." in name]
    lost, damaged, other = (tmp_path / SEGMENTS / name for name in states[:3])
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    segment = check_file(other)
    other.unlink()
    write(tmp_path, segment, [bytes(segment.data_nbytes)])
    with (tmp_path / SEGMENTS / "stray").open("wb") as stray:
        stray.truncate(BUDGET_BYTES + 1)
    account.check(tmp_path)
    for name, sentence in (
        *((lost, "is not there"), (damaged, "was offered"), (other, "holds other bytes")),
        *(("stray", "differ"), ("", "over the budget")),
    ):
        assert [fault for fault in account.faults if sentence in fault and Path(name).name in fault]
    assert len(account.faults) == 5
    account.faults.clear()
    account.check(tmp_path)
    assert not [fault for fault in account.faults if lost.name in fault]  # said once
    account.hear([f"-{damaged.name}"])
    assert damaged.name not in account.promised


def test_the_account_tells_what_the_index_does_not_find_or_says_otherwise(
    writers, tmp_path, monkeypatch
):
    """A catalogue that forgets a segment, and files that say they were written for another model."""
    account = Account()
    account.hear(writers.run(Order(str(tmp_path), 2, seconds=60, most_checkpoints=1)))
    segments = Catalogue.segments
    with monkeypatch.context() as patch:
        patch.setattr(Catalogue, "segments", lambda known: list(segments(known))[1:])
        account.check(tmp_path)
    assert sum("cannot be found" in fault for fault in account.faults) == 1
    account.faults.clear()
    monkeypatch.setattr(
        writer_kills, "check_file", lambda path: replace(check_file(path), model="other")
    )
    account.check(tmp_path)
    assert account.faults
    assert all("not what the index says" in fault for fault in account.faults)


@pytest.mark.parametrize("kills", forms(2, 15))
def test_a_server_killed_under_load_answers_as_before(tmp_path, monkeypatch, kills):
    """Kills while three clients send: replies are cold's to the bit, durable checkpoints are found.

    Prompts of 650 to 800 tokens in the short form, to 1,600 in the whole one.
    """
    if kills < 15:
        monkeypatch.setattr(server_kills, "TAIL_TOKENS", (50, 200))
    account = kill_servers(MODEL, tmp_path, kills, seed=1)
    assert account.faults == []
    assert account.kills == kills
    assert min(account.replies, account.restored, account.checkpoints, account.verified) > 0


def test_a_second_server_takes_over_the_directory_of_one_that_was_killed(tmp_path):
    """Both answer alike throughout; the reader finds what the writer wrote, then writes itself."""
    launch = Launch.of(OURS, MODEL, ("--cache-dir", str(tmp_path / "cache")))
    one, other, third = (prompt[:700] for prompt in prompts(seed=3)[:3])
    with Victim(launch) as writer:
        writer.wait_ready()
        with Victim(launch) as reader:
            reader.wait_ready()
            assert [_disk(server)["is_writer"] for server in (writer, reader)] == [True, False]
            cold = {p: _reply(reader, p, cache_prompt=False)[0] for p in (one, other, third)}
            assert _reply(writer, one) == (cold[one], 0)
            _wait_until(lambda: not _disk(writer)["unwritten"] + _disk(writer)["queued_bytes"])
            _wait_until(lambda: _disk(reader)["checkpoints"] == _disk(writer)["checkpoints"])
            assert _reply(reader, one) == (cold[one], len(one) - 1)
            writer.kill()
            assert _reply(reader, other)[0] == cold[other]
            _wait_until(lambda: _disk(reader)["is_writer"])
            before = _disk(reader)["written_bytes"]
            assert _reply(reader, third)[0] == cold[third]
            _wait_until(lambda: _disk(reader)["written_bytes"] > before)
            assert reader.log == ""


def _disk(server):
    return httpx2.get(f"{server.url}/v1/cache", timeout=60, trust_env=False).json()["disk"]


def _reply(server, prompt, **options):
    body = {"prompt": list(prompt), **REPLY, **options}
    reply = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=120, trust_env=False)
    reply = reply.json()
    return reply["choices"][0], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def _wait_until(holds):
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.05)


def test_the_bench_counts_faults_and_fails_by_them(tmp_path, capsys):
    """Five kills of a writer and no others: exit status 0, figures in the file. With a fault it is 1."""
    file = tmp_path / "kills.json"
    asked = ["--writer", "5", "--stages", "0", "--server", "0", "--cuts", "0"]
    assert cli.main(["kills", *asked, "--json", str(file)]) == 0
    assert '"kills": 5' in file.read_text()
    assert "5" in capsys.readouterr().out
    broken = Account(kills=1, faults=["something"])
    assert not all(each.kept for each in figures({"writers": broken}))
    assert not all(each.kept for each in figures({"servers": ServerAccount(faults=["something"])}))
    assert all(each.kept for each in figures({"writers": Account()}))
