"""What `mlx-hybridcache plan` shows and refuses."""

import json
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny
from large_models import known_models
from large_models.plans import EIGHT_BITS, GIB, MIB, mac_plan, plan_of
from places import ROOT

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.cli.main import main
from mlx_hybridcache.cli.plan import as_sold
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.planning.unloaded_model import INDEX
from mlx_hybridcache.sizes import format_bytes

PLANNING = ROOT / "docs" / "planning.md"


def test_a_macs_memory_is_read_as_it_is_sold():
    """128GB on the box are 128 GiB."""
    assert as_sold("128GB") == as_sold("128 g") == as_sold("128GiB") == 128 * GIB
    assert as_sold("512MB") == 512 * MIB
    assert as_sold("1000") == 1000


def test_the_command_prints_the_plan_and_writes_it(tmp_path, capsys):
    """From a directory with one file in it; the exit status says whether it fits."""
    path = known_models.directory(tmp_path, "qwen3-next-80b", **EIGHT_BITS)
    file = tmp_path / "plan.json"
    options = ["plan", "--model", path, "--context", "120000", "--json", str(file)]
    assert main([*options, "--memory", "128GB"]) == 0
    shown = capsys.readouterr().out
    assert "A token weighs 24.0 KiB, a checkpoint 73.7 MiB." in shown
    assert "mlx_hybridcache.server --model" in shown
    assert "assumed, three quarters of the memory" in shown
    told = json.loads(file.read_text())
    assert told["token_bytes"] == 24 * 1024
    assert [load["requests"] for load in told["running"]] == [1, 4]
    assert told["fits"] is True
    assert main([*options, "--memory", "64GB"]) == 1
    assert "mlx_hybridcache.server" not in capsys.readouterr().out
    assert main([*options, "--memory", "128GB", "--working-set", "107.5GB"]) == 0
    assert "107.5 GiB (as given)" in capsys.readouterr().out


def test_quantized_keys_and_values_are_planned(tmp_path, capsys):
    """A quarter and a little of a token's bytes, in the layers that have rows; the flags say so too."""
    path = known_models.directory(tmp_path, "qwen3-next-80b", **EIGHT_BITS)
    file = tmp_path / "plan.json"
    options = ["plan", "--model", path, "--context", "120000", "--json", str(file)]
    assert main([*options, "--memory", "128GB", "--kv-bits", "4", "--quantized-kv-start", "0"]) == 0
    assert "Keys and values of 12 layers have 4 bits behind 0 tokens" in capsys.readouterr().out
    told = json.loads(file.read_text())
    assert told["token_bytes"] == 24 * 1024 * 4.5 / 16
    assert "--kv-bits" in told["flags"]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mamba2"])
def test_models_without_checkpoints_or_without_rows_are_planned_too(tmp_path, capsys, family):
    """Attention alone restores anywhere; a window's checkpoint is its rows; Mamba keeps none."""
    model = tiny.fresh(family)
    (tmp_path / "config.json").write_text(json.dumps({**asdict(model.args), "dtype": "float32"}))
    assert main(["plan", "--model", str(tmp_path), "--context", "1000", "--memory", "8GB"]) == 0
    shown = capsys.readouterr().out
    assert ("needs no checkpoint" in shown) == (family == "llama")
    assert ("A token weighs 0 B" in shown) == (family == "mamba2")
    plan = plan_of(tmp_path, 1000)
    with HybridPromptCache(model, memory_budget="1TiB") as cache:
        ready = cache.prefill(list(range(2, 102)) * 10, max_tokens=256)
        assert cache.stats().running_bytes == plan.running_bytes
        assert (plan.checkpoints > 0) is (family != "llama")
        assert (cache.stats().checkpoints > 0) is (family != "llama")
        assert cache.stats().checkpoints >= plan.checkpoints
        ready.release()


def test_the_shortest_plan_is_one_token(capsys):
    """A prompt of one token: nothing is read before it, nothing is stored."""
    assert main(["plan", "--model", str(BUNDLED_MODEL), "--context", "1"]) == 0
    with pytest.raises(SystemExit):
        main(["plan", "--model", str(BUNDLED_MODEL), "--context", "0"])
    assert "must be at least 1" in capsys.readouterr().err


