"""What a command imports before it answers: MLX and mlx-lm take seconds, so only what computes does."""

import ast
import json
import os
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

import mlx_hybridcache
from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.cli.main import COMMANDS

HEAVY = {"mlx", "mlx_lm", "transformers", "huggingface_hub", "fastapi", "torch"}

COMMAND = """
import contextlib, io, json, sys
from mlx_hybridcache.cli.main import main

said = io.StringIO()
try:
    with contextlib.redirect_stdout(said):
        status = main(sys.argv[1:])
except SystemExit as ended:
    status = ended.code
print(json.dumps([status, sorted({name.split(".")[0] for name in sys.modules}), said.getvalue()]))
"""


def run(program: str, *words: str | Path) -> list:
    """What a new process prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


HELP = [
    [],
    ["--help"],
    ["--version"],
    ["serve", "--version"],
    ["cache"],
    *([name, "--help"] for name in COMMANDS),
    *(["cache", name, "--help"] for name in ("ls", "prune", "export")),
]
"""The commands of a directory share a parser, and each has its functions in one of three modules."""


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_is_shown_without_mlx(words):
    """Neither mlx nor mlx-lm, and nothing that reads models or serves them."""
    status, imported, said = run(COMMAND, *words)
    assert status == 0
    assert "mlx" in said
    assert not (HEAVY | {"filelock"}) & set(imported)


@pytest.mark.parametrize("what", ["ls", "stats", "verify"])
def test_a_cache_directory_is_looked_into_without_mlx(what, tmp_path):
    """Of a directory that a server has made and left nothing in."""
    (tmp_path / "segments").mkdir()
    _, imported, _ = run(COMMAND, "cache", what, "--cache-dir", tmp_path)
    assert "sqlite3" in imported
    assert not (HEAVY | {"filelock"}) & set(imported)


@pytest.mark.parametrize("words", [["ls"], ["ls", "--json"], ["stats", "--json"]], ids=" ".join)
def test_nothing_that_draws_is_imported_where_there_is_nothing_to_draw(words, tmp_path):
    """Of an empty directory there is a line to say, and programs read JSON."""
    (tmp_path / "segments").mkdir()
    status, imported, said = run(COMMAND, "cache", *words, "--cache-dir", tmp_path)
    assert (status, str(tmp_path) in said) == (0, True)
    assert "rich" not in imported


IMPORT = """
import json, sys
import mlx_hybridcache
before = sorted({name.split(".")[0] for name in sys.modules})
from mlx_hybridcache import *
print(json.dumps([before, mlx_hybridcache.__all__, sorted(globals())]))
"""


def test_importing_the_package_imports_no_mlx_and_a_star_everything():
    """Errors and reports are there at once; the cache, its handles and its figures when asked for."""
    before, public, after = run(IMPORT)
    assert not (HEAVY | {"numpy"}) & set(before)
    assert set(public) <= set(after) | {"__version__"}


def test_every_public_name_is_listed_documented_and_what_its_module_says():
    """`dir`, `help` and a second look find the same objects."""
    assert set(mlx_hybridcache.__all__) <= set(dir(mlx_hybridcache))
    assert mlx_hybridcache.HybridPromptCache is HybridPromptCache
    shown = pydoc.plain(pydoc.render_doc(mlx_hybridcache))
    for name in set(mlx_hybridcache.__all__) - {"__version__"}:
        assert f"class {name}" in shown
    with pytest.raises(AttributeError, match="no attribute 'HybridCache'"):
        _ = mlx_hybridcache.HybridCache
    with pytest.raises(ImportError, match="HybridCache"):
        exec("from mlx_hybridcache import HybridCache")


def test_type_checkers_are_told_of_the_names_that_load_when_asked_for():
    """Each from the module that it comes from at run time."""
    tree = ast.parse((ROOT / "mlx_hybridcache" / "__init__.py").read_text())
    (told,) = (node for node in tree.body if isinstance(node, ast.If))
    assert {
        alias.name: node.module
        for node in told.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    } == mlx_hybridcache._LOADED_WHEN_ASKED_FOR


COUNTED = """
import collections, statistics, sys

looks = collections.Counter()

def opened(event, arguments):
    if event == "open" and "/transformers/models/" in str(arguments[0]) and arguments[0].endswith(".py"):
        looks[arguments[0]] += 1

sys.addaudithook(opened)
"""
"""How often each file of transformers' models is read."""

LOOKS = """
import json
from pathlib import Path
from mlx_hybridcache import backend

split = []

class Counting(backend._ShorterLooks):
    def _change(self, module):
        names_in = module.fetch__all__
        module.fetch__all__ = lambda text: split.append(len(text)) or names_in(text)
        super()._change(module)

backend._ShorterLooks = Counting
if sys.argv[1] == "once":
    backend.import_transformers()
import mlx_lm, transformers
from transformers import AutoTokenizer
from transformers.utils import import_utils
found = import_utils.define_import_structure(Path(transformers.models.__path__[0]))  # remembered
offered = sorted((sorted(needs), sorted((at, sorted(names)) for at, names in of.items())) for needs, of in found.items())
looks = statistics.mode(looks.values())
print(json.dumps([looks, len(split), sum(split), offered, dir(transformers), dir(transformers.models)]))
"""


def test_the_files_of_transformers_models_are_read_once_and_offer_the_same():
    """Which are some 1,700, and a quarter of what a server's start takes. Of itself transformers reads them twice.

    And splits 35 million characters for the names that stand at the files' ends.
    """
    plain, once = run(COUNTED + LOOKS, "of itself"), run(COUNTED + LOOKS, "once")
    looks, files, characters, *offered = once
    assert looks == 1
    assert files > 1000
    assert characters / files < 1000
    assert len(offered[0]) > 3
    assert plain[3:] == offered


def test_the_demo_counts_tokens_without_a_word_about_frameworks():
    """What it needs is there, and nobody misses PyTorch."""
    program = (
        "from mlx_hybridcache.demo import BUNDLED_MODEL, run\nrun._tokenizer(str(BUNDLED_MODEL))"
    )
    own = {name: value for name, value in os.environ.items() if "TRANSFORMERS" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program], env=own, capture_output=True, timeout=120, check=True
    )
    assert done.stdout + done.stderr == b""


SERVER = """
import json, sys
import uvicorn
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache_server.main import main

def started(server, sockets):
    print(json.dumps([sorted(sys.modules), statistics.mode(looks.values())]))

uvicorn.Server.run = started
main(["--model", str(BUNDLED_MODEL), "--port", "0", "--log-level", "ERROR"], "server")
"""


def test_a_server_starts_without_what_its_flags_and_requests_have_not_asked_for():
    """No disk tier, no grammars, no formats of calls; and transformers' files are read once."""
    imported, looks = run(COUNTED + SERVER)
    assert looks == 1
    assert "mlx_hybridcache_server.replies.chat" in imported
    late = {"sqlite3", "llguidance", "mlx_hybridcache.disk.tier.tier"}
    late |= {"mlx_hybridcache_server.calls.formats", "mlx_hybridcache_server.grammar.constrain"}
    assert not late & set(imported)
