"""Who may import whom, read from the source files themselves.

`ORDER` is the list of the design: a module imports what stands below it, never what stands above.
"""

import ast
import inspect
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import house
import mlx_lm.models.cache
import pytest
from checkout.source_files import module_name, parsed, sources
from places import ROOT

LIBRARY = "mlx_hybridcache"

ORDER = [
    {"cli", "server", "__main__"},
    {"demo", "planning"},
    {"__init__", "verify"},
    {"cache"},
    {"settings"},
    {"group"},
    {"engine"},
    {"drafting"},
    {"decode", "prefill"},
    {"tiers"},
    {"disk", "request"},
    {"caches", "router"},
    {"store"},
    {"adapters", "machine", "models", "tokenizing", "worker"},
    {"backend", "report", "sizes", "tokens"},
    {"errors"},
]
"""Modules and folders of the library, entry points first. Those of one rung do not know each other."""

RANK = {unit: rank for rank, units in enumerate(ORDER) for unit in units}
ENTRY_POINTS = ORDER[0]
WITHOUT_MLX = {
    "backend",
    "cli",
    "disk",
    "errors",
    "machine",
    "prefill.schedule",
    "report",
    "sizes",
    "store",
    "tokens",
    "worker.inbox",
    "worker.turns",
}
"""Folders and modules that reckon with numbers. But what `WITH_MLX` names."""

WITH_MLX = {"cli.verify", "disk.tier"}
"""Folders and modules of these that hold arrays."""

UPPER_PACKAGES = {"mlx_hybridcache_server", "mlx_hybridcache_bench"}
UNSAFE_FORMATS = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}

CACHE_CLASSES = {
    name
    for name, _ in inspect.getmembers(mlx_lm.models.cache, inspect.isclass)
    if name.endswith(("Cache", "CacheList"))
}
"""KVCache, ArraysCache and the rest, as the installed mlx-lm names them."""


def unit(module: str) -> str:
    """The entry of `ORDER` that a module of the library belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def is_without_mlx(module: str) -> bool:
    """Whether a module, or the folder it lies in, is listed as one that never meets an array."""
    name = module.removeprefix(f"{LIBRARY}.")
    folders = {name.split(".")[0], ".".join(name.split(".")[:2]), name}
    return not folders & WITH_MLX and bool(folders & WITHOUT_MLX)


def is_unit(name: str) -> bool:
    """Whether `name` is a module or folder of the library, listed or not, and not a public name."""
    folder = ROOT / LIBRARY
    return name in RANK or (folder / name).is_dir() or (folder / f"{name}.py").is_file()


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Absolute names of what a module imports, one for each imported name.

    `from mlx_hybridcache import store` gives the folder `mlx_hybridcache.store`, while a public name
    taken from there gives `mlx_hybridcache`, the package.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                names_module = source == LIBRARY and is_unit(alias.name)
                yield f"{source}.{alias.name}" if names_module else source


def upward_imports(tree: ast.Module, module: str) -> list[str]:
    """Imports of `module` that point up in `ORDER`, sideways, or at a module that has no place in it."""
    lowest = len(ORDER)
    own = unit(module)
    rank = RANK.get(own, lowest)
    return [
        name
        for name in imports(tree, module)
        if name.split(".")[0] == LIBRARY and unit(name) != own and RANK.get(unit(name), -1) <= rank
    ]


def names(tree: ast.AST) -> Iterator[str]:
    """Every identifier a file uses, and every string constant that could stand for one."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                yield name
            case ast.Constant(value=str(text)):
                yield text


def modules_naming(wanted: set[str], trees: Mapping[str, ast.Module]) -> set[str]:
    """Those of the modules that use one of the `wanted` names."""
    return {module for module, tree in trees.items() if wanted & set(names(tree))}


each_library_file = pytest.mark.parametrize("path", sources(LIBRARY), ids=module_name)


@each_library_file
def test_every_module_has_a_place_in_the_order(path: Path) -> None:
    """A new file is added to `ORDER` where it belongs, so that its imports are checked at all."""
    assert unit(module_name(path)) in RANK