def test_weights_that_are_cut_off_are_an_error_for_people(tmp_path, capsys):
    """A download that broke: the files are named, not the configuration alone."""
    for file in BUNDLED_MODEL.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:5000])
    (tmp_path / "config.json").write_bytes((BUNDLED_MODEL / "config.json").read_bytes())
    assert main(["plan", "--model", str(tmp_path)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "safetensors files beside it do not describe" in error
    assert "Is the download whole" in error


def test_the_command_plans_for_this_machine_by_default(capsys):
    """The bundled model fits anywhere; its budget is what the server would take."""
    assert main(["plan", "--model", str(BUNDLED_MODEL), "--context", "4000"]) == 0
    assert "this machine" in capsys.readouterr().out


def known_plan(row, tmp_path):
    """The plan of a row in the table of docs/planning.md, and its cells."""
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    names = {"80B": "qwen3-next-80b", "35B": "qwen3.5-35b", "122B": "qwen3.5-122b"}
    (name,) = (name for part, name in names.items() if part in cells[0])
    bits = int(re.search(r"(\d) bits", cells[0])[1])
    quantization = {"group_size": 64, "bits": bits}
    path = known_models.directory(tmp_path, name, quantization=quantization)
    return mac_plan(path, 128, 120_000), cells


def test_the_table_for_mac_studios_is_what_plan_says(tmp_path):
    """docs/planning.md: three models at 8, 6 and 4 bits."""
    lines = PLANNING.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if re.match(r"\| .* bits, .* GiB \|", line)]
    assert len(rows) == 8
    model = ""
    for row in rows:
        model = row.split(",")[0] if "the same" not in row else model
        plan, cells = known_plan(row.replace("| the same", model), tmp_path)
        assert format_bytes(plan.model.weights_bytes) in cells[0]
        if cells[1]:
            one, every = plan.least_conversation_bytes, plan.conversation_bytes
            assert cells[1:5] == [
                format_bytes(plan.layout.row_bytes).replace(".0", ""),
                format_bytes(plan.layout.snapshot_bytes),
                format_bytes(plan.running_bytes),
                f"{format_bytes(one).removesuffix(' GiB')} / {format_bytes(every)}",
            ]
        budget = format_bytes(plan.room.budget_bytes)
        if not plan.fits:
            longest = plan.longest_context
            budget = f"{budget}: up to {longest:,} tokens" if longest else "does not fit"
        stored = plan.conversations(plan.least_conversation_bytes)
        assert cells[5:] == [budget, str(plan.at_once), str(stored)]


def test_the_output_that_the_page_shows_is_the_commands(tmp_path, monkeypatch, capsys):
    """docs/planning.md: every line shown is printed, borders aside."""
    monkeypatch.chdir(tmp_path)
    Path("mlx-community").mkdir()
    repo = "mlx-community/Qwen3-Next-80B-A3B-Instruct-8bit"
    known_models.directory(Path(repo), "qwen3-next-80b", **EIGHT_BITS)
    text = PLANNING.read_text(encoding="utf-8")
    block = re.search(r"```console\n\$ mlx-hybridcache (plan .*?)\n(.*?)```", text, re.DOTALL)
    assert block is not None
    assert main(block[1].split()) == 0
    printed = " ".join(re.sub(r"[^\x00-\x7f]", " ", capsys.readouterr().out).split())
    for line in block[2].splitlines():
        assert line == "..." or " ".join(line.split()) in printed, line


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read"),
        ("[]", "names no model_type"),
        ("{}", "names no model_type"),
        ('{"model_type": "qwen9"}', "Model type qwen9 not supported"),
        ('{"model_type": "qwen3_next", "num_hidden_layers": "many"}', "num_hidden_layers 'many'"),
        ('{"model_type": "qwen3_next", "num_hidden_layers": 1000000000}', "from 1 to 10,000"),
        ('{"model_type": "qwen3_next"}', "missing .* required positional"),
        ({"hidden_size": "big"}, "TypeError"),
        ({"num_attention_heads": 0}, "does not describe a model"),
        ({"linear_value_head_dim": -3}, "ValueError"),
        ({"model_file": "own.py"}, "its own code"),
    ],
)
def test_a_config_that_cannot_be_read_is_an_error_for_people(tmp_path, capsys, config, said):
    """One sentence that names the file and what was found; exit status 2, and no code is run."""
    if isinstance(config, dict):
        known_models.directory(tmp_path, "qwen3-next-80b", **config)
    elif config is not None:
        (tmp_path / "config.json").write_text(config)
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')")
    assert main(["plan", "--model", str(tmp_path), "--memory", "128GB"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert str(tmp_path) in error
    assert "Traceback" not in error
    assert re.search(said, error), error
    assert not ran.exists()


def test_sizes_that_mean_nothing_are_refused(capsys):
    """A fruit; a working set without the memory it belongs to."""
    model = ["plan", "--model", str(BUNDLED_MODEL)]
    assert main([*model, "--memory", "banana"]) == 2
    assert "'banana' is not a size" in capsys.readouterr().err
    assert main([*model, "--working-set", "8GB"]) == 2
    assert "name its --memory" in capsys.readouterr().err


class Hub(BaseHTTPRequestHandler):
    """A hub with one repository, whose weights nobody may ask for."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self):
        """What a download asks first."""
        self.do_GET()

    def do_GET(self):
        """The list of files, or one of them."""
        self.asked.append(self.path)
        name = self.path.split("?")[0].rpartition("/")[2]
        names = [*self.files, "model.safetensors"]
        listing: object = {"id": "some/model", "sha": "a" * 40}
        if "/tree/" in self.path:
            listing = [{"type": "file", "path": each, "oid": each, "size": 1} for each in names]
        body = json.dumps(listing).encode() if "/api/" in self.path else self.files.get(name)
        self.send_response(404 if body is None else 200)
        body = body or b""
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        """Not on the terminal."""


@contextmanager
def hub(files):
    """The hub's address, and what it was asked."""
    handler = type("OneHub", (Hub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        server.server_close()


def test_of_a_repository_only_the_description_is_fetched(tmp_path):
    """`--model some/model` before 85 GB are downloaded: config.json and the list of files."""
    config = {**known_models.CONFIGS["qwen3-next-80b"], **EIGHT_BITS}
    index = {"metadata": {"total_size": 84_700_000_000}, "weight_map": {"x": "model.safetensors"}}
    files = {"config.json": json.dumps(config).encode(), INDEX: json.dumps(index).encode()}
    with hub(files) as (address, asked):
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "PATH": ""}
        command = [
            sys.executable,
            "-m",
            "mlx_hybridcache.cli",
            "plan",
            "--model",
            "some/model",
        ]
        done = subprocess.run(
            [*command, "--memory", "128GB"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "78.9 GiB" in done.stdout
    assert "--model some/model" in done.stdout
    assert not [path for path in asked if path.endswith(".safetensors")]
