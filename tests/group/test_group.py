"""Several ranks, each with a part of the model, say what one process says: hot, cold, in company, after evictions."""

import ctypes.util
import json
import os
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
from long import mostly_long
from matrix import shapes
from oracle import word_tokenizer
from ranks import scenarios
from ranks.scenarios import as_lists, replies_only
from ranks.started import MOST_SECONDS, SUPPORT, group_of

from mlx_hybridcache import GroupError, HybridPromptCache
from mlx_hybridcache.caches.layout import Layout, fresh_caches, leaves
from mlx_hybridcache.group import address
from mlx_hybridcache.group.layout import spread

MPIRUN, LIBMPI = shutil.which("mpirun"), ctypes.util.find_library("mpi")


def in_one_process(family, seed, acts, *, at_once):
    with HybridPromptCache(shapes.build(family), word_tokenizer(), **scenarios.SETTINGS) as cache:
        return as_lists([*scenarios.journey_of(cache, seed, acts, at_once=at_once)])


def planned(family, size):
    """How many layers the model has, and what a token and a checkpoint weigh by the plan."""
    layout = Layout.of(model := shapes.build(family))
    layout.release()
    of_each = [len(leaves([each])) for each in fresh_caches(model)]
    spread_out = spread(layout, of_each, size)
    return len(layout.kinds), [spread_out.row_bytes, spread_out.snapshot_bytes]


def in_a_group(tmp_path, family, how, size, seed, acts, **options):
    asked = json.dumps({"seed": seed, "acts": acts, **options})
    with group_of(size, tmp_path, "journey", family, how, asked) as ranks:
        evictions = ranks[0].hears("evictions")[0]
        whole, row_bytes = planned(family, size)
        for rank in ranks if how == "pipeline" else []:
            assert (rank.hears("weights"), rank.hears("layers")) == ([row_bytes], [whole])
        for rank in ranks:
            assert rank.ends() == 0, rank.printed
        return [each["one"] for each in ranks[0].said if "one" in each], evictions


@pytest.mark.parametrize(
    ("family", "size", "acts"),
    mostly_long(
        [
            ("qwen3_next", 2, 12),
            ("qwen3_next", 4, 8),  # of four ranks one has attention alone, and three have none
            ("qwen3_next", 2, 200),
            ("qwen3_next", 4, 60),
            ("qwen3_5", 2, 200),
            ("qwen3_5_moe", 2, 200),
            ("ministral3", 2, 60),  # a window on one rank
        ],
        always=[("qwen3_next", 2, 12), ("qwen3_next", 4, 8)],
    ),
)
def test_layers_on_ranks_give_the_bits_and_the_counts_of_one_process(tmp_path, family, size, acts):
    found, _ = in_a_group(tmp_path, family, "pipeline", size, 1, acts, at_once=False)
    assert found == in_one_process(family, 1, acts, at_once=False)
    assert sum(one[2] for one in found) > 5 * acts


@pytest.mark.parametrize(
    ("family", "size", "acts"),
    mostly_long(
        [
            ("qwen3_5", 2, 12),
            ("qwen3_next", 2, 200),
            ("qwen3_5", 2, 100),
            ("qwen3_5_moe", 4, 40),
            ("ministral3", 2, 40),
        ],
        always=[("qwen3_5", 2, 12)],
    ),
)
def test_in_company_and_after_evictions_the_bits_are_the_same(tmp_path, family, size, acts):
    small = {"memory_budget": "700KB"}
    found, evictions = in_a_group(
        tmp_path, family, "pipeline", size, 2, acts, at_once=True, settings=small
    )
    assert evictions
    assert replies_only(found) == replies_only(in_one_process(family, 2, acts, at_once=True))


@pytest.mark.parametrize(
    ("family", "acts"),
    mostly_long(
        [("qwen3_5", 10), ("qwen3_5", 100), ("gpt_oss", 60)],  # the last has windows
        always=[("qwen3_5", 10)],
    ),
)
def test_tensors_on_ranks_give_the_tokens_of_one_process_and_hot_what_is_cold(
    tmp_path, family, acts
):
    found, _ = in_a_group(tmp_path, family, "tensor", 2, 3, acts, at_once=False)
    expected = in_one_process(family, 3, acts, at_once=False)
    assert [(tokens, restored) for tokens, _, restored in found] == [
        (tokens, restored) for tokens, _, restored in expected
    ]


@pytest.mark.parametrize("family", mostly_long(["qwen3_5", "gpt_oss"], always=["gpt_oss"]))
def test_tensors_on_ranks_give_hot_the_bits_of_cold(tmp_path, family):
    with group_of(2, tmp_path, "hot_and_cold", family, "tensor", "{}") as ranks:
        hot, cold = ranks[0].hears("hot")[0], ranks[0].hears("cold")[0]
        assert [rank.ends() for rank in ranks] == [0, 0]
    assert hot[:2] == cold[:2]
    assert (hot[2], cold[2]) == (299, 0)


