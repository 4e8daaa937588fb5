"""Pages lead to each other: no link is dead, and no page or picture is left that nothing leads to."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest
from checkout import pages
from places import ROOT


def targets(page):
    """Each link inside the checkout: as written, the file, the anchor."""
    for written in pages.links(page):
        if "://" in written or written.startswith("mailto:"):
            continue
        path, _, anchor = unquote(written).partition("#")
        yield written, (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", pages.every_page(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    """To a file of the checkout, and to a heading of it where one is named."""
    for written, file, anchor in targets(page):
        assert file.exists(), f"{page.relative_to(ROOT)}: {written}"
        assert file.is_relative_to(ROOT), f"{written} leads out of the checkout"
        if anchor:
            assert anchor in pages.anchors(file), f"{page.relative_to(ROOT)}: {written}"


def test_a_reader_of_the_readme_reaches_every_page_and_picture():
    """By links alone; what nothing leads to is found by nobody."""
    reached, todo = set(), [pages.README]
    while todo:
        page = todo.pop()
        if page not in reached:
            reached.add(page)
            todo += [file for _, file, _ in targets(page)] if page.suffix == ".md" else []
    assert {*pages.every_page(), *pages.DOCS.iterdir()} - reached == set()


def test_the_index_lists_every_page_of_docs():
    """Once each."""
    listed = [file for _, file, _ in targets(pages.DOCS / "index.md") if file.parent == pages.DOCS]
    assert sorted(listed) == sorted({*pages.DOCS.glob("*.md")} - {pages.DOCS / "index.md"})


def test_the_readme_is_a_screen_and_a_bit():
    """What is longer belongs on a page."""
    assert len(pages.README.read_text(encoding="utf-8").splitlines()) <= 115


@pytest.mark.parametrize(
    "marked", [b for p in pages.TYPED for b in pages.blocks(p) if b.marker], ids=str
)
def test_what_is_not_run_with_the_fast_tests_says_why(marked):
    """In words, in the comment before it."""
    assert len(marked.reason.split()) >= 2
    assert marked.language in ("sh", "console", "python")


@pytest.mark.parametrize("page", pages.every_page(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_a_page_names_is_there(page):
    """What stands in backticks and begins with a folder of the checkout."""
    named = re.findall(
        r"`((?:mlx_hybridcache|server|bench|tests|docs|tools)/[\w./-]+)`", page.read_text("utf-8")
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_design_says_where_code_goes_for_every_folder():
    """Of the library and of the server."""
    told = (pages.DOCS / "design.md").read_text("utf-8")
    for package in ("mlx_hybridcache", "server/mlx_hybridcache_server"):
        for folder in (ROOT / package).iterdir():
            if (folder / "__init__.py").exists():
                assert re.search(rf"[/`]{folder.name}`", told), folder
