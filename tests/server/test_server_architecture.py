"""The server's folders: who may import whom, and how many files one holds, read from the source files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from checkout.source_files import imports, module_name, parsed, sources
from places import ROOT

PACKAGE = "mlx_hybridcache_server"
FOLDER = ROOT / "server" / PACKAGE

ORDER = [
    {"main"},
    {"service"},
    {"app", "banner"},
    {"explaining"},
    {"anthropic", "openai", "probes", "responses", "watching"},
    {"replies"},
    {"generation"},
    {"grammar", "loading"},
    {"calls", "prompts"},
    {"schema"},
    {"failures", "http"},
    {"metrics", "settings"},
    {"configured"},
    {"flags"},
    {"adapter", "errors", "log"},
    {"__init__", "jsontext"},
]
"""Modules and folders, the entry point first: each imports what stands below it, and itself."""

RANK = {unit: rank for rank, units in enumerate(ORDER) for unit in units}
MOST_FILES = 14


def unit(module: str) -> str:
    """The entry of `ORDER` that a module belongs to, by its name within the package."""
    return module.partition(".")[0]


def within(path: Path) -> str:
    """A file's module name without the package's."""
    return module_name(path).removeprefix(f"server.{PACKAGE}.")


def not_downwards(tree: ast.AST, module: str) -> list[str]:
    """Imports of the package's own modules that point up or sideways."""
    own = unit(module)
    found = imports(tree, f"{PACKAGE}.{module}", each_name=True)
    names = [name.removeprefix(f"{PACKAGE}.") for name in found if name.startswith(f"{PACKAGE}.")]
    units = {unit(name) if unit(name) in RANK else "__init__" for name in names}
    return sorted(each for each in units - {own} if RANK[each] <= RANK[own])


each_file = pytest.mark.parametrize("path", sources(f"server/{PACKAGE}"), ids=within)


@each_file
def test_no_import_points_up_or_sideways(path: Path) -> None:
    """`openai` uses `generation`, which knows nothing of OpenAI's shapes."""
    assert unit(within(path)) in RANK
    assert not_downwards(parsed(path), within(path)) == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("generation.models", "from ..openai.logprobs import TokenNames", ["openai"]),
        ("http.disconnects", "def late():\n    from ..generation import serving", ["generation"]),
        ("watching.watch", "import mlx_hybridcache_server.openai.routes", ["openai"]),
        ("schema.requests", "from .. import app", ["app"]),
        ("openai.routes", "from ..generation.serving import Serving\nfrom .reply import Reply", []),
    ],
)
def test_imports_that_do_not_point_down_are_noticed(
    module: str, source: str, found: list[str]
) -> None:
    """However they are written."""
    assert not_downwards(ast.parse(source), module) == found


def test_a_folder_holds_at_most_14_files() -> None:
    """One can read the list of what is in it."""
    folders = [FOLDER, *(each for each in FOLDER.iterdir() if each.is_dir())]
    crowded = {each.name: len(list(each.glob("*.py"))) for each in folders}
    assert {name: count for name, count in crowded.items() if count > MOST_FILES} == {}