@pytest.mark.skipif(MPIRUN is None or LIBMPI is None, reason="no MPI is installed")
def test_ranks_that_mpirun_starts_find_each_other():
    """No launcher tells them where rank 0 is; on one machine that is found out, and elsewhere named."""
    started = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable]
    asked = ["-m", "ranks.process", "hot_and_cold", "qwen3_next", "pipeline", "{}"]
    environment = {**os.environ, "PYTHONPATH": SUPPORT, "MLX_MPI_LIBNAME": LIBMPI}
    done = subprocess.run(
        [*started, *asked],
        check=False,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=MOST_SECONDS,
    )
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    (hot,), (cold,) = ([each[key] for each in said if key in each] for key in ("hot", "cold"))
    assert hot[:2] == cold[:2]
    assert (hot[2], cold[2]) == (299, 0)


@pytest.mark.parametrize(
    ("named", "found"), [(None, "10.1.2.3"), ("studio1.local", "studio1.local")]
)
def test_without_a_launcher_rank_0_is_where_its_own_name_or_the_user_says(
    monkeypatch, named, found
):
    for name in ("MLX_HOSTFILE", "MLX_JACCL_COORDINATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(address, "_is_one_machine", lambda ranks: False)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.1.2.3")
    if named is not None:
        monkeypatch.setenv(address.NAMED, named)
    assert address.address_of_rank_0(SimpleNamespace(rank=lambda: 0)) == found


def test_an_address_that_others_do_not_reach_is_refused(monkeypatch):
    for name in ("MLX_HOSTFILE", "MLX_JACCL_COORDINATOR", address.NAMED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(address, "_is_one_machine", lambda ranks: False)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    with pytest.raises(GroupError, match=r"127\.0\.1\.1 here\. Set MLX_HYBRIDCACHE_RANK_0"):
        address.address_of_rank_0(SimpleNamespace(rank=lambda: 0))


def test_a_turn_takes_one_message_and_a_restore_one_more_and_files_two(tmp_path):
    """Where files are looked for: before others are waited for, and before a restore."""
    kept = json.dumps({"settings": {"cache_dir": str(tmp_path / "ranks")}})
    with group_of(2, tmp_path, "messages", "qwen3_next", "pipeline", kept) as ranks:
        sent, turns = ranks[0].hears("messages", 2), ranks[0].hears("turns", 2)
        assert [rank.ends() for rank in ranks] == [0, 0]
    for told, count in zip(sent, turns, strict=True):
        assert told.count("agree") == 1
        # Who reads the same beginning is asked for first, and the end is told.
        assert len(told) - told.count("gathered") <= count + 2
    # The second prompt goes on so soon behind what memory has that no file is looked for.
    assert [told.count("gathered") for told in sent] == [2, 0]


def test_what_is_pinned_and_dropped_is_so_on_every_rank(tmp_path):
    """Whose caches count the same whenever something is restored; a rank that kept or evicted more is noticed."""
    small = json.dumps({"settings": {"memory_budget": "700KB"}})
    with group_of(2, tmp_path, "kept_and_dropped", "qwen3_5", "pipeline", small) as ranks:
        assert [rank.ends() for rank in ranks] == [0, 0], ranks[0].printed
        assert ranks[0].hears("evictions")[0]
        assert ranks[0].hears("kept")[0][2] == 299
        assert [ranks[0].hears("gone")[0], ranks[0].hears("gone")[1][2]] == [0, 0]


def test_a_requests_own_functions_fail_on_rank_0_and_end_that_request_on_all(tmp_path):
    with group_of(2, tmp_path, "failing", "qwen3_next", "pipeline", "{}") as ranks:
        hot = ranks[0].hears("hot", 2)
        assert [rank.ends() for rank in ranks] == [0, 0], ranks[0].printed
        assert ranks[0].hears("failed_with") == ["a caller's own"] * 9
    assert [each[2] for each in hot] == [0, 299]
    with HybridPromptCache(
        shapes.build("qwen3_next"), word_tokenizer(), **scenarios.SETTINGS
    ) as cache:
        assert hot[0] == as_lists(scenarios.reply(cache, tiny.random_tokens(300, 1), 8))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("evicts alone", "its cache counts"),
        ("restores elsewhere", "it would restore"),
        ("fails", "layer cannot be computed"),
    ],
)
def test_a_rank_that_parts_ways_is_noticed_before_anything_is_said(tmp_path, how, why):
    broken = json.dumps({"seed": 4, "acts": 20, "at_once": False, "broken": how})
    with group_of(2, tmp_path, "journey", "qwen3_next", "pipeline", broken) as ranks:
        for rank in ranks:
            assert rank.ends() == 3, rank.printed
        said = [each["one"] for each in ranks[0].said if "one" in each]
        failed = ranks[0].hears("failed")[0]
    assert "Rank 1" in failed
    assert why in failed
    assert said == in_one_process("qwen3_next", 4, 20, at_once=False)[: len(said)]
