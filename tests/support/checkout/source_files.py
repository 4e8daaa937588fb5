"""What a source file imports, read from its syntax tree."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from places import ROOT


def sources(folder: str) -> list[Path]:
    """Every Python file below `folder` of the checkout, none when it does not exist yet."""
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """`mlx_hybridcache/store/tree.py` -> `mlx_hybridcache.store.tree`; packages end in __init__."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file, which nobody changes."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.AST, module: str, *, each_name: bool = False) -> Iterator[str]:
    """Absolute names of the modules that `module` imports from, once for each imported name.

    With `each_name` the name follows the module: it may itself be one.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield from (f"{source}.{alias.name}" if each_name else source for alias in node.names)
