"""Who may import whom within the bench: folders in one order, at most 14 files each, no circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from checkout.source_files import imports, module_name, parsed
from places import ROOT

BENCH = ROOT / "bench" / "mlx_hybridcache_bench"
PACKAGE = "bench.mlx_hybridcache_bench"  # as `module_name` writes it, which begins at the checkout

ORDER = [
    {"cli"},
    {"ranks"},
    {"afternoon", "against", "decode", "hotpath", "kills", "page", "quantized", "speculate"},
    {"router", "start", "ttft"},
    {"report"},
    {"disk"},
    {"serving"},
    {"overhead"},
    {"policies"},
    {"kit"},
    {"__init__"},
]
"""Modules and folders, entry points first: each imports what stands below it."""

RANK = {unit: rank for rank, units in enumerate(ORDER) for unit in units}
FILES = sorted(BENCH.rglob("*.py"))
MOST_FILES = 14


def unit(module: str) -> str:
    """The entry of `ORDER` that a module belongs to."""
    return module.removeprefix(PACKAGE).strip(".").partition(".")[0] or "__init__"


def own_imports(source: str, module: str) -> set[str]:
    """Modules of the bench that a module imports, itself left out."""
    found = set()
    for name in imports(ast.parse(source), module, each_name=True):
        parts = name.split(".")
        for known in (name, ".".join(parts[:-1])):
            file = ROOT / f"{known.replace('.', '/')}.py"
            if known.startswith(PACKAGE) and file.is_file():
                found.add(known)
                break
    return found


def upward(source: str, module: str) -> list[str]:
    """Imports that point up, or sideways into another folder."""
    rank = RANK[unit(module)]
    return [
        name
        for name in sorted(own_imports(source, module))
        if unit(name) != unit(module) and RANK[unit(name)] <= rank
    ]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_module_has_a_place_and_imports_what_is_below(path: Path) -> None:
    """`serving` may import `kit`; `kit` may not import `serving`."""
    assert unit(module_name(path)) in RANK
    assert upward(path.read_text(encoding="utf-8"), module_name(path)) == []


@pytest.mark.parametrize(
    "source",
    ["from ..serving.client import Client", "def late():\n    from ..ttft import plan"],
)
def test_an_upward_import_is_noticed(source: str) -> None:
    """At the top and within a function."""
    assert len(upward(source, f"{PACKAGE}.kit.text")) == 1


def test_no_modules_import_each_other() -> None:
    """Within folders too: `prepare` raises where there is a circle."""
    graph = {
        module_name(path): own_imports(path.read_text(encoding="utf-8"), module_name(path))
        for path in FILES
    }
    assert sum(map(len, graph.values())) > 100, "else the imports were not found"
    TopologicalSorter(graph).prepare()


def test_folders_and_files_can_be_taken_in_at_a_glance() -> None:
    """14 files in a folder at most, 400 lines in a file; the tests likewise, with 500 lines."""
    tests = ROOT / "tests" / "bench"
    for folder in {BENCH, tests, *(path.parent for path in FILES)}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder
    for path in [*FILES, *tests.glob("*.py")]:
        most = 500 if path.is_relative_to(tests) else 400
        assert len(path.read_text(encoding="utf-8").splitlines()) <= most, path


def test_functions_fit_on_a_screen() -> None:
    """40 lines at most."""
    long = [
        f"{module_name(path)}.{node.name}"
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= 40
    ]
    assert long == []