@each_library_file
def test_no_import_points_up(path: Path) -> None:
    """`store` may import `errors.py`; `errors.py` may not import `store`."""
    assert upward_imports(parsed(path), module_name(path)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mlx_hybridcache.errors", "from mlx_hybridcache.store.tree import Tree"),
        ("mlx_hybridcache.store.tree", "def late():\n    import mlx_hybridcache.engine"),
        ("mlx_hybridcache.store.tree", "from .. import engine"),
        ("mlx_hybridcache.caches.room", "from ..engine import Engine"),
        ("mlx_hybridcache.prefill.replay", "from ..decode.reply import Reply"),
        ("mlx_hybridcache.caches.kinds.rows", "from mlx_hybridcache import engine"),
        ("mlx_hybridcache.engine", "from mlx_hybridcache import HybridPromptCache"),
        ("mlx_hybridcache.__init__", "from .cli.main import main"),
    ],
)
def test_an_upward_import_is_noticed_however_it_is_written(module: str, source: str) -> None:
    """Absolute, relative, lazy, of a module or of a public name: each is found."""
    assert len(upward_imports(ast.parse(source), module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mlx_hybridcache.store.tree", "from ..errors import CacheError"),
        (
            "mlx_hybridcache.caches.kinds.rows",
            "from .kind import Kind\nfrom ...errors import CacheError",
        ),
        ("mlx_hybridcache.caches.kinds.__init__", "from .rows import Rows"),
        ("mlx_hybridcache.demo.__init__", "from mlx_hybridcache import HybridPromptCache, verify"),
        ("mlx_hybridcache.__init__", "from .engine import HybridPromptCache"),
    ],
)
def test_a_downward_import_is_allowed(module: str, source: str) -> None:
    """Downwards, and within one folder, every spelling passes."""
    assert upward_imports(ast.parse(source), module) == []


@each_library_file
def test_only_entry_points_import_the_server_and_the_bench_and_lazily(path: Path) -> None:
    """`import mlx_hybridcache` needs neither; a command imports its package when it runs."""
    tree, module = parsed(path), module_name(path)
    at_load = ast.Module(
        body=[node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)],
        type_ignores=[],
    )
    searched = at_load if unit(module) in ENTRY_POINTS else tree
    assert not UPPER_PACKAGES & {name.split(".")[0] for name in imports(searched, module)}


BATCHES = {"GenerationBatch", "BatchGenerator", "PromptProcessingBatch", "_merge_caches"}
"""Of `mlx_lm.generate`, what changes between its minor versions."""


@pytest.fixture(scope="module")
def library() -> dict[str, ast.Module]:
    """Every module of the library."""
    return {module_name(path): parsed(path) for path in sources(LIBRARY)}


def test_one_file_names_the_cache_classes_of_mlx_lm(library: dict[str, ast.Module]) -> None:
    """What mlx-lm renames is looked for in `caches/layout.py` alone."""
    assert {"KVCache", "ArraysCache", "CacheList", "RotatingKVCache"} <= CACHE_CLASSES
    assert modules_naming(CACHE_CLASSES, library) == {f"{LIBRARY}.caches.layout"}


def test_one_file_names_the_batches_of_mlx_lm(library: dict[str, ast.Module]) -> None:
    """The decoder's file alone knows `GenerationBatch` and its kin."""
    assert set(dir(import_module("mlx_lm.generate"))) >= BATCHES, (
        "else the names to look for have changed"
    )
    (one,) = modules_naming(BATCHES, library)
    assert one.startswith(f"{LIBRARY}.decode.")


@pytest.mark.parametrize("name", sorted(BATCHES | CACHE_CLASSES))
@pytest.mark.parametrize(
    "source",
    ["from mlx_lm.x import {}", "import mlx_lm\n\nmlx_lm.x.{}()", "getattr(x, '{}')", "x = {}()"],
)
def test_a_second_file_that_names_one_is_noticed(name: str, source: str) -> None:
    """However it is written."""
    planted = {"mlx_hybridcache.engine": ast.parse(source.format(name))}
    assert modules_naming(BATCHES | CACHE_CLASSES, planted) == set(planted)


