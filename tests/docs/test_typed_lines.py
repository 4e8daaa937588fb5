"""What the pages show to be typed is typed: servers, curl, commands and Python, in the order of each page.

As it stands but for the port. `PATH` is the bundled model and `TEXT` a text, both in the directory where all of it is
run, whose owner has an empty home. A comment before a block says why it is left out (`pages.py`).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import bundled
import pytest
from checkout import pages
from places import ROOT
from servers import OURS, Server, running

from mlx_hybridcache.demo import BUNDLED_MODEL

SHELLS = ("sh", "console")
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
COMMAND, SERVER = "mlx-hybridcache", "mlx_hybridcache.server"


def entry(name):
    """The function that an installed command calls."""
    module, _, function = SCRIPTS[name].partition(":")
    return getattr(importlib.import_module(module), function)


def printed_by(function, *words):
    """What it prints, and its exit status."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            status = function(*words)
        except SystemExit as ended:
            status = ended.code
    return shown.getvalue(), status or 0


def without_ages(line):
    """Its words, with the seconds since something was written blanked."""
    return " ".join(re.sub(r"\b\d+ s\b", "_ s", line).split())


class Terminal:
    """Types the lines of one page. A server that they start is stopped by the next line that is no curl."""

    def __init__(self, server: Server, home: Path) -> None:
        self.shared = server
        self.home = home
        self.own: Server | None = None

    @property
    def port(self) -> int:
        """Where the server listens that lines behind this one ask."""
        return (self.own or self.shared).port

    def run(self, block: pages.Block) -> str:
        """One block; what it printed."""
        if block.language == "python":
            source = self.here(block.text)
            code = compile(source, str(block), "exec")
            shown, status = printed_by(exec, code, {"__name__": "__main__"})
            assert (bool(shown.strip()), status) == (True, 0), f"{block}: {shown}"
            return shown
        return "".join(self.type(line, expected) for line, expected in block.commands())

    def here(self, text: str) -> str:
        """With the port of a server that runs."""
        return re.sub(r"(localhost|127\.0\.0\.1):8080", rf"\1:{self.port}", text)

    def type(self, line: str, expected: list[str]) -> str:
        """One line of a shell, and what is shown behind it is printed."""
        words = [
            word.replace("~", str(self.home), 1) if word.startswith("~") else word
            for word in shlex.split(self.here(line), comments=True)
        ]
        name, *rest = words
        if name == "curl":
            return self.curl(line, rest)
        self.close()
        if name == SERVER:
            self.serve(rest)
            return ""
        assert name == COMMAND, f"nobody knows how to run this: {line}"
        shown, status = printed_by(entry(COMMAND), rest)
        assert status == 0, f"{line}\n{shown}"
        printed = without_ages(shown.replace(str(self.home), "~"))
        for each in expected:
            assert each == "..." or without_ages(each) in printed, f"{line}\n{each}\nin\n{shown}"
        return shown

    def serve(self, flags: list[str]) -> None:
        """Start what the line starts, at a free port; the shared one serves where nothing is asked of it."""
        if "--port" in flags:
            at = flags.index("--port")
            flags = flags[:at] + flags[at + 2 :]
        if flags:
            self.own = Server(OURS, *flags, HOME=str(self.home))
            self.own.start()

    def curl(self, line: str, words: list[str]) -> str:
        """It answers 200, with JSON, events to their end, or text."""
        told = [
            "--silent",
            "--show-error",
            "--noproxy",
            "*",
            "--write-out",
            "\n%{http_code} %{content_type}",
        ]
        ended = subprocess.run(
            ["curl", *words, *told], capture_output=True, text=True, timeout=120, check=True
        )
        body, _, last = ended.stdout.rpartition("\n")
        status, _, kind = last.partition(" ")
        assert status == "200", f"{line}\n{body}"
        if kind.startswith("application/json"):
            assert json.loads(body)
        elif kind.startswith("text/event-stream"):
            assert body.rstrip().endswith("data: [DONE]"), line
        else:
            assert kind.startswith("text/plain"), line
        return body

    def close(self) -> None:
        """Stop the server that a line started."""
        if self.own is not None:
            own, self.own = self.own, None
            try:
                assert own.stop() == 0, own.log
            finally:
                own.close()


