"""Others in the same directory: a second process, one that was killed, another model."""

import itertools
import os
import signal
import subprocess
import sys

import mlx.core as mx
import oracle
import pytest
import tiny
from directories import faults
from directories.faults import PATIENCE_SECONDS, served
from directories.filled import END, FIRST, MODEL, SECOND, assert_healed, opened, wait_until
from directories.restarts import held_up, until_idle
from long import mostly_long
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from places import SUPPORT

from mlx_hybridcache.disk import thread

# Two processes


def test_a_reader_sees_what_the_writer_wrote_and_takes_over_when_it_closes(root, said, quick):
    """Two caches in one directory: the second reads, then writes."""
    with opened(root) as reader:
        assert reader.disk_stats().is_writer
    with opened(root) as writer, opened(root) as reader:
        assert [cache.disk_stats().is_writer for cache in (writer, reader)] == [True, False]
        served(writer, SECOND)
        assert writer.flush(PATIENCE_SECONDS)
        wait_until(lambda: reader.lookup(SECOND).restored_tokens == len(SECOND) - 1)
        assert served(reader, SECOND) == ("disk", len(SECOND) - 1)
        writer.close()
        wait_until(lambda: reader.disk_stats().is_writer)
        third = oracle.prompt(200, seed=3)
        served(reader, third)
        assert reader.flush(PATIENCE_SECONDS)
    assert said.take() == []
    assert_healed(root, said, FIRST, SECOND, third)


def test_a_file_that_the_writer_let_go_of_is_no_cause_for_a_warning(root, said, caplog):
    """It goes while a reader waits for it: the reply is the same, read from what is left."""
    with opened(root) as writer, opened(root, tokenizer=oracle.word_tokenizer()) as reader:
        with held_up(reader):
            stream = reader.stream_generate(FIRST, 4)
            wait_until(lambda: stream._request.job.asleep)
            writer.drop(FIRST)
            until_idle(writer)
        reply = [part.token for part in stream]
        assert (reader.last_report.tier, reader.disk_stats().rejected) == ("none", 1)
        assert reply == [part.token for part in reader.stream_generate(FIRST, 4, use_cache=False)]
    assert any("the process that writes let go of it" in line for line in caplog.messages)
    assert said.take() == []


WRITER = """
import sys, time
import oracle, tiny
cache = oracle.new_cache(tiny.build("qwen3_next"), cache_dir=sys.argv[1])
assert cache.disk_stats().is_writer
print("ready", flush=True)
for seed in range(100, 10_000):
    oracle.read(cache, oracle.prompt(300, seed=seed))
"""


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_reader_takes_over_when_the_writer_is_killed(root, said, quick, busy):
    """Killed while it writes; the reader goes on, also when requests never leave it a moment's rest."""
    command = [sys.executable, "-c", WRITER, str(root)]
    where = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=where) as writer:
        try:
            assert writer.stdout.readline() == b"ready\n"
            with opened(root) as reader:
                assert not reader.disk_stats().is_writer
                assert served(reader, FIRST) == ("disk", END)
                disk = reader.engine.tiers.disk.thread
                writer.send_signal(signal.SIGKILL)
                if busy:
                    beat = [True]

                    def again(transfer):
                        if beat:
                            disk.read(thread.Transfer([], again))

                    again(None)
                wait_until(lambda: reader.disk_stats().is_writer)
                if busy:
                    beat.clear()
                assert served(reader, SECOND) == ("none", 0)
                assert reader.flush(PATIENCE_SECONDS)
        finally:
            writer.kill()
    assert said.take() == []
    assert_healed(root, said, FIRST, SECOND)


# Another model


@pytest.mark.parametrize(
    ("path", "end"),
    mostly_long(
        itertools.product(
            [
                "model.embed_tokens.weight",
                "model.layers.0.linear_attn.A_log",
                "model.layers.2.mlp.switch_mlp.up_proj.weight",
                "lm_head.weight",
            ],
            [0, -1],
        ),
        [("model.embed_tokens.weight", 0), ("lm_head.weight", -1)],
    ),
)
def test_one_changed_number_is_another_model(root, path, end):
    """The next larger float32, at the first and the last place: nothing is shared, in either direction."""
    changed = faults.changed_weight(MODEL, path, end)
    with oracle.new_cache(changed, cache_dir=root) as cache:
        assert served(cache, FIRST) == ("none", 0)
        assert cache.flush(PATIENCE_SECONDS)
    with oracle.new_cache(changed, cache_dir=root) as cache:
        assert served(cache, FIRST) == ("disk", END)
    with opened(root) as cache:
        assert served(cache, FIRST) == ("disk", END)


def test_a_fused_adapter_is_another_model(root):
    """A LoRA of rank 2 on one projection, as layers of its own and fused: three models, three caches."""
    adapted = tiny.fresh(MODEL)
    attention = adapted.model.layers[-1].self_attn
    lora = LoRALinear.from_base(attention.q_proj, r=2)
    lora.lora_b = 0.01 * mx.random.normal(lora.lora_b.shape)
    attention.q_proj = lora
    fused = tiny.fresh(MODEL)
    fused.model.layers[-1].self_attn.q_proj = lora.fuse()
    mx.eval(adapted.parameters(), fused.parameters())
    assert len(tree_flatten(fused.parameters())) == len(
        tree_flatten(tiny.build(MODEL).parameters())
    )
    for model in (adapted, fused):
        with oracle.new_cache(model, cache_dir=root) as cache:
            assert served(cache, FIRST) == ("none", 0)
            assert cache.flush(PATIENCE_SECONDS)
    for model in (tiny.build(MODEL), adapted, fused):
        with oracle.new_cache(model, cache_dir=root) as cache:
            assert served(cache, FIRST) == ("disk", END)