@pytest.mark.parametrize("path", [*sources(LIBRARY), *sources("bench")], ids=module_name)
def test_no_file_reads_a_format_that_can_run_code(path: Path) -> None:
    """A cache directory may hold foreign files: nothing here unpickles."""
    roots = {name.split(".")[0] for name in imports(parsed(path), module_name(path))}
    assert not UNSAFE_FORMATS & roots


@pytest.mark.parametrize(
    "path",
    [path for path in sources(LIBRARY) if is_without_mlx(module_name(path))],
    ids=module_name,
)
def test_decisions_need_no_mlx(path: Path) -> None:
    """Tree, schedule, policy, tokens, reports and errors reckon with numbers, never with arrays."""
    roots = {name.split(".")[0] for name in imports(parsed(path), module_name(path))}
    assert not {"mlx", "mlx_lm"} & roots


def test_a_cache_directory_is_read_without_the_tier(library: dict[str, ast.Module]) -> None:
    """`cache ls` and an archive know segments, the index and the trees; what holds arrays knows them."""
    tier = f"{LIBRARY}.disk.tier"
    below = [name for name in library if name.startswith(f"{LIBRARY}.disk.")]
    outside = [name for name in below if not name.startswith(tier)]
    assert len(below) > len(outside) > 0
    for module in outside:
        assert not [each for each in imports(library[module], module) if each.startswith(tier)]


@pytest.mark.parametrize("path", [*sources(LIBRARY), *sources("bench")], ids=module_name)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    """The first line of a file tells a reader whether to read on."""
    assert ast.get_docstring(parsed(path))


# The house in figures, by `tools/house.py`


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """Every figure of this checkout."""
    return house.measure(ROOT)


def test_a_folder_holds_at_most_14_files(figures: dict[str, Any]) -> None:
    """So that a reader sees what is in it."""
    assert {name for name, (files, _) in figures["folders"].items() if files > 14} == set()
    most, where = figures["most files in a folder, tests"]
    assert most <= 14, where


def test_a_file_has_at_most_500_lines(figures: dict[str, Any]) -> None:
    """Tests and what they need as well."""
    assert figures["files over 500 lines"] == []


def test_no_module_imports_itself_by_way_of_others(figures: dict[str, Any]) -> None:
    """Nor does a folder of the library."""
    assert figures["circles of modules"] == []
    library = [each for each in figures["circles of folders"] if each[0].startswith(f"{LIBRARY}.")]
    assert library == []


def test_no_class_of_the_library_is_longer_than_400_lines(figures: dict[str, Any]) -> None:
    """It would be two."""
    assert figures["classes over 400 lines"] == []


def test_a_function_fits_a_screen(figures: dict[str, Any]) -> None:
    """40 lines, and ten ways through it, in the library, the server and the bench."""
    assert figures["functions over 40 lines"] == []
    assert figures["complexity over 10"] == {}


def test_the_engine_is_a_map_of_at_most_250_lines() -> None:
    """Whoever reads it meets every step of a request, and nothing of how a step is done."""
    (engine,) = (
        span
        for span in house.classes(house.modules(ROOT))
        if span.where == f"{LIBRARY}.engine:Engine"
    )
    assert engine.lines <= 250


def test_nobody_asks_whether_there_is_a_disk(figures: dict[str, Any]) -> None:
    """Nor a lender: what is absent answers for itself."""
    assert figures["`is None` of disk and lender"] == []


def test_private_names_stay_within_their_modules(figures: dict[str, Any]) -> None:
    """But for mlx-lm's own, in the two files that are there for that."""
    assert figures["private reach-ins"] == []
    assert figures["the same into mlx-lm, in its adapters"]


def test_circles_and_reaches_are_found() -> None:
    """A -> b -> c -> a is one, d is in none; `other._secret` is someone else's, `self._own` is not."""
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    text = (
        "class A:\n    def f(self, other):\n        return self._own, other._own, other._secret\n"
    )
    module = house.Module("x.y", Path("x/y.py"), text)
    assert house.reach_ins([module]) == ["x.y:3 other._secret"]
