"""How the code is built, in figures: `python tools/house.py [CHECKOUT] [--against CHECKOUT] [--list | --json]`.

Of any checkout, this one or an older one. Files and lines, those of the tests too, the longest class and function,
complexity as ruff counts it, import circles, private names that other modules reach for, and what is asked of an absent
disk or lender. `tests/test_architecture.py` holds this checkout to its limits through it.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGES = {
    "mlx_hybridcache": "mlx_hybridcache",
    "server": "server/mlx_hybridcache_server",
    "bench": "bench/mlx_hybridcache_bench",
}
"""Name and folder of each."""

BESIDE_THE_CORE = ("cli", "demo", "planning", "router")
"""Folders of the library that no request passes through."""

BESIDE_THE_CORE_BEFORE = ("about", "command", "console", "flags", "plan", "planning", "weightless")
"""The same as single files, before there were folders."""

LISTED = (
    *("files over 500 lines", "classes over 400 lines", "functions over 40 lines"),
    "complexity over 10",
    *("circles of modules", "circles of folders", "private reach-ins"),
    "`is None` of disk and lender",
)
"""What there should be none of."""

ADAPTERS = ("mlx_hybridcache.decode.batch", "mlx_hybridcache_server.adapter")
"""The files that know what mlx-lm keeps to itself, so that no other one has to."""

LONG_FILE = 500
LONG_FUNCTION = 40
COMPLEX = 10

ABSENT = re.compile(r"\b_?(disk|lender)\b is (not )?None")


@dataclass(frozen=True)
class Module:
    """One file: its dotted name, its lines and its syntax tree."""

    name: str
    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        return self.text.count("\n")

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def folder(self) -> str:
        return self.name if self.is_package else self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Span:
    """A class or function, with how many lines it has."""

    where: str
    lines: int


def modules(checkout: Path, places: Iterable[str] = PACKAGES.values()) -> list[Module]:
    """Every Python file of the three packages, or of other folders."""
    found = []
    for place in places:
        folder = checkout / place
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            name = ".".join(parts).removesuffix(".__init__")
            found.append(Module(name, path, path.read_text(encoding="utf-8")))
    return found


def imports(module: Module, known: Mapping[str, Module]) -> set[str]:
    """The modules of ours that one imports when it is loaded, so neither in functions nor for types alone."""
    found: set[str] = set()
    for node in _loaded(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom):
            source = _source(module, node)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found |= {inner if inner in known else source} & known.keys()
    return found - {module.name}


def _loaded(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _loaded(node)


def _source(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.folder.split(".")
    base = parts[: len(parts) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that can reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            group = sorted(stack[at:])
            del stack[at:]
            if len(group) > 1:
                found.append(group)

    for node in graph:
        if node not in index:
            visit(node)
    return found


def unit(name: str) -> str:
    """The folder or file right below its package that a module belongs to."""
    return ".".join(name.split(".")[:2])


def spans(module: Module, kinds: tuple[type[ast.AST], ...]) -> Iterator[Span]:
    """Its classes or functions, from the first decorator to the last line."""
    for node in ast.walk(module.tree):
        if isinstance(node, kinds):
            assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            yield Span(f"{module.name}:{node.name}", (node.end_lineno or first) - first + 1)


def classes(found: list[Module]) -> list[Span]:
    """The longest first."""
    return _sorted(found, (ast.ClassDef,))


def functions(found: list[Module]) -> list[Span]:
    """The longest first."""
    return _sorted(found, (ast.FunctionDef, ast.AsyncFunctionDef))


def _sorted(found: list[Module], kinds: tuple[type[ast.AST], ...]) -> list[Span]:
    every = [span for module in found for span in spans(module, kinds)]
    return sorted(every, key=lambda span: (-span.lines, span.where))


def reach_ins(found: list[Module]) -> list[str]:
    """`x._y` where the module neither defines nor is `_y`'s: someone else's private name is used.

    `os._exit` is named so by Python's own documentation.
    """
    hits: list[str] = []
    for module in found:
        own = {name for node in ast.walk(module.tree) for name in _private_names(node)}
        hits += (
            f"{module.name}:{node.lineno} {ast.unparse(node)}"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Attribute)
            and re.fullmatch(r"_[a-z]\w*", node.attr)
            and node.attr not in own
            and ast.unparse(node) != "os._exit"
        )
    return hits


def _private_names(node: ast.AST) -> Iterator[str]:
    """Names that a module itself gives: what it defines, and what it reads or writes of `self`."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=attr):
            yield attr
        case ast.Name(id=name, ctx=ast.Store()):
            yield name
        case ast.Constant(value=str(text)):
            yield text


