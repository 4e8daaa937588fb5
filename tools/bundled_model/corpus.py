"""Free text present wherever Python is: the standard library's documentation and sources.

Three kinds of document, each named and split on its own: the language reference that `help()`
prints, the docstrings of a module as prose, and the module's source. They are licensed under the
PSF License, Version 2, and none of them is copied into the package.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Tests, tables of code points and generated grammars say little per token.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages"}
SKIPPED |= {"turtledemo", "pydoc_data", "ensurepip", "msilib", "_pyrepl", "__pycache__"}
LARGEST_SOURCE_BYTES = 120_000
HELD_OUT_SHARE = 20  # one name in so many


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the name that decides on which side of the split it falls."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether training must never see it; a function of the name, so the same everywhere."""
        return zlib.crc32(self.name.encode()) % HELD_OUT_SHARE == 0


@cache
def documents() -> tuple[Document, ...]:
    """Every document of this Python in a fixed order: reference, docstrings, sources.

    A module's docstrings and its source carry the same name, so that they are held out together.
    """
    return (*_reference(), *_modules(Path(sysconfig.get_paths()["stdlib"])))


def split(texts: Sequence[Document], seed: int = 0) -> tuple[list[Document], list[Document]]:
    """(training, held out), each shuffled with `seed`."""
    training = [d for d in texts if not d.held_out]
    held_out = [d for d in texts if d.held_out]
    random.Random(seed).shuffle(training)
    random.Random(seed).shuffle(held_out)
    return training, held_out


def _reference() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"reference/{name}", topics[name])


def _modules(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED & set(relative.parts) or path.stat().st_size > LARGEST_SOURCE_BYTES:
            continue
        if relative.name.startswith("_sysconfigdata"):  # describes the machine, not the language
            continue
        try:
            source = path.read_text(encoding="utf-8")
            prose = "\n\n".join(_docstrings(ast.parse(source), relative.stem))
        except (UnicodeDecodeError, SyntaxError):
            continue
        if prose:
            yield Document(relative.as_posix(), prose)
        yield Document(relative.as_posix(), source)


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    """`name(arguments)` above each docstring, in source order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node):
            head = name
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                head += f"({ast.unparse(node.args)})"
            yield f"{head}\n{text}"
        for child in node.body:
            yield from _docstrings(child, f"{name}.{getattr(child, 'name', '')}")
