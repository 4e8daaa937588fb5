"""The project's Markdown: which pages there are, what they show to be typed, and what they link to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from places import ROOT

README = ROOT / "README.md"
DOCS = ROOT / "docs"
TYPED = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
"""The pages whose lines are run."""

_LEFT_OUT = {"build", "dist", "artefacts", "node_modules"}
_COMMENT = re.compile(r"<!-- (not run|long): (.+) -->")
_PAGE_COMMENT = re.compile(r"<!-- nothing on this page is run: (.+) -->")
_FENCE = re.compile(r"(`{3,}|~{3,})\s*([\w-]*)")
_LINK = re.compile(
    r"!?\[(?:[^][]|\[[^]]*\])*\]\(([^()\s]+(?:\([^()]*\))?)\)|(?:src|srcset|href)=\"([^\"]+)\""
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block, and what the comment before it says about running it."""

    page: Path
    line: int
    language: str
    text: str
    marker: str = ""
    """`not run`, `long`, or nothing: then it is run with the fast tests."""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[tuple[str, list[str]]]:
        """Each command of a `sh` or `console` block, with the output that is shown behind it.

        Where lines begin with `$`, those are the commands; else all lines are.
        """
        lines = self.text.replace("\\\n", " ").splitlines()
        marked = any(line.startswith("$ ") for line in lines)
        found: list[tuple[str, list[str]]] = []
        for line in lines:
            if marked and not line.startswith("$ "):
                found[-1][1].append(line)
            elif line.strip() and not line.startswith("#"):
                found.append((line.removeprefix("$ "), []))
        return found


def every_page() -> list[Path]:
    """All Markdown files of the checkout, but for what tools leave in it."""
    found = []
    for path in ROOT.rglob("*.md"):
        parts = path.relative_to(ROOT).parts[:-1]
        if not any(part.startswith(".") or part in _LEFT_OUT for part in parts):
            found.append(path)
    return sorted(found)


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    """The fenced blocks of a page, in order."""
    found = []
    lines = page.read_text(encoding="utf-8").splitlines()
    whole = next((said[1] for line in lines if (said := _PAGE_COMMENT.fullmatch(line))), "")
    marker, reason = ("not run", whole) if whole else ("", "")
    fence, language, begin = "", "", 0
    for number, line in enumerate(lines):
        if fence:
            if line.strip().startswith(fence):
                said = _COMMENT.fullmatch(lines[begin - 1]) if begin else None
                own = (said[1], said[2]) if said else (marker, reason)
                text = "\n".join(lines[begin + 1 : number]) + "\n"
                found.append(Block(page, begin + 1, language, text, *own))
                fence = ""
        elif opened := _FENCE.match(line):
            fence, language, begin = opened[1], opened[2], number
    assert not fence, f"{page}:{begin + 1}: this block is never closed"
    return tuple(found)


def of_language(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages."""
    return [block for block in blocks(page) if block.language in languages]


def prose(page: Path) -> Iterator[str]:
    """The lines of a page that are no code, inline code blanked."""
    fence = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if fence:
            fence = "" if line.strip().startswith(fence) else fence
        elif opened := _FENCE.match(line):
            fence = opened[1]
        else:
            yield line


def links(page: Path) -> list[str]:
    """What the page links to, as it is written."""
    text = re.sub(r"(?<!\[)`[^`\n]*`(?!\])", "", "\n".join(prose(page)))
    return [one or other for one, other in _LINK.findall(text)]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    found: set[str] = set()
    for line in prose(page):
        if heading := re.match(r"#{1,6}\s+(.*)", line):
            words = re.sub(r"[^\w\- ]", "", heading[1].strip().lower()).replace(" ", "-")
            number, name = 0, words
            while name in found:
                number += 1
                name = f"{words}-{number}"
            found.add(name)
    return found