def complexities(checkout: Path) -> dict[str, int]:
    """Functions whose McCabe complexity is over the limit, as ruff counts; empty without ruff."""
    command = [
        *(sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "C901"),
        *("--config", f"lint.mccabe.max-complexity={COMPLEX}", "--output-format", "json"),
        *(str(checkout / folder) for folder in PACKAGES.values()),
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = {}
    for one in json.loads(said or "[]"):
        name, number = re.findall(r"`(\w+)` is too complex \((\d+)", one["message"])[0]
        where = Path(one["filename"]).relative_to(checkout.resolve())
        found[f"{where}:{name}"] = int(number)
    return found


def order(checkout: Path) -> list[set[str]]:
    """`ORDER` of the checkout's test of the architecture; empty where there is none."""
    for name in ("tests/test_architecture.py", "tests/architecture.py"):
        file = checkout / name
        if file.is_file():
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORDER":
                    rungs: list[set[str]] = ast.literal_eval(node.value)
                    return rungs
    return []


def is_core(module: Module) -> bool:
    """Whether requests pass through it: the library without commands, plans, router and demo."""
    parts = module.name.split(".")
    if parts[0] != "mlx_hybridcache":
        return False
    second = parts[1] if len(parts) > 1 else ""
    return second not in {*BESIDE_THE_CORE, *BESIDE_THE_CORE_BEFORE} and not second.startswith(
        ("command_", "cli_")
    )


def measure(checkout: Path) -> dict[str, object]:
    """Every figure of a checkout, in plain values."""
    found, tests = modules(checkout), modules(checkout, ["tests"])
    library = [module for module in found if module.name.split(".")[0] == "mlx_hybridcache"]
    known = {module.name: module for module in found}
    graph = {module.name: imports(module, known) for module in found}
    between: dict[str, set[str]] = defaultdict(set)
    for name, others in graph.items():
        between[unit(name)] |= {unit(other) for other in others} - {unit(name)}
    files = Counter(module.folder for module in found)
    in_tests = Counter(module.path.parent.relative_to(checkout).as_posix() for module in tests)
    lines = Counter[str]()
    for module in found:
        lines[module.folder] += module.lines
    longest = functions(found)
    return {
        "files": {
            name: sum(m.path.is_relative_to(checkout / at) for m in found)
            for name, at in PACKAGES.items()
        },
        "lines": {
            name: sum(m.lines for m in found if m.path.is_relative_to(checkout / at))
            for name, at in PACKAGES.items()
        },
        "core lines": sum(module.lines for module in library if is_core(module)),
        "folders": {name: [files[name], lines[name]] for name in sorted(files)},
        "most files in a folder": _most(files),
        "most files in a folder, tests": _most(in_tests),
        "files over 500 lines": _long_files([*found, *tests], checkout),
        "longest class": _shown(classes(library)[0]),
        "classes over 400 lines": [_shown(span) for span in classes(library) if span.lines > 400],
        "longest function": _shown(longest[0]),
        "functions over 40 lines": [_shown(span) for span in longest if span.lines > LONG_FUNCTION],
        "complexity over 10": complexities(checkout),
        "circles of modules": circles(graph),
        "circles of folders": circles(between),
        "private reach-ins": reach_ins([each for each in found if each.name not in ADAPTERS]),
        "the same into mlx-lm, in its adapters": reach_ins(
            [each for each in found if each.name in ADAPTERS]
        ),
        "`is None` of disk and lender": [
            f"{module.name}:{module.text.count(chr(10), 0, hit.start()) + 1}"
            for module in library
            for hit in ABSENT.finditer(module.text)
        ],
        "rungs of the import order": len(order(checkout)),
    }


def _most(files: Counter[str]) -> list[object]:
    ((where, number),) = files.most_common(1)
    return [number, where]


def _long_files(found: list[Module], checkout: Path) -> list[list[object]]:
    long = [module for module in found if module.lines > LONG_FILE]
    return [
        [module.lines, module.path.relative_to(checkout).as_posix()]
        for module in sorted(long, key=lambda module: -module.lines)
    ]


def _shown(span: Span) -> list[object]:
    return [span.lines, span.where]


def rows(figures: Mapping[str, object]) -> dict[str, str]:
    """A line each, for people."""
    shown = {}
    for name, value in figures.items():
        if name == "folders":
            continue
        match value:
            case [int(number), str(where)]:
                shown[name] = f"{number:,} ({where})"
            case list() | dict() if name not in ("files", "lines"):
                shown[name] = f"{len(value):,}"
            case dict():
                shown[name] = ", ".join(f"{key} {count:,}" for key, count in value.items())
            case int(number):
                shown[name] = f"{number:,}"
    return shown


def _named(found: object) -> list[str]:
    if isinstance(found, dict):
        return [f"{number} {where}" for where, number in found.items()]
    assert isinstance(found, list)
    return [each if isinstance(each, str) else " ".join(map(str, each)) for each in found]


def main() -> int:
    """Print the figures of one checkout, beside those of another where one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="an older one")
    parser.add_argument("--list", action="store_true", help="name what is counted")
    parser.add_argument("--json", action="store_true", help="every finding, for programs")
    chosen = parser.parse_args()
    told = {"now": measure(chosen.checkout.resolve())}
    if chosen.against is not None:
        told = {"before": measure(chosen.against.resolve())} | told
    if chosen.json:
        print(json.dumps(told, indent=1))
        return 0
    tables = [rows(figures) for figures in told.values()]
    print(f"{'':30}", *(f"{name:<58}" for name in told))
    for name in tables[-1]:
        print(f"{name:30}", *(f"{table.get(name, '-'):<58}" for table in tables))
    for title, figures in told.items():
        if chosen.list:
            for name in LISTED:
                print(f"\n{title}: {name}", *_named(figures[name]), sep="\n  ")
        print(f"\n{title}: folders, files, lines")
        folders = figures["folders"]
        assert isinstance(folders, dict)
        for name, (files, lines) in folders.items():
            print(f"  {name:55} {files:4} {lines:7,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