@pytest.fixture(scope="module")
def server():
    with running(OURS) as server:
        yield server


@pytest.fixture
def terminal(server, tmp_path, monkeypatch):
    """In a directory with a model and a text, and an empty home."""
    (tmp_path / "PATH").symlink_to(BUNDLED_MODEL)
    (tmp_path / "TEXT").write_text(bundled.text(20_000), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    terminal = Terminal(server, tmp_path)
    yield terminal
    terminal.close()


def typed(page, marker):
    """The blocks of a page that are to be run."""
    found = pages.of_language(page, "python", *SHELLS)
    return [block for block in found if block.marker == marker]


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("page", [p for p in pages.TYPED if typed(p, "")], ids=name)
def test_every_line_does_what_the_page_says(terminal, page):
    """Commands end with 0 and print what is shown, curl gets 200, Python prints something."""
    for block in typed(page, ""):
        terminal.run(block)


@pytest.mark.long
@pytest.mark.parametrize("block", [b for p in pages.TYPED for b in typed(p, "long")], ids=str)
def test_long_lines_do_too(terminal, block):
    """Each for itself."""
    terminal.run(block)


def test_there_is_something_to_type():
    """The pages that people begin with have lines that are run."""
    for page, languages in {
        "README.md": {"console", "python"},
        "docs/serving.md": {"console"},
        "docs/watching.md": {"console"},
        "docs/library.md": {"python"},
        "docs/persistence.md": {"console"},
    }.items():
        assert {block.language for block in typed(ROOT / page, "")} >= languages


def test_the_librarys_blocks_show_what_is_restored(terminal):
    """The second reply's prompt parts ways at its last words; what was saved restores the prompt."""
    library, framework = pages.of_language(pages.DOCS / "library.md", "python")
    shown = terminal.run(library)
    assert re.findall(r"(\w+) of \w+ tokens restored.*\((\w+)\)", shown)[0] == ("0", "cold")
    assert re.search(
        r"[1-9]\d\d of \d+ tokens restored, \d+ read in \d+ forwards? \(branch\)", shown
    )
    restored, of, tokens = terminal.run(framework).split()[:3]
    assert (int(restored), of) == (int(tokens) - 1, "of")


# Flags, of lines that are not run too


def our_commands():
    """Every line that calls a command of ours, on any page."""
    for page in pages.every_page():
        for block in pages.of_language(page, *SHELLS):
            for line, _ in block.commands():
                words = shlex.split(line, comments=True)
                if words and words[0] in SCRIPTS:
                    yield pytest.param(words, id=f"{block} {' '.join(words[:3])}")


_helps: dict[tuple[str, ...], str] = {}


def help_of(words):
    """What `--help` says of the command and its subcommands that the line names."""
    named = tuple(word for word in words[:3] if re.fullmatch(r"[a-z][a-z-]+|mlx\S+", word))
    while named not in _helps:
        shown, status = printed_by(entry(named[0]), [*named[1:], "--help"])
        if status == 0:
            _helps[named] = shown
        else:
            named = named[:-1]
    return _helps[named]


@pytest.mark.parametrize("words", list(our_commands()))
def test_every_flag_exists(words, monkeypatch):
    """Those of lines that nobody runs here too: `--help` knows each."""
    monkeypatch.setitem(os.environ, "COLUMNS", "200")
    known = set(re.findall(r"--[a-z][\w-]*", help_of(words)))
    own = words[: words.index("--")] if "--" in words else words
    assert {word.partition("=")[0] for word in own if word.startswith("--")} <= known
