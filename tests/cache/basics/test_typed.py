"""The wheel itself: what is in it, and what a user's type checker sees of it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.build import build_wheel
from places import ROOT

USER = """
from typing import Any

from mlx_hybridcache import CacheReport, Generation, HybridPromptCache, Ready
from mlx_lm.generate import GenerationResponse


def ask(model: Any, tokenizer: Any) -> CacheReport | None:
    with HybridPromptCache(model, tokenizer, memory_budget="1GB") as cache:
        with cache.stream_generate("Say hello.", max_tokens=3) as reply:
            made: Generation[GenerationResponse] = reply
            print("".join(piece.text for piece in made))
        with cache.prefill([1, 2, 3], boundaries=[2]) as ready:
            held: Ready = ready
            print(held.position + len(held.rest))
        return cache.last_report
"""

WRONG = """
from typing import Any

from mlx_hybridcache import HybridPromptCache


def ask(model: Any) -> None:
    cache = HybridPromptCache(model, memory_buget="1GB")
    cache.prefill(5)
    cache.lookup("text").restored_token
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel's contents, as an installer would lay them out."""
    folder, before = tmp_path_factory.mktemp("wheel"), Path.cwd()
    os.chdir(ROOT)
    try:
        name = build_wheel(str(folder))
    finally:
        os.chdir(before)
    with zipfile.ZipFile(folder / name) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


QUICKLY = """
[mypy]
strict = true
[mypy-mlx.*,mlx_lm.*,transformers.*,numpy.*,xxhash.*,filelock.*]
follow_imports = skip
"""
"""Others' packages take mypy half a minute, and are not what is asked about."""


def check(installed, folder, **files):
    """What mypy says of a user's files."""
    (folder / "mypy.ini").write_text(QUICKLY)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *(f"{name}.py" for name in files)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.stdout


PACKAGES = {"mlx_hybridcache", "mlx_hybridcache_server", "mlx_hybridcache_bench"}

MODEL = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_the_wheel_holds_the_packages_and_what_they_read(installed):
    """The bundled model as it is loaded, without the log of its training; no test, no tool, no corpus."""
    found = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    about = {path for path in found if path.parts[0].endswith(".dist-info")}
    assert {path.parts[0] for path in found - about} == PACKAGES
    assert {path.name for path in found if path.match("mlx_hybridcache/demo/model/*")} == MODEL
    assert {path.stem for path in found if path.match("mlx_hybridcache/demo/*.py")} == {
        "__init__",
        "client",
        "functions",
        "process",
        "run",
        "workloads",
    }
    rest = {
        path
        for path in found - about
        if path.suffix != ".py"
        and path.name != "py.typed"
        and not {"model", "draft"} & {*path.parts}
    }
    assert {path.suffix for path in rest} <= {
        *(".css", ".html", ".jinja", ".js", ".json", ".md", ".svg")
    }
    assert {path.name for path in rest if path.suffix == ".json"} == {"results.schema.json"}


@pytest.mark.parametrize("package", ["mlx_hybridcache", "mlx_hybridcache_server"])
def test_the_wheel_says_that_it_is_typed(installed, package):
    """PEP 561's marker: without it a type checker does not look inside."""
    assert (installed / package / "py.typed").is_file()


def test_a_users_file_is_checked_against_our_types(installed, tmp_path):
    """A program of 17 lines passes; a misspelt setting, a number for a prompt and no such field do not."""
    said = check(installed, tmp_path, right=USER, wrong=WRONG)
    assert {line.split(":")[0] for line in said.splitlines()[:-1]} == {"wrong.py"}
    assert 'Unexpected keyword argument "memory_buget"' in said
    assert 'incompatible type "int"' in said
    assert '"CacheReport" has no attribute "restored_token"' in said
    assert said.count(" error: ") == 3
